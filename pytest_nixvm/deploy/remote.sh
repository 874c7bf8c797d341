# What runs on a host that is deployed to: bash remote.sh VERB…, as root, from a file of its own.
#
# `run` is the one actor. It is a transient unit, which needs no connection: it activates the new
# system, waits to be told that the host is well, and goes back to the old one if nobody does, for
# whatever reason. Until then the boot default is the old generation: a power cut brings that back.
set -u
export LC_ALL=C.UTF-8 SYSTEMD_COLORS=0 SYSTEMD_PAGER=
umask 077

root=${NIXVM_DEPLOY_ROOT-} # for tests
place=$root/run/nixvm-deploy
profile=$root/nix/var/nix/profiles/system
current=$root/run/current-system
roots=$root/nix/var/nix/gcroots
unit=nixvm-deploy.service
if [ -z "$root" ]; then
  PATH=/run/current-system/sw/bin:/run/wrappers/bin:$PATH:/usr/sbin:/usr/bin:/sbin:/bin
fi

say() { printf 'nixvm deploy: %s\n' "$*"; }
put() { printf '%s\n' "$2" > "$place/.$1" && mv -f "$place/.$1" "$place/$1"; } # whole or not at all
get() { if [ -r "$place/$1" ]; then printf %s "$(< "$place/$1")"; fi; }
running() { readlink -f -- "$current"; }
uptime() { local up; read -r up _ < /proc/uptime; printf %s "${up%.*}"; } # no clock is set in it
failed_units() { # also those that fail time and again; an error where systemd does not answer
  local list name sub
  list=$(systemctl list-units --state=failed,auto-restart --plain --no-legend --full --no-pager) || return
  while read -r name _ _ sub _; do
    [ -n "$name" ] || continue
    # As switch-to-configuration has it: one that ended well is just started again.
    if [ "$sub" = auto-restart ] &&
      [ "$(systemctl show --property=ExecMainStatus --value -- "$name")" = 0 ]; then continue; fi
    printf '%s\n' "$name"
  done <<< "$list" | sort
}
blamed() { # units of which the activation says that they failed
  sed -n 's/^warning: the following units failed: //p
    s/^Failed to [a-z]* \([^ ]*\.[a-z]*\).*/\1/p
    s/^warning: user activation for \([^ ]*\) failed.*/activation-of-user-\1/p' "$place/output" |
    tr -s ', ' '\n'
}
new_of() { sort -u | comm -13 "$place/before" -; }
busy() {
  local try
  for try in {1..10}; do
    case $(systemctl is-active "$unit" 2> /dev/null) in
      active | activating | deactivating | reloading) return 0 ;;
      ?*) return 1 ;;
    esac
    sleep 0.5 # systemd does not answer while it executes itself anew
  done
  return 1
}

