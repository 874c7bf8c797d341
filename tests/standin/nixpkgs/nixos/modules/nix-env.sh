# bin/nix-env of the guest: the generations of a profile, in nix's words. No packages.
export PATH=/usr/sbin:/usr/bin
die() { echo "error: $1" >&2; exit 1; }
profile=/nix/var/nix/profiles/default do= argument=
while (($#)); do
  case $1 in
    -p | --profile) [ $# -ge 2 ] || die "flag '$1' requires 1 argument(s)"; profile=$2; shift 2 ;;
    --set) do=set; argument=${2-}; shift $(($# > 1 ? 2 : 1)) ;;
    -G | --switch-generation) do=generation; argument=${2-}; shift $(($# > 1 ? 2 : 1)) ;;
    --delete-generations) do=delete; shift; argument=$*; break ;;
    --rollback) do=rollback; shift ;;
    --list-generations) do=list; shift ;;
    --option) shift 3 ;;
    -v | --verbose | -Q | --quiet | --show-trace) shift ;;
    *) die "the stand-in's nix-env only knows --profile with --set, --rollback, --list-generations, --switch-generation, --delete-generations, not '$1'" ;;
  esac
done
mkdir -p "${profile%/*}"
exec 9>> "$profile.lock"; flock 9
numbers=() current=
for link in "$profile"-*-link; do
  number=${link#"$profile"-}; number=${number%-link}
  if [ -L "$link" ] && [[ $number =~ ^[0-9]+$ ]]; then numbers+=("$number"); fi
done
if ((${#numbers[@]})); then
  for ((i = 1; i < ${#numbers[@]}; i++)); do # there are few
    for ((j = i; j > 0 && numbers[j - 1] > numbers[j]; j--)); do
      k=${numbers[j]} numbers[j]=${numbers[j - 1]}; numbers[j - 1]=$k
    done
  done
fi
if [ -L "$profile" ]; then current=$(readlink "$profile"); current=${current##*/}; current=${current#"${profile##*/}"-}; current=${current%-link}; fi
to() { ln -sfn "${profile##*/}-$1-link" "$profile.new" && mv -fT "$profile.new" "$profile"; }
known() { local n; for n in "${numbers[@]}"; do [ "$n" != "$1" ] || return 0; done; return 1; }

case $do in
  set)
    [ -n "$argument" ] || die "exactly one derivation expected"
    argument=$(readlink -f -- "$argument") && [ -e "$argument" ] || die "path '$argument' does not exist"
    case $argument in /nix/store/?*) ;; *) die "'$argument' is not in the Nix store" ;; esac
    path=/nix/store/${argument#/nix/store/}
    newest=0; ((!${#numbers[@]})) || newest=${numbers[-1]}
    # The newest generation is taken again where it is the same.
    if ((newest)) && [ "$(readlink "$profile-$newest-link")" = "$path" ]; then to "$newest"; exit; fi
    ln -s "$path" "$profile-$((newest + 1))-link" && to $((newest + 1)) ;;
  rollback | generation)
    found=
    if [ $do = rollback ]; then
      for number in "${numbers[@]}"; do [ -z "$current" ] || ((number >= current)) || found=$number; done
      [ -n "$found" ] || die "no generation older than the current (${current:-0}) exists"
    else
      known "$argument" || die "profile version '$argument' does not exist"
      found=$argument
    fi
    echo "switching profile from version ${current:-0} to $found" >&2
    to "$found" ;;
  list)
    for number in "${numbers[@]}"; do
      when=$(stat -c %Y "$profile-$number-link")
      printf '%4d   %(%Y-%m-%d %H:%M:%S)T   %s\n' "$number" "$when" "$([ "$number" != "$current" ] || echo "(current)")"
    done ;;
  delete)
    for number in $argument; do
      if [ "$number" = old ]; then set -- "${numbers[@]}"; else known "$number" || continue; set -- "$number"; fi
      for number; do
        if [ "$number" = "$current" ]; then [ "$argument" = old ] || die "cannot delete current version of profile '$profile'"; continue; fi
        echo "removing profile version $number" >&2
        rm -f "$profile-$number-link"
      done
    done ;;
  *) die "no operation specified" ;;
esac
