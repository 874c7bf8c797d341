# bin/switch-to-configuration: what nixpkgs' switch-to-configuration-ng does, in its words and with its exit statuses.
# In: OUT (the toplevel), DISTRO_ID, PRE_SWITCH_CHECK, INSTALL_BOOTLOADER, PLANNER (switch.awk). Processes are dear here.
export PATH=/usr/sbin:/usr/bin LC_ALL=C.UTF-8 SYSTEMD_PAGER= SYSTEMD_COLORS=0
say() { printf '%s\n' "$1" >&2; }
listed() { local all=$*; say "$text ${all// /, }"; } # the units, behind $text
sorted() { # LIST UNIT…: into the list, in the order in which they are told
  local name names=() i
  for name in "${@:2}"; do
    for ((i = ${#names[@]}; i > 0; i--)); do
      [[ ${names[i - 1],,} > ${name,,} ]] || break
      names[i]=${names[i - 1]}
    done
    names[i]=$name
  done
  printf -v "$1" %s "${names[*]}"
}

action=${1-}
case $action in
  switch | boot | test | dry-activate | check) ;;
  *)
    say "Usage: ${0##*/} [check|switch|boot|test|dry-activate]
check:        run pre-switch checks and exit
switch:       make the configuration the boot default and activate now
boot:         make the configuration the boot default
test:         activate the configuration, but don't make it the boot default
dry-activate: show what would be done if this configuration were activated
"
    exit 1 ;;
esac
if ((EUID != 0)); then say "Error: ${0##*/} must be run as the root user"; exit 1; fi
export NIXOS_ACTION=$action
if [ ! -f /etc/NIXOS ]; then say "This is not a NixOS installation!"; exit 1; fi

[ -d /run/nixos ] || mkdir -m 755 /run/nixos
exec 9>> /run/nixos/switch-to-configuration.lock
flock --nonblock 9 || { say "Could not acquire lock"; exit 11; } # -ng ends with errno, EWOULDBLOCK

if [ "${NIXOS_NO_CHECK-}" != 1 ] && ! "$PRE_SWITCH_CHECK" "$OUT" "$action" 9>&-; then
  say "Pre-switch checks failed"
  exit 1
fi
[ "$action" != check ] || exit 0
case $action in switch | boot)
  # As there, the command is split at blanks.
  if ! $INSTALL_BOOTLOADER "$OUT" 9>&-; then say "Failed to install bootloader"; exit 1; fi ;;
esac
[ "${NIXOS_NO_SYNC-}" = 1 ] || sync -f /nix/store
[ "$action" != boot ] || exit 0

content() { [ -r "$1" ] && printf -v "$2" %s "$(< "$1")"; }
ours= theirs=
content /run/current-system/init-interface-version ours
content "$OUT/init-interface-version" theirs
if [ "$ours" != "$theirs" ]; then
  say "Warning: the new NixOS configuration has an ‘init’ that is
incompatible with the current configuration.  The new configuration
won't take effect until you reboot the system.
"
  exit 100
fi
trap '' HUP PIPE

# -- what is to be done -------------------------------------------------------

old=/etc/systemd/system new=$OUT/etc/systemd/system
files() { # SIDE DIRECTORY: its units and their drop-ins
  local path name
  for path in "$2"/*; do
    name=${path##*/}
    case $name in
      *.d)
        for name in "$path"/*.conf; do
          # A drop-in that is masked is none.
          if [ -e "$name" ] && ! [ "$name" -ef /dev/null ]; then path=${path##*/}; echo "$1-in ${path%.d} $name"; path=$2/$path; fi
        done ;;
      *.wants | *.requires | *.upholds) ;;
      *.*) if [ "$path" -ef /dev/null ]; then echo "$1-masked $name"; elif [ -e "$path" ]; then echo "$1 $name"; fi ;;
    esac
  done
}
states() { systemctl list-units --full --plain --no-legend --no-pager; } # without those that only follow another
declare -A lists=() before=()
plan() { # with what comes on stdin besides
  local list names
  while read -r list names; do lists[$list]=$names; done < <({
    files old "$old"
    files new "$new"
    while read -r name _ active sub _; do
      [ "$active" = inactive ] || echo "unit $name $active $sub"
    done <<< "$units"
    cat
  } | awk -v old="$old" -v new="$new" -v fstabs="$1" -v all="${STC_DISPLAY_ALL_UNITS-}" -f "$PLANNER")
}
recorded() { # what a run that was interrupted has left to do
  local list name
  for list in start restart reload; do
    [ ! -s /run/nixos/$list-list ] || while read -r name; do echo "recorded $list $name"; done < /run/nixos/$list-list
  done
}
units=$(states)
while read -r name _ active _; do [ "$active" = inactive ] || before[$name]=1; done <<< "$units"
plan 1 < <(recorded)

# system.conf is a path of its own in NixOS: another one is another configuration of systemd.
content /etc/systemd/system.conf ours; content "$OUT/etc/systemd/system.conf" theirs
reexecute=; [ "$ours" = "$theirs" ] || reexecute=1

by_activation() { # PREFIX: the requests of activation scripts, as input for the plan, and the lists so far
  local name list
  if [ -e "/run/nixos/$1-restart-list" ] || [ -e "/run/nixos/$1-reload-list" ]; then
    say "WARN: restarting or reloading systemd units from the activation script is deprecated and will be removed in NixOS 26.11."
  else
    return 1
  fi
  {
    for list in stop skip reload restart start; do for name in ${lists[$list]-}; do echo "recorded $list $name"; done; done
    [ ! -e "/run/nixos/$1-restart-list" ] || while read -r name; do echo "activation $name"; done < "/run/nixos/$1-restart-list"
    [ ! -e "/run/nixos/$1-reload-list" ] || while read -r name; do
      case " ${lists[restart]-} ${lists[stop]-} " in *" $name "*) continue ;; esac
      [ -z "${before[$name]-}" ] || echo "recorded reload $name"
    done < "/run/nixos/$1-reload-list"
  } > /run/nixos/requests
  rm -f "/run/nixos/$1-restart-list" "/run/nixos/$1-reload-list"
}

