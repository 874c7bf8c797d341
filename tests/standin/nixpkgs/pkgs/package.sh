# One package: Debian's, with those of its dependencies that the base lacks, as a tree with usr/, etc/ and bin/.
umask 022
mkdir -p $out/usr/bin $out/bin
for deb in $debs; do
  dpkg-deb --fsys-tarfile "$deb" | tar -x --no-same-owner --no-same-permissions -C $out --exclude='./var/*' \
    --exclude='./usr/share/'{doc,man,locale,info,lintian,bug}'/*'
done
cd $out
chmod -R u+w .
for d in bin sbin lib; do # what is not under /usr yet
  [ $d = bin ] && [ -z "$(ls bin)" ] && continue
  [ ! -d $d ] || { mkdir -p usr/$d; cp -a $d/. usr/$d/; rm -rf $d; }
done
mkdir -p bin nix-support
for link in $links; do ln -sf "${link#*=}" "usr/bin/${link%%=*}"; done
for f in usr/bin/* usr/sbin/* usr/games/*; do
  [ ! -e "$f" ] && [ ! -L "$f" ] || ln -s "/$f" "bin/${f##*/}"
done
touch nix-support/standin-layer
