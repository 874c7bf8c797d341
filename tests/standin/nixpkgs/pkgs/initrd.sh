# The part of the initrd that all machines share: busybox, the drivers of stage 1 in their order, and the script.
# Uncompressed: under emulation unpacking costs more than reading. In: kernel, modules, busybox, names, stage1.
version=$(cat "$kernel/version")
mkdir -p i/bin i/modules b
dpkg-deb --fsys-tarfile "$busybox" | tar -x -C b
cp "$(find b -path '*/bin/busybox' -type f)" i/bin/busybox
for module in $names; do
  modprobe -d "$modules" -S "$version" --show-depends "$module"
done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r file; do
  cp "$file" i/modules/
  echo "${file##*/}"
done > list
mv list i/modules/list
cp "$stage1" i/init
chmod 755 i/init
cd i
find . | LC_ALL=C sort | cpio -o -H newc -R 0:0 --quiet --reproducible > "$out"
