"""Waits for TCP ports and unix sockets, by what bash and /proc know: no `nc` is needed."""

from __future__ import annotations

import ipaddress
import shlex

from pytest_nixvm.guest.waits import GuestWait

# --- TCP ports --------------------------------------------------------------------------------

# A try to an address that drops packets takes minutes; it is no event that would be missed.
_CONNECT_HERE = r"""
connects() { local fd; { exec {fd}<>"/dev/tcp/$address/$port"; } 2>/dev/null && exec {fd}>&-; }
"""
_CONNECT_AWAY = r"""
connects() { timeout 2 "$BASH" -c '<>"/dev/tcp/$0/$1"' "$address" "$port" 2>/dev/null; }
"""
_OPEN = r"""
happened() { connects; }
"""
# A server should not be called twenty times a second only to see whether it has gone: the list of
# listening sockets tells, and a call only what that has changed, or once a second.
_CLOSED = r"""
printf -v hex '%04X' "$port"
last=none
calls=0
happened() {
  local lines=() more=() line found=
  { mapfile -t lines </proc/net/tcp; mapfile -t more </proc/net/tcp6; } 2>/dev/null
  for line in "${lines[@]}" "${more[@]}"; do
    [[ $line == *": "*":$hex "*" 0A "* ]] && found+="${line%% 0A *};"
  done
  if [[ $found && $found == "$last" ]] && ((++calls % 20)); then return 1; fi
  last=$found
  ! connects
}
"""
_PORT_LOOK = r"""
said=$(timeout 5 "$BASH" -c '<>"/dev/tcp/$0/$1"' "$address" "$port" 2>&1)
case $? in
  0) echo "Something answers on $address port $port." ;;
  124) echo "Nothing answers on $address port $port: no connection within 5 s." ;;
  *)
    said=${said##*connect: }
    said=${said%%$'\n'*}
    said=${said##*: }
    echo "Nothing answers on $address port $port: $said."
    # Whatever listens here has nothing to do with it.
    [[ $said == 'Connection refused' ]] || exit 0
    ;;
esac
if type -P ss >/dev/null && listening=$(ss -ltnp 2>/dev/null); then
  echo 'What listens in the guest (ss -ltnp):'
  printf '%s\n' "$listening"
else
  echo 'What listens in the guest (/proc/net/tcp):'
  while read -r _ where _ state _; do
    [[ $state == 0A ]] || continue
    hex=${where%:*}
    case $hex in
      00000000) name=0.0.0.0 ;;
      00000000000000000000000000000000) name='[::]' ;;
      00000000000000000000000001000000) name='[::1]' ;;
      ????????) name=$((16#${hex:6:2})).$((16#${hex:4:2})).$((16#${hex:2:2})).$((16#${hex:0:2})) ;;
      *) name="[$hex]" ;;
    esac
    echo "$name:$((16#${where##*:}))"
  done < <(cat /proc/net/tcp /proc/net/tcp6 2>/dev/null)
fi
"""


def port_wait(port: int, address: str, *, closed: bool = False) -> GuestWait:
    """Wait until something, or nothing, takes connections on a TCP port, as seen in the guest."""
    port = int(port)
    if not 0 < port < 65536:
        raise ValueError(f"{port} is no TCP port: they are 1 to 65535")
    values = f"address={shlex.quote(address)} port={port}\n"
    connect = _CONNECT_HERE if _is_loopback(address) else _CONNECT_AWAY
    return GuestWait(
        f"port {port} of {address} to {'close' if closed else 'open'}",
        values + connect.strip() + "\n" + (_CLOSED if closed else _OPEN).strip(),
        values + _PORT_LOOK,
    )


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


# --- unix sockets -----------------------------------------------------------------------------

# bash can't connect to one, but the kernel lists them, with the path as it was bound. A service
# with a network namespace of its own has a list of its own, which is looked at now and then.
_LIST = r"""
sockets() {
  local flags type path
  while read -r _ _ _ flags type _ _ path; do
    [[ $path ]] || continue
    if [[ $kind == datagram ]]; then
      [[ $type == 0002 ]] || continue
    else
      [[ $type != 0002 && $flags == 00010000 ]] || continue
    fi
    "$1" "$path" && return 0
  done <"$2"
  return 1
}
is_it() {
  [[ $1 == "$address" ]] && return 0
  [[ ${1##*/} == "${address##*/}" && $address == /* && $1 -ef $address ]]
}
"""
_UNIX = r"""
calls=0
happened() {
  local words list
  eval "words=($name)" || exit 2
  ((${#words[@]} == 1)) || refuse "$name is ${#words[@]} words to the shell, and not one"
  address=${words[0]}
  [[ $address == @* || -S $address ]] || return 1
  sockets is_it /proc/net/unix && return 0
  [[ $address != @* ]] && ((calls++ % 20 == 0)) || return 1
  for list in /proc/[0-9]*/net/unix; do
    [[ ${list%/net/unix}/ns/net -ef /proc/self/ns/net ]] && continue
    { sockets is_it "$list"; } 2>/dev/null && return 0
  done
  return 1
}
"""
_UNIX_LOOK = r"""
eval "address=($name)"
if [[ $address == @* ]]; then :
elif [[ -S $address ]] && (kind=$other; sockets is_it /proc/net/unix); then
  echo "$address is open, but it is a $other socket (is_datagram of the verb tells which)."
elif [[ -S $address ]]; then echo "$address is a socket, but nobody listens on it any more."
elif [[ -e $address ]]; then echo "$address is not a socket:"; ls -ld -- "$address"
else echo "There is no $address."
fi
show() { printf '  %s\n' "$1"; return 1; }
if [[ $kind == datagram ]]; then echo 'The datagram sockets (/proc/net/unix):'
else echo 'The sockets that listen (/proc/net/unix):'
fi
sockets show /proc/net/unix | sort -u
"""


def unix_socket_wait(address: str, *, datagram: bool = False) -> GuestWait:
    """Wait until somebody listens on a unix socket. `address` is shell text, or `@` and a name."""
    if not address:
        raise ValueError("a unix socket needs a path")
    kind, other = ("datagram", "stream") if datagram else ("stream", "datagram")
    values = f"name={shlex.quote(address)} kind={kind} other={other}\n{_LIST.strip()}\n"
    return GuestWait(
        f"the {'datagram' if datagram else 'unix'} socket {address}",
        values + _UNIX.strip(),
        values + _UNIX_LOOK.strip(),
    )
