#!/bin/bash
# system.build.installBootLoader TOPLEVEL: GRUB's menu, with TOPLEVEL as what boots and an entry for each generation.
# As in NixOS, kernels are read where they are: the store is on the disk that GRUB is on. GRUB itself stays as the image
# was made. With STANDIN_ROOT the menu is that of an image.
set -eu
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
root=${STANDIN_ROOT:-}
toplevel=$(readlink -f "$1")
menu=$root/boot/grub/grub.cfg

entry() { # NAME TOPLEVEL
  local kernel initrd params
  kernel=$(readlink -f "$2/kernel"); initrd=$(readlink -f "$2/initrd")
  read -r params < "$2/kernel-params" || true # no line feed at its end
  printf 'menuentry "%s" {\n  linux %s init=%s/init %s\n  initrd %s\n}\n' "$1" "$kernel" "$2" "$params" "$initrd"
}
entries() { # NAME TOPLEVEL: and its specialisations
  local path
  entry "$1" "$2"
  for path in "$2"/specialisation/*; do
    [ ! -e "$path" ] || entry "$1 - (${path##*/})" "$(readlink -f "$path")"
  done
}

mkdir -p "$root/boot/grub"
{
  echo "# Made by the boot loader's installer at each switch: changes are lost."
  printf 'set timeout=0\nset default=0\n'
  entries NixOS "$toplevel"
  for link in $(printf '%s\n' "$root"/nix/var/nix/profiles/system-*-link | sort -rV); do
    [ -L "$link" ] || continue
    number=${link##*/system-}
    entries "NixOS - Configuration ${number%-link}" "$(readlink "$link")"
  done
} > "$menu.new"
sync "$menu.new" 2> /dev/null || true
mv "$menu.new" "$menu"
# The machine may be cut off the next moment.
[ -n "$root" ] || sync -f "$menu"
