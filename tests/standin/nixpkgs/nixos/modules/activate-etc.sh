# Part of activation: /etc/static is the configuration's tree, /etc links into it, except for what is listed as a copy.
# In: etc. Processes are dear here: few, and one for all.
old=
[ ! -L /etc/static ] || old=$(readlink /etc/static)
cp -dR --no-preserve=mode --remove-destination "$etc/links/." "$etc/static" /etc/
if [ -n "$old" ] && [ "$old" != "$etc/etc" ]; then # what the configuration before had, and this one has not
  find /etc -lname '/etc/static/*' | while read -r link; do [ -e "$link" ] || rm -f "$link"; done
fi
while read -r mode user group name; do
  install -D -m "$mode" -o "$user" -g "$group" "$etc/etc/$name" "/etc/$name"
done < "$etc/copies"