preflight() {
  local link
  echo "machine=$(uname -m)"
  if [ -e "$root/etc/NIXOS" ] || grep -Eqsx 'ID="?nixos"?' "$root/etc/os-release"; then
    [ ! -x "$current/bin/switch-to-configuration" ] || echo nixos=yes
  fi
  if command -v systemd-run > /dev/null; then echo systemd=yes; fi
  if command -v nix-env > /dev/null && command -v nix-store > /dev/null; then echo nix=yes; fi
  if busy; then echo busy=yes; fi
  echo "current=$(running)"
  echo "profile=$(readlink -f -- "$profile")"
  link=$(readlink -- "$profile")
  link=${link##*/}
  link=${link#system-}
  echo "generation=${link%-link}"
  echo "space=$(df -Pk -- "$root/nix/store" | { read -r _; read -r _ _ _ free _; echo "$free"; })"
  echo "filesystem=$(stat -fc %T -- "$root/nix/store")"
}

missing() { # which of the store paths on stdin are not in the store
  local paths
  while mapfile -t -n 5000 paths && ((${#paths[@]})); do
    nix-store --check-validity --print-invalid "${paths[@]}" || return
  done
}

root_for() { # PATH: safe from garbage collection before it has arrived, and while it is tried
  mkdir -p -- "$roots" && ln -sfn -- "$1" "$roots/nixvm-deploy"
}
release() { rm -f -- "$roots/nixvm-deploy" "$roots/nixvm-deploy-old"; }

start() { # MODE NEW SECONDS-TO-ACTIVATE SECONDS-TO-CONFIRM REASON ID
  local mode=$1 new=$2 bash
  exec 9>> "$place.lock"
  flock --nonblock 9 || { say "another deploy has begun" >&2; return 3; }
  if busy; then say "another deploy is under way" >&2; return 3; fi
  if [ -n "${6-}" ] && grep -qsxF -- "$6" "$place.off"; then say "it was called off" >&2; return 3; fi
  root_for "$new" # another client may have had the root for its own
  [ -x "$new/bin/switch-to-configuration" ] || { say "$new has not arrived" >&2; return 1; }
  rm -rf -- "$place" && mkdir -- "$place" || return
  cp -- "$0" "$place/job" && : > "$place/output" || return
  put id "${6-}"
  put old "$(running)"
  put new "$new"
  put profile "$(readlink -- "$profile")"
  failed_units > "$place/before" || return
  put state starting
  ln -sfn -- "$(get old)" "$roots/nixvm-deploy-old"
  [ -z "$5" ] || say "forced, for this reason: $5" > "$place/forced"
  bash=$(readlink -f -- "$BASH") # not of current-system, which changes
  systemd-run --quiet --collect --no-ask-password --unit="$unit" --service-type=exec \
    --description="Deploys $new" -p "ExecStopPost=$bash $place/job stopped" \
    -p TimeoutStopSec=1800 -p OOMScoreAdjust=-900 \
    "$bash" "$place/job" run "$mode" "$new" "$3" "$4" 9>&-
}

apply() { # TOPLEVEL ACTION SECONDS: its exit status, 124 if it did not end in time
  local pid end status
  # A group of its own: what it has begun must not go on beside the switch back.
  setsid "$1/bin/switch-to-configuration" "$2" >> "$place/output" 2>&1 < /dev/null &
  pid=$!
  end=$(($(uptime) + $3))
  while kill -0 "$pid" 2> /dev/null; do
    if [ -e "$place/abort" ] && [ "$1" = "$(get new)" ] && ((end > $(uptime) + 30)); then
      end=$(($(uptime) + 30)) # it is better to let a switch come to its end
    fi
    if (($(uptime) >= end)); then
      kill -- "-$pid" 2> /dev/null
      sleep 5
      kill -9 -- "-$pid" 2> /dev/null
      wait "$pid" 2> /dev/null
      return 124
    fi
    sleep 0.2
  done
  wait "$pid"
}

finish() { put state "$1"; say "$1${2:+: $2}"; }

overtaken() { # somebody else has switched the host meanwhile
  local now
  now=$(running)
  [ "$now" != "$(get old)" ] && [ "$now" != "$(get new)" ] && [ -x "$now/bin/switch-to-configuration" ]
}

back() { # REASON
  local old status=1 try=0 end
  export NIXOS_NO_CHECK=1 # what ran is fit to run
  old=$(get old)
  [ -e "$place/reason" ] || put reason "$1"
  say "going back to $old: $1"
  put state going-back
  if [ -e "$place/committing" ]; then # the boot default is, or may be, the new one
    ln -sfn -- "$(get profile)" "$profile.nixvm"
    if [ -e "$profile.nixvm" ]; then
      mv -fT -- "$profile.nixvm" "$profile"
    else # its generation was deleted meanwhile
      rm -f -- "$profile.nixvm"
      nix-env -p "$profile" --set "$old" >> "$place/output" 2>&1
    fi
    if ! apply "$(readlink -f -- "$profile")" boot 600; then
      say "the boot loader could not be put back"
      put loader bad
    fi
  fi
  case $(systemctl is-system-running 2> /dev/null) in
    stopping) finish rolled-back "the host is shutting down, and boots the old generation"; return ;;
  esac
  end=$(($(uptime) + 500))
  while :; do # with all its tries within TimeoutStopSec=, which is no time to be killed at
    if overtaken; then finish overtaken "the host was switched to $(running) meanwhile"; return; fi
    if [ "$(running)" = "$old" ] && [ -e "$place/untouched" ]; then status=0; break; fi
    apply "$old" test 600
    status=$?
    case $status in
      0 | 4 | 124) break ;; # one that hung would hang again
      11) (($(uptime) < end)) || break ;; # another switch has the lock
      *) ((++try < 3 && $(uptime) < end)) || break ;;
    esac
    sleep 2
  done
  if [ "$(running)" = "$old" ] && [[ $status == [04] ]]; then
    finish rolled-back "$1"
  else
    finish rollback-failed "exit status $status; a reboot brings the old generation back"
  fi
}

commit() { # NEW
  put state committing
  put committing yes
  nix-env -p "$profile" --set "$1" >> "$place/output" 2>&1 || { back "nix-env --set failed"; return 1; }
  apply "$1" boot 600 || { back "the boot loader could not be installed"; return 1; }
  [ ! -e "$place/abort" ] || say "asked to go back when it was confirmed already"
  finish committed "$1" # first: who finds `committing` and no end goes back, boot default and all
  rm -f -- "$place/committing"
}

run() { # MODE NEW SECONDS-TO-ACTIVATE SECONDS-TO-CONFIRM
  local mode=$1 new=$2 status end fresh
  [ ! -e "$place/forced" ] || cat "$place/forced"
  if [ -e "$place/abort" ]; then
    put untouched yes
    back "$(get abort)"
    return 1
  fi
  if [ "$mode" = boot ]; then
    put untouched yes
    commit "$new"
    return
  fi
  say "activating $new, over $(get old)"
  put state activating
  apply "$new" test "$3"
  status=$?
  cat "$place/output" # the journal has it as well
  case $status in
    0) ;;
    4) # also where its script failed before, or only units that had failed already
      fresh=$({ failed_units; blamed; } | new_of)
      if grep -q '^Failed to run activate script' "$place/output"; then
        back "the activation script failed${fresh:+, and units: ${fresh//$'\n'/ }}"
        return 1
      fi
      if [ -n "$fresh" ]; then back "units failed: ${fresh//$'\n'/ }"; return 1; fi
      if [ ! -s "$place/before" ]; then back "the activation says that something failed"; return 1; fi ;;
    100)
      put untouched yes
      back "it can't be activated in a running system, only booted"
      return 1 ;;
    124) back "the activation did not end in time"; return 1 ;;
    *) # 1 may come before anything was done, or when units are stopped already
      if [ "$(running)" = "$(get old)" ] &&
        grep -Eqi '^(pre-switch check|could not (open|acquire) lock)' "$place/output"; then
        put untouched yes
        back "the new system refused to be activated, exit status $status"
      else
        back "the activation failed, exit status $status"
      fi
      return 1 ;;
  esac
  put state waiting
  say "activated; waiting $4 s to be told that the host is well"
  end=$(($(uptime) + $4))
  while :; do
    if [ -e "$place/abort" ]; then back "$(get abort)"; return 1; fi
    if [ "$(get confirm)" = "$new" ]; then break; fi
    if (($(uptime) >= end)); then back "nobody confirmed within $4 s that the host is well"; return 1; fi
    sleep 0.2
  done
  if [ "$(running)" != "$new" ]; then back "$(running) runs, which is not what was confirmed"; return 1; fi
  commit "$new"
}