set -f # from here on names stand in lists
if [ "$action" = dry-activate ]; then
  text="would stop the following units:"; [ -z "${lists[stop-shown]}" ] || listed ${lists[stop-shown]}
  text="would NOT stop the following changed units:"; [ -z "${lists[skip]}" ] || listed ${lists[skip]}
  say "would activate the configuration..."
  "$OUT/dry-activate" "$OUT" 9>&-
  if by_activation dry-activation; then set +f; plan 0 < /run/nixos/requests; set -f; fi
  [ -z "$reexecute" ] || say "would restart systemd"
  text="would reload the following units:"; [ -z "${lists[reload]}" ] || listed ${lists[reload]}
  text="would restart the following units:"; [ -z "${lists[restart]}" ] || listed ${lists[restart]}
  text="would start the following units:"; [ -z "${lists[start-shown]}" ] || listed ${lists[start-shown]}
  exit 0
fi

# -- doing it -----------------------------------------------------------------

status=0
failures=()
job() { # VERB UNIT…: waits for them; what fails is told at the end, as there
  local verb=$1 line unit
  while read -r line; do
    case $line in
      *"canceled."*) ;;
      "Job for "* | "A dependency job for "*)
        unit=${line#*ob for }; unit=${unit%% *}
        failures+=("Failed to $verb $unit") ;;
      "Failed to "* | *"is not active, cannot reload."*) if [ "$verb" != stop ]; then say "$line"; status=4; fi ;;
    esac
  done < <(systemctl --no-pager --no-ask-password "$@" 9>&- 2>&1)
}
record() { local list; for list in "$@"; do printf '%s\n' ${lists[$list]} > /run/nixos/$list-list; done; }
record start restart reload

if [ -n "${lists[stop]}" ]; then
  text="stopping the following units:"; [ -z "${lists[stop-shown]}" ] || listed ${lists[stop-shown]}
  job stop ${lists[stop]}
fi
text="NOT restarting the following changed units:"; [ -z "${lists[skip]}" ] || listed ${lists[skip]}

say "activating the configuration..."
# What is removed from /etc must be compared first, hence the plan above.
if [ -e "$OUT/activate" ] && ! "$OUT/activate" "$OUT" 9>&-; then say "Failed to run activate script"; status=2; fi
if by_activation activation; then
  set +f; old=$new; plan 0 < /run/nixos/requests; set -f
  record start restart reload
fi

if [ -n "$reexecute" ]; then say "restarting systemd..."; systemctl daemon-reexec 9>&-; fi
systemctl reset-failed 9>&-
systemctl daemon-reload 9>&-
say "restarting sysinit-reactivation.target"
job restart sysinit-reactivation.target

if [ -n "${lists[reload]}" ]; then
  # What has ended meanwhile can't be reloaded, it is started; not so the mounts.
  reload=
  set -- ${lists[reload]}
  while read -r state; do
    case $state in
      active | activating | reloading) reload+="${reload:+ }$1" ;;
      *) if [ -e "$OUT/etc/systemd/system/$1" ]; then lists[start]+=" $1"; lists[start-shown]+=" $1"; fi ;;
    esac
    shift
  done < <(systemctl is-active "$@" 9>&-)
  text="reloading the following units:"
  if [ -n "$reload" ]; then listed $reload; job reload $reload; fi
  rm -f /run/nixos/reload-list
fi
if [ -n "${lists[restart]}" ]; then
  text="restarting the following units:"; listed ${lists[restart]}
  job restart ${lists[restart]}
fi
text="starting the following units:"; [ -z "${lists[start-shown]}" ] || listed ${lists[start-shown]}
[ -z "${lists[start]}" ] || job start ${lists[start]}
rm -f /run/nixos/{start,restart,reload}-list /run/nixos/requests

for failure in "${failures[@]}"; do say "$failure"; status=4; done

# -- what has come of it ------------------------------------------------------

# Units may yet fail, or be started again by systemd: until it has been quiet for a quarter of a second.
exec 8<> <(:)
for ((wait = 0; wait < 360; wait++)); do
  read -r -t 0.25 -u 8
  units=$(states)
  quiet=1
  while read -r name _ active _ ; do case $active in activating | deactivating | reloading) quiet= ;; esac; done <<< "$units"
  [ -z "$quiet" ] || break
  [ "$units" != "${earlier-}" ] || break
  earlier=$units
done
failed= fresh=
while read -r name _ active sub _; do
  [ -n "$name" ] && [ "$active" != inactive ] || continue
  if [ "$active" = failed ]; then failed+=" $name"; continue; fi
  case $name:$sub in
    *.service:auto-restart)
      if [ "$(systemctl show --property=ExecMainStatus --value -- "$name")" != 0 ]; then failed+=" $name"; continue; fi ;;
  esac
  case $name in *.scope) continue ;; esac
  [ -n "${before[$name]-}" ] || fresh+=" $name"
done <<< "$units"
sorted fresh $fresh; sorted failed $failed
text="the following new units were started:"; [ -z "$fresh" ] || listed $fresh
if [ -n "$failed" ]; then
  text="warning: the following units failed:"; listed $failed
  systemctl status --no-pager --full -- $failed 9>&-
  status=4
fi
exit "$status"
