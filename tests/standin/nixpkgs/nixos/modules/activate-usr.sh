# Part of activation: the packages of this configuration lie over /usr. Stage 1 has seen to it at boot; here it is when
# switching. The new /usr is put over the one before, for what runs keeps its files open.
# In: systemConfig.
if [ -e /run/current-system ]; then
  have=$(< /run/current-system/usr-layers); want=$(< "$systemConfig/usr-layers")
  if [ "$have" != "$want" ]; then
    (
      cd /nix/.ro-store 2> /dev/null || cd /nix/store # relative names: the kernel takes a page of options
      layers=
      for path in $want; do layers+=:${path##*/}/usr; done
      if [ -n "$layers" ]; then busybox mount -t overlay -o "ro,lowerdir=../.standin-base/usr$layers" overlay /usr
      else busybox mount -o bind ../.standin-base/usr /usr; fi
    )
  fi
fi