stopped() { # by systemd, when `run` has ended, however that was
  case $(get state) in
    committed | rolled-back | rollback-failed | overtaken) ;;
    *) back "the deploy was ended before it was confirmed" ;;
  esac
  release
}

status() {
  local name value units
  if busy; then echo busy=yes; fi # before the state: an end that is seen is one
  for name in id state reason loader; do
    value=$(get "$name")
    echo "$name=${value//$'\n'/ }"
  done
  echo "current=$(running)"
  echo "profile=$(readlink -f -- "$profile")"
  if units=$(failed_units); then
    [ ! -e "$place/before" ] || new_of < <(printf %s "${units:+$units$'\n'}") |
      while read -r name; do echo "failed=$name"; done
  else
    echo silent=yes
  fi
  name=$(readlink -- "$profile")
  name=${name##*/}
  name=${name#system-}
  echo "generation=${name%-link}"
}

confirm() { # NEW ID
  [ "$(get state) $(get new) $(get id)" = "waiting $1 ${2-}" ] || { echo "state is $(get state)" >&2; return 3; }
  put confirm "$1"
}

abort() { # REASON ID: also if what starts it has not arrived yet, or never will
  exec 9>> "$place.lock"
  flock --timeout 15 9 || { say "another deploy begins" >&2; return 1; }
  if [ -d "$place" ] && [ "$(get id)" = "${2-}" ]; then put abort "$1"; else echo "${2-}" >> "$place.off"; fi
}

main() {
  case ${1-} in
    preflight | missing | root_for | start | run | stopped | status | confirm | abort) "$@" ;;
    release) busy || release ;; # or they are another deploy's
    output) tail -n 60 "$place/output" ;;
    dry) "$2/bin/switch-to-configuration" dry-activate 2>&1 ;;
    requisites) nix-store --query --requisites "$(running)" ;;
    *) echo "what is ${1-}?" >&2; return 64 ;;
  esac
}
main "$@"
exit # all of it has been read by now
