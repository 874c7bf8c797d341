#!/bin/sh
# Links the files of this generation into the home, and takes away those of the one before. $HOME is the unit's.
set -eu
new=@out@/home-files
roots=$HOME/.local/state/home-manager/gcroots
echo "Starting Home Manager activation"

cd "$new"
find . ! -type d | sed 's#^\./##' | {
  clobbered=
  while IFS= read -r name; do
    target=$HOME/$name
    [ -e "$target" ] || continue
    case $(readlink "$target" || :) in /nix/store/*-home-manager-generation/*) continue ;; esac
    if [ -n "${HOME_MANAGER_BACKUP_EXT:-}" ]; then
      mv "$target" "$target.$HOME_MANAGER_BACKUP_EXT"
    else
      echo "Existing file '$target' would be clobbered" >&2
      clobbered=1
    fi
  done
  [ -z "$clobbered" ]
}
old=$(readlink "$roots/current-home" || :)
if [ -n "$old" ] && [ -d "$old/home-files" ]; then
  cd "$old/home-files"
  find . ! -type d | sed 's#^\./##' | while IFS= read -r name; do
    case $(readlink "$HOME/$name" || :) in
      "$old/home-files/$name") [ -e "$new/$name" ] || rm "$HOME/$name" ;;
    esac
  done
fi
cd "$new"
find . ! -type d | sed 's#^\./##' | while IFS= read -r name; do
  case $name in */*) [ -d "$HOME/${name%/*}" ] || mkdir -p "$HOME/${name%/*}" ;; esac
  ln -sfn "$new/$name" "$HOME/$name"
done
mkdir -p "$roots"
ln -sfn @out@ "$roots/current-home"
