# The disk of a machine that boots through GRUB: what an installation would have left on it. Partition 1 is the root, with
# the store, the system profile and GRUB's menu; GRUB itself is between the partition table and the first mebibyte.
# Where `efi` is on, partition 2 is an EFI system partition with the same GRUB: such a disk boots with either firmware.
#
# size: in MiB, or "auto"; base: Debian's files, where they are to be on the disk; finish: what is made of ./disk.
{ pkgs, closure, toplevel, installBootLoader, size, base ? null, efi ? false, name ? "nixos-disk-image"
, finish ? "mkdir $out; qemu-img convert -f raw -O qcow2 disk $out/nixos.qcow2" }:
pkgs.standin.runAsRoot name {
  inherit closure toplevel installBootLoader;
  size = toString size;
  base = toString base;
  efi = if efi then "1" else "";
  grub = "/usr/lib/grub";
} ''
  umask 022
  mkdir -p root/nix/store root/nix/var/nix/profiles
  # Hard links where that is possible: same file system, and protected_hardlinks lets us.
  xargs cp -al -t root/nix/store < $closure/store-paths 2> /dev/null || {
    find root/nix/store -type d -exec chmod u+w {} +; rm -rf root/nix/store; mkdir root/nix/store
    xargs cp -a -t root/nix/store < $closure/store-paths
  }
  [ ! -s $closure/registration ] || cp $closure/registration root/nix-path-registration # see nix.nix
  # Stage 1 looks for it there.
  [ -z "$base" ] || ln "$base" root/nix/.standin-base.img 2> /dev/null || cp "$base" root/nix/.standin-base.img
  ln -s $toplevel root/nix/var/nix/profiles/system-1-link
  ln -s system-1-link root/nix/var/nix/profiles/system
  STANDIN_ROOT=$PWD/root bash $installBootLoader $toplevel

  used=$(du -sm --apparent-size root | cut -f 1)
  need=$((used + used / 8 + 64))
  if [ "$size" = auto ]; then size=$((need + 512)); fi
  [ $need -lt $size ] || size=$need
  esp=0
  [ -z "$efi" ] || esp=16
  truncate -s "$((size + esp))"M disk
  # GRUB 2.06 can't read a file system with these features.
  mkfs.ext4 -q -L nixos -O ^metadata_csum_seed,^orphan_file -E offset=1048576,nodiscard,assume_storage_prezeroed=1 \
    -d root disk "$(((size - 1) * 1024))k"

  # The menu's commands are all in the core: nothing is loaded from /boot/grub.
  modules="part_msdos ext2 normal configfile linux echo test"
  grub-mkimage -O i386-pc -d $grub/i386-pc -p '(hd0,msdos1)/boot/grub' -o core.img biosdisk $modules
  [ "$(stat -c %s core.img)" -lt 1048064 ]
  # As they come, boot.img goes on at sector 1, and core.img at sector 2.
  dd if=$grub/i386-pc/boot.img of=disk bs=440 count=1 conv=notrunc status=none
  dd if=core.img of=disk bs=512 seek=1 conv=notrunc status=none
  # The partition table. An entry: flag, type, first sector and number of sectors.
  bytes() { local n=$1; for _ in 1 2 3 4; do printf "\\x$(printf %02x $((n & 255)))"; n=$((n >> 8)); done; }
  partition() { printf "\\x$1\\xfe\\xff\\xff\\x$2\\xfe\\xff\\xff"; bytes $3; bytes $4; }
  {
    partition 80 83 2048 $(((size - 1) * 2048))
    [ -z "$efi" ] || partition 00 ef $((size * 2048)) $((esp * 2048))
  } | dd of=disk bs=1 seek=446 conv=notrunc status=none
  printf '\x55\xaa' | dd of=disk bs=1 seek=510 conv=notrunc status=none

  if [ -n "$efi" ]; then
    # GRUB's first parser knows no semicolon.
    printf '%s\n' 'search --no-floppy --label nixos --set=root' 'set prefix=($root)/boot/grub' > early
    grub-mkimage -O x86_64-efi -d $grub/x86_64-efi -c early -p /EFI/BOOT -o BOOTX64.EFI \
      fat $modules search search_label all_video
    mkfs.vfat -n ESP -C esp $((esp * 1024)) > /dev/null
    mmd -i esp ::/EFI ::/EFI/BOOT; mcopy -i esp BOOTX64.EFI ::/EFI/BOOT/
    dd if=esp of=disk bs=1M seek=$size conv=notrunc status=none
  fi
  find root/nix/store -type d -exec chmod u+w {} + # else the build's directory can't be removed
  ${finish}
''
