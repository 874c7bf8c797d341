# Install secrets with values that nobody knows. Part of an activation script (bash, with coreutils)
# or of a unit's; `group` names the secrets that come and go together.
#
# A value is made once, and kept on the machine's disk, so that it is the same after a switch and a
# reboot. Whoever wants a particular value writes it there.
values=/var/lib/nixvm/secrets
installed=/run/nixvm/secrets-$group
status=0
kept=()
marks=()
real=()
again= # whether this has run since the machine booted
[[ ! -e $installed ]] || again=1

# A dry activation must not change anything.
if [[ ${NIXOS_ACTION-} == dry-activate ]]; then exit 0; fi

umask 077
[[ -d $values ]] || mkdir -p "$values"
[[ -d /run/nixvm ]] || mkdir -p /run/nixvm

make_value() { # name kind
  local bytes value
  [[ ! -s $values/$1 ]] || return 0
  bytes=$(od -An -v -tx1 -w64 -N64 /dev/urandom) && bytes=${bytes// /}
  if (( ${#bytes} != 128 )); then echo "nixvm: no random bytes for the secret $1"; status=1; return 1; fi
  case $2 in
    hash) value="\$6\$${bytes:0:16}\$${bytes:16:85}0" ;;
    base64) value=$(head -c 32 /dev/urandom | base64) ;;
    *) value=${bytes:0:64} ;;
  esac
  printf %s "$value" > "$values/$1"
}

parent() { # path
  [[ -d ${1%/*} ]] || (umask 026; mkdir -p "${1%/*}") # 0751: to be passed through, not listed
}

same() { # path path: whether both have the same bytes, NULs aside
  [[ -f $1 && -f $2 && $(< "$1") == "$(< "$2")" ]] 2> /dev/null
}

put() { # source path file mode owner group restart reload
  local source=$1 path=$2 file=$3 unit changed=
  parent "$file"
  same "$source" "$file" || changed=1
  if ! install -m "$4" -o "$5" -g "$6" -T "$source" "$file"; then
    echo "nixvm: the secret $file can't be given to $5:$6, mode $4; it is root's now"
    install -m 0400 -T "$source" "$file"
    status=1
  fi
  kept+=("$file")
  if [[ $path != "$file" ]]; then
    parent "$path"
    ln -sfn "$file" "$path"
    kept+=("$path")
  fi
  # As sops-nix asks for it. Not while booting, when nothing runs yet.
  [[ $changed && $again ]] || return 0
  if [[ ${NIXOS_ACTION-} ]]; then # part of a switch, which does it
    [[ -d /run/nixos ]] || mkdir -p /run/nixos
    for unit in $7; do echo "$unit" >> /run/nixos/activation-restart-list; done
    for unit in $8; do echo "$unit" >> /run/nixos/activation-reload-list; done
  elif [[ ${SOPS_RESTART_UNITS_VIA_SYSTEMCTL-} ]]; then # a unit of its own
    for unit in $7; do systemctl --no-block try-restart "$unit"; done
    for unit in $8; do systemctl --no-block try-reload-or-restart "$unit"; done
  fi
}

install_secret() { # name kind path file mode owner group restart reload
  make_value "$1" "$2" && put "$values/$1" "$3" "$4" "$5" "$6" "$7" "$8" "$9"
}

placeholder() { # name text
  if [[ -s $values/$1 && $2 ]]; then marks+=("$2"); real+=("$(< "$values/$1")"); fi
}

render_template() { # template path file mode owner group restart reload
  local text i
  text=$(< "$1")
  for i in "${!marks[@]}"; do text=${text//"${marks[i]}"/"${real[i]}"}; done
  printf '%s\n' "$text" > "$installed.template"
  put "$installed.template" "${@:2}"
  rm -f "$installed.template"
  marks=() real=()
}

finish() { # what an earlier generation had and this one has not is gone, as with the real modules
  local old new
  if [[ -f $installed ]]; then
    while IFS= read -r old; do
      for new in "${kept[@]}"; do [[ $old != "$new" ]] || continue 2; done
      rm -f "$old"
    done < "$installed"
  fi
  if (( ${#kept[@]} )); then printf '%s\n' "${kept[@]}"; fi > "$installed"
  exit "$status"
}
