# Part of activation: bring /etc/passwd, group and shadow in line with the configuration.
# In: accounts; mutable (1 or empty); merge (activate-users.awk).
if [ ! /var/lib/nixos/accounts -ef "$accounts" ] || [ -z "$mutable" ]; then
  homes=$accounts/homes
  if [ ! -e /etc/passwd ]; then
    install -m 644 "$accounts/passwd" "$accounts/group" /etc/
    install -m 640 -g 318 "$accounts/shadow" /etc/shadow
  else
    homes=/var/lib/nixos/homes
    : > "$homes" # awk makes it only where there is one
    awk -F: -v OFS=: -v accounts="$accounts" -v before=/var/lib/nixos/accounts -v mutable="$mutable" -v homes=$homes -f "$merge"
    chmod 644 /etc/passwd.new /etc/group.new; chmod 640 /etc/shadow.new; chgrp 318 /etc/shadow.new
    for file in passwd group shadow; do mv /etc/$file.new /etc/$file; done
  fi
  while read -r name file; do
    # `read` fails where the last line has no end, and has read it all the same.
    if [ -r "$file" ] && { read -r hash < "$file" || [ "$hash" ]; }; then usermod -p "$hash" "$name"; fi
  done < "$accounts/password-files"
  while read -r mode uid gid home; do
    install -d -m "$mode" -o "$uid" -g "$gid" "$home"
  done < "$homes"
  ln -sfn "$accounts" /var/lib/nixos/accounts
fi
