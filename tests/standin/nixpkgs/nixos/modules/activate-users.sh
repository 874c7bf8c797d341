# Part of activation: bring /etc/passwd, group and shadow in line with the configuration.
# In: accounts; mutable (1 or empty).
if [ ! /var/lib/nixos/accounts -ef "$accounts" ] || [ -z "$mutable" ]; then
  if [ ! -e /etc/passwd ] || [ -z "$mutable" ]; then
    install -m 644 "$accounts/passwd" "$accounts/group" /etc/
    install -m 640 -g 318 "$accounts/shadow" /etc/shadow
  else
    # The configuration's lines first, then those that only the guest knows; a password changed by hand stays.
    for file in passwd group; do
      awk -F: 'NR == FNR { seen[$1] = 1; print; next } !seen[$1]' "$accounts/$file" /etc/$file > /etc/$file.new
      chmod 644 /etc/$file.new
    done
    awk -F: -v OFS=: -v fixed="$accounts/fixed" '
      BEGIN { while ((getline name < fixed) > 0) decided[name] = 1 }
      FNR == 1 { file++ }
      file == 1 { old[$1] = $0; next }
      { seen[$1] = 1; if (($1 in old) && !($1 in decided)) print old[$1]; else print }
      END { for (name in old) if (!(name in seen)) print old[name] }' /etc/shadow "$accounts/shadow" > /etc/shadow.new
    chmod 640 /etc/shadow.new; chgrp 318 /etc/shadow.new
    for file in passwd group shadow; do mv /etc/$file.new /etc/$file; done
  fi
  while read -r name file; do
    if [ -r "$file" ]; then read -r hash < "$file"; usermod -p "$hash" "$name"; fi
  done < "$accounts/password-files"
  while read -r mode uid gid home; do
    [ -d "$home" ] || install -d -m "$mode" -o "$uid" -g "$gid" "$home"
  done < "$accounts/homes"
  ln -sfn "$accounts" /var/lib/nixos/accounts
fi
