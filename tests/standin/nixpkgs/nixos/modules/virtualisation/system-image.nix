# The disk of a machine that boots through GRUB: what an installation would have left on it. Partition 1 is the root, with
# the store, the system profile and GRUB's menu; GRUB itself is between the partition table and the first mebibyte.
{ lib, config, pkgs, closure }:
let cfg = config.virtualisation;
in pkgs.standin.runAsRoot "nixos-disk-image" {
  inherit closure;
  inherit (config.system.build) toplevel installBootLoader;
  size = cfg.diskSize;
  grub = "/usr/lib/grub/i386-pc";
} ''
  umask 022
  mkdir -p root/nix/store root/nix/var/nix/profiles
  # Hard links where that is possible: same file system, and protected_hardlinks lets us.
  xargs cp -al -t root/nix/store < $closure/store-paths 2> /dev/null || {
    find root/nix/store -type d -exec chmod u+w {} +; rm -rf root/nix/store; mkdir root/nix/store
    xargs cp -a -t root/nix/store < $closure/store-paths
  }
  ln -s $toplevel root/nix/var/nix/profiles/system-1-link
  ln -s system-1-link root/nix/var/nix/profiles/system
  STANDIN_ROOT=$PWD/root bash $installBootLoader $toplevel

  used=$(du -sm --apparent-size root | cut -f 1)
  need=$((used + used / 8 + 64))
  [ $need -lt $size ] || size=$need
  truncate -s "$size"M disk
  # GRUB 2.06 can't read a file system with these features.
  mkfs.ext4 -q -L nixos -O ^metadata_csum_seed,^orphan_file -E offset=1048576,nodiscard,assume_storage_prezeroed=1 \
    -d root disk "$(((size - 1) * 1024))k"

  # The menu's commands are all in the core: nothing is loaded from /boot/grub/i386-pc.
  grub-mkimage -O i386-pc -d $grub -p '(hd0,msdos1)/boot/grub' -o core.img \
    biosdisk part_msdos ext2 normal configfile linux echo test
  [ "$(stat -c %s core.img)" -lt 1048064 ]
  # As they come, boot.img goes on at sector 1, and core.img at sector 2.
  dd if=$grub/boot.img of=disk bs=440 count=1 conv=notrunc status=none
  dd if=core.img of=disk bs=512 seek=1 conv=notrunc status=none
  # The partition table: one entry, bootable, Linux, from sector 2048 on.
  bytes() { local n=$1; for _ in 1 2 3 4; do printf "\\x$(printf %02x $((n & 255)))"; n=$((n >> 8)); done; }
  { printf '\x80\xfe\xff\xff\x83\xfe\xff\xff'; bytes 2048; bytes $(((size - 1) * 2048)); } |
    dd of=disk bs=1 seek=446 conv=notrunc status=none
  printf '\x55\xaa' | dd of=disk bs=1 seek=510 conv=notrunc status=none

  mkdir $out
  qemu-img convert -f raw -O qcow2 disk $out/nixos.qcow2
  find root/nix/store -type d -exec chmod u+w {} + # else the build's directory can't be removed
''
