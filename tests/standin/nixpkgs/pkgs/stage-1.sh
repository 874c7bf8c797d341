#!/bin/busybox sh
# Stage 1, as in NixOS: mount what the configuration needs for boot, then start stage 2 (init= on the command line).
# The mounts are lines of /mounts: device, target, type, options. The base image is mounted besides: it becomes /usr.
fail() {
  cat <<MESSAGE

$1

An error occurred in stage 1 of the boot process, which must mount the
root filesystem on \`/mnt-root' and then start stage 2.  Press one
of the following keys:

  r) to reboot immediately
  *) to ignore the error and continue

MESSAGE
  case "$cmdline " in *"boot.panic_on_fail "*|*"boot.shell_on_fail "*) exit 1 ;; esac
  read -r -n 1 key < /dev/console
  [ "$key" != r ] || reboot -f
}

device() { # a name from fileSystems → the device, once it is there
  tries=0
  while [ $tries -lt 400 ]; do
    case $1 in
      /dev/disk/by-id/virtio-*)
        for serial in /sys/block/vd*/serial; do
          [ -e "$serial" ] || continue
          value=; read -r value < "$serial"
          if [ "$value" = "${1##*/virtio-}" ]; then serial=${serial%/serial}; echo /dev/${serial##*/}; return; fi
        done ;;
      /dev/disk/by-label/*) findfs "LABEL=${1##*/}" 2> /dev/null && return ;;
      /dev/disk/by-uuid/*) findfs "UUID=${1##*/}" 2> /dev/null && return ;;
      /dev/*) if [ -b "$1" ]; then echo "$1"; return; fi ;;
      /*) if [ -e "$root$1" ]; then echo "$root$1"; return; fi ;; # a file of what is mounted already
      *) echo "$1"; return ;;
    esac
    tries=$((tries + 1)); usleep 50000
  done
  echo "$1"
}

put() { # device target type options: one mount
  real=$(device "$1")
  [ -d "$root$2" ] || mkdir -p "$root$2"
  echo "mounting $1 on $2..."
  mount -t "$3" -o "$4" "$real" "$root$2" || fail "mounting $1 on $2 failed"
}

root=/mnt-root
/bin/busybox mkdir -p /proc /sys /dev $root # busybox finds its own commands once /proc is there
/bin/busybox mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
read -r cmdline < /proc/cmdline
echo; echo "<<< NixOS Stage 1 >>>"; echo
init=/init
for word in $cmdline; do case $word in init=*) init=${word#init=} ;; esac; done
while read -r module; do insmod /modules/$module; done < /modules/list

while read -r dev target type options <&3; do
  case $type in
    overlay) mkdir -p $root/nix/.rw-store/upper $root/nix/.rw-store/work $root$target
      rw=$root/nix/.rw-store
      mount -t overlay -o "lowerdir=$root/nix/.ro-store,upperdir=$rw/upper,workdir=$rw/work" overlay $root$target \
        || fail "mounting the overlay on $target failed" ;;
    bind) mkdir -p $root$target; mount -o bind $root$dev $root$target || fail "mounting $dev on $target failed" ;;
    *) put "$dev" "$target" "$type" "$options" ;;
  esac
done 3< /mounts
# Debian's files: in an image a file of its own disk, or of the medium that it was started from; else a drive.
base=$root/nix/.standin-base
for file in $root/nix/.standin-base.img $root/iso/standin-base.img; do
  [ ! -f $file ] || { mkdir -p $base; mount -t erofs -o ro,loop $file $base || fail "mounting $file failed"; break; }
done
[ -d $base/usr ] || put /dev/disk/by-id/virtio-standin-base /nix/.standin-base erofs ro

[ -e "$root$init" ] || fail "stage 2 init script ($root$init) not found"
mkdir -p $root/usr $root/proc $root/sys $root/dev $root/run $root/etc
layers=
if [ -s "$root${init%/*}/usr-layers" ]; then
  while read -r path; do layers=$layers:${path##*/}/usr; done < "$root${init%/*}/usr-layers"
fi
if [ -n "$layers" ]; then # relative names: the kernel takes a page of options
  cd $root/nix/.ro-store 2> /dev/null || cd $root/nix/store # with a boot loader it is on the root
  mount -t overlay -o "ro,lowerdir=../.standin-base/usr$layers" overlay $root/usr || fail "mounting /usr failed"
  cd /
else
  mount -o bind $base/usr $root/usr
fi
if [ ! -L $root/lib64 ]; then
  for name in bin sbin lib lib64; do ln -s usr/$name $root/$name; done
  cp -a $base/etc/. $root/etc/
  mkdir -p $root/tmp $root/root $root/home $root/var/tmp $root/var/lib/nixos $root/var/log/journal $root/var/empty
  chmod 1777 $root/tmp $root/var/tmp; chmod 700 $root/root
fi
mount -t tmpfs -o mode=0755,nosuid,nodev,strictatime tmpfs $root/run
mount --move /dev $root/dev
mount --move /sys $root/sys
/bin/busybox mount --move /proc $root/proc
exec /bin/busybox switch_root $root "$init"
