# Part of activation: /etc/static is the configuration's tree, /etc links into it, except for what is listed as a copy.
# In: etc. Processes are dear here: few, and one for all.
old=
[ ! -L /etc/static ] || old=$(readlink /etc/static)
if [ -n "$old" ] && [ "$old" != "$etc/etc" ]; then
  # From one moment to the next, for what runs.
  ln -sfn "$etc/etc" /etc/static.new && mv -fT /etc/static.new /etc/static
  # Links that the configuration before had and this one has not, or has a directory for, or has inside of a link.
  while IFS= read -r link; do
    name=${link#/etc/}
    if [ ! -e "$link" ] || { [ -d "$etc/links/$name" ] && [ ! -L "$etc/links/$name" ]; }; then rm -f "$link"; continue; fi
    while [[ $name == */* ]]; do
      name=${name%/*}
      if [ -L "$etc/links/$name" ]; then rm -f "$link"; rmdir --ignore-fail-on-non-empty "/etc/$name"; break; fi
    done
  done < <(find /etc -lname '/etc/static/*')
  # And its copies.
  if [ -r "${old%/etc}/copies" ]; then
    declare -A copied=()
    while read -r _ _ _ name; do copied[$name]=1; done < "$etc/copies"
    while read -r _ _ _ name; do
      if [ -z "${copied[$name]-}" ] && [ ! -L "/etc/$name" ]; then rm -f "/etc/$name"; fi
    done < "${old%/etc}/copies"
  fi
  cp -dR --no-preserve=mode --remove-destination "$etc/links/." /etc/
else
  cp -dR --no-preserve=mode --remove-destination "$etc/links/." "$etc/static" /etc/
fi
while read -r mode user group name; do
  install -D -m "$mode" -o "$user" -g "$group" "$etc/etc/$name" "/etc/$name"
done < "$etc/copies"
