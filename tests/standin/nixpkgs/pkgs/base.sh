# The root of every guest but for its state: unpacked Debian packages as a read-only image. No machine's configuration.
# In: debs ("name=path …"), modules. Out: out (the image), info (bins/PACKAGE: its programs; units: its systemd units).
umask 022
mkdir -p r/usr/bin r/usr/sbin r/usr/lib r/usr/lib64 r/usr/lib32 "$info/bins"
for d in bin sbin lib lib64 lib32; do ln -s usr/$d r/$d; done
for deb in $debs; do
  dpkg-deb --fsys-tarfile "${deb#*=}" | tar -xv --keep-directory-symlink -C r --exclude='./'{,usr/}'lib/udev/hwdb.d/*' \
    --exclude='./usr/share/'{apport,bash-completion,bug,doc,info,lintian,locale,man,zoneinfo/right}'/*' > list
  sed -nE 's#^\./(usr/)?(bin|sbin)/([^/]+)$#/usr/\2/\3#p' list > "$info/bins/${deb%%=*}"
done
cd r
ln -sf bash usr/bin/sh; ln -sf mawk usr/bin/awk; ln -sf nc.openbsd usr/bin/nc; ln -sf which.debianutils usr/bin/which
echo /usr/bin/sh >> "$info/bins/bash"; echo /usr/bin/awk >> "$info/bins/mawk"
echo /usr/bin/nc >> "$info/bins/netcat-openbsd"; echo /usr/bin/which >> "$info/bins/debianutils"

# Boot time is processes and rules: keep the units, generators and rules that a NixOS virtual machine has as well.
keep() { # DIRECTORY NAME…: nothing else stays there
  local dir=$1 f n; shift
  for f in "$dir"/*; do
    n=${f##*/}; case " $* " in *" $n "*) ;; *) rm -rf "$f" ;; esac
  done
}
u=usr/lib/systemd/system
keep $u/sysinit.target.wants systemd-journald.service systemd-tmpfiles-setup.service systemd-udev-trigger.service \
  systemd-udevd.service
keep $u/sockets.target.wants systemd-journald-dev-log.socket systemd-journald.socket systemd-udevd-control.socket \
  systemd-udevd-kernel.socket
ln -s ../dbus.socket $u/sockets.target.wants/ # started by whoever asks: loginctl, hostnamectl, timedatectl
keep $u/multi-user.target.wants getty.target; keep $u/timers.target.wants systemd-tmpfiles-clean.timer
for d in graphical getty local-fs rescue; do keep $u/$d.target.wants; done
rm -rf $u/ssh.* $u/ssh@* $u/sshd* $u/rescue-ssh.target $u/qemu-guest-agent.service $u/nftables.service $u/e2scrub* \
  $u/fstrim.timer $u/systemd-journald-audit.socket $u/systemd-remount-fs.service \
  $u/systemd-udev-load-credentials.service $u/tmp.mount
# Building a system call filter for each of them takes longer than all that they do.
sed -i -E '/^(SystemCall|IPAddress|MemoryDeny|Restrict(Namespaces|Realtime|SUIDSGID|AddressFamilies)|LockPersonality|ProtectClock|WatchdogSec)/d' \
  $u/systemd-{journald,udevd,logind,hostnamed,timedated,localed}.service
# Devices that nothing waits for are not asked about: of the terminals only the serial ones are.
coldplug='udevadm trigger --type=devices --action=add'
devices="$(printf ' --subsystem-match=%s' block net virtio-ports virtio pci input usb)"
terminals='--subsystem-match=tty --sysname-match=ttyS[0-9] --sysname-match=hvc[0-9]'
sed -i "s#^ExecStart=.*#ExecStart=-$coldplug$devices\nExecStart=-$coldplug $terminals#" \
  $u/systemd-udev-trigger.service
keep usr/lib/systemd/system-generators systemd-fstab-generator systemd-getty-generator
rm -rf usr/lib/systemd/system-environment-generators usr/lib/systemd/system-preset usr/lib/systemd/network \
  usr/lib/sysusers.d
keep usr/lib/tmpfiles.d systemd.conf systemd-tmp.conf tmp.conf var.conf sudo.conf
sed -i -E '/tpm2|private|coredump|^a/d' usr/lib/tmpfiles.d/systemd.conf
keep usr/lib/udev/rules.d 50-udev-default.rules 60-block.rules 60-persistent-storage.rules 60-serial.rules \
  75-net-description.rules 80-drivers.rules 99-systemd.rules
rm -rf usr/lib/sysctl.d usr/lib/modprobe.d/* usr/lib/environment.d usr/share/pam-configs var boot etc/init.d \
  etc/pam.d etc/cron* etc/kernel etc/sudoers* etc/default etc/systemd etc/runit etc/sv etc/ufw etc/apt etc/dpkg \
  etc/update-motd.d etc/logrotate.d etc/profile* etc/motd etc/issue* etc/os-release etc/debian_version etc/host* \
  etc/nftables.conf etc/ssh etc/udev/rules.d etc/bash.bashrc etc/qemu etc/binfmt.d etc/modules-load.d etc/sysctl.d \
  etc/tmpfiles.d etc/xdg etc/nsswitch.conf
rm -rf usr/lib/os-release usr/share/zoneinfo/posix
(cd $u; ls) > "$info/units"

mkdir -p usr/lib/modules; cp -r "$modules"/lib/modules/* usr/lib/modules/; chmod -R u+w usr/lib/modules
ldconfig -r .
# Files that name a group by number must name NixOS's.
for f in usr/sbin/unix_chkpwd usr/bin/chage usr/bin/expiry; do [ ! -e $f ] || { chgrp 318 $f; chmod 2755 $f; }; done
f=usr/lib/dbus-1.0/dbus-daemon-launch-helper; chgrp 4 $f; chmod 4750 $f
chgrp 0 usr/bin/ssh-agent; chmod 755 usr/bin/ssh-agent
for f in usr/bin/wall usr/bin/write; do [ ! -e $f ] || chmod 755 $f; done
# An empty password in what Debian's PAM modules ship would lock or open nothing here: /etc/pam.d is the configuration's.
rm -rf usr/share/pam

cd ..
mkfs.erofs --quiet -T1 -x-1 img r >&2
mv img "$out"
