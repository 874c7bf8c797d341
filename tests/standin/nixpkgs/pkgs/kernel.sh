# Debian's kernel, and as modules what a QEMU guest, a firewall and a test may load. In: deb, names, vmlinux (a script).
# `image` is the unpacked kernel, which QEMU starts through PVH: under emulation unpacking takes seconds.
mkdir k
dpkg-deb --fsys-tarfile "$deb" | tar -x -C k
[ -d k/lib ] || ln -s usr/lib k/lib
version=$(ls k/lib/modules)
source=k/lib/modules/$version
target=$modules/lib/modules/$version
find k/ -name '*.ko.xz' -exec xz -d {} +
find k/ -name '*.ko.zst' -exec zstd -q -d --rm {} +
depmod -b k "$version"
mkdir -p "$target" "$out"
for module in $names; do
  modprobe -d "$PWD/k" -S "$version" --show-depends "$module" 2>/dev/null || true
done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' > files
while read -r file; do
  name=${file##*/lib/modules/"$version"/}
  mkdir -p "$target/${name%/*}"
  cp "$source/$name" "$target/$name"
done < files
cp $source/modules.builtin* $source/modules.order "$target"
depmod -b "$modules" "$version"
cp k/boot/vmlinuz-* "$out/bzImage"
python3 "$vmlinux" "$out/bzImage" "$out/image" || ln -s bzImage "$out/image"
printf %s "$version" > "$out/version"
