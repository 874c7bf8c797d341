"""Ports from outside: what the configuration opens is open, and nothing else is.

An open port is one of `networking.firewall` on which somebody listens. A port that is opened and on
which nobody listens is told, not counted: the service may start when it is needed. UDP has no
answer that would tell open from closed, so it is only compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pytest_nixvm.checks.base import Checked, and_more, finding
from pytest_nixvm.checks.sockets import Listener, Sockets, sockets

if TYPE_CHECKING:
    from pytest_nixvm.flake.declared import Firewall
    from pytest_nixvm.machine import Machine
    from pytest_nixvm.qemu.network import State

OPENS, STAYS_SHUT = 10.0, 3.0
"""Seconds for the answer of a port that should be open, and of one that should not."""
AT_ONCE = 4
MOST = 64
"""Ports of the firewall that are tried although nobody listens on them."""


@dataclass
class Verdict:
    """What was found, each a line."""

    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def ports(checked: Checked) -> None:
    """From outside, the ports that the configuration opens are open, and no others are."""
    vm, firewall = checked.vm, checked.declared.firewall
    there = sockets(vm)
    interface = checked.declared.interface or (there.cards[0] if there.cards else None)
    expected = {
        each.port: firewall.opens(each.port, interface)
        for each in there.listeners
        if each.protocol == "tcp"
    }
    silent = [port for port in _declared(firewall) if port not in expected][:MOST]
    states = _reach(vm, {**dict.fromkeys(silent, True), **expected})
    verdict = judge(firewall, there, interface, states)
    for note in verdict.notes:
        checked.warn(note)
    if verdict.wrong:
        raise finding(
            f"The ports of {checked.name} are not as its configuration says.",
            *verdict.wrong,
            todo="networking.firewall.allowedTCPPorts, and many a module's openFirewall, open one; "
            "what opens ports besides it is Docker, firewall.extraCommands, and a trusted "
            "interface.",
        )


def judge(
    firewall: Firewall, there: Sockets, interface: str | None, states: dict[int, State]
) -> Verdict:
    """Compare what the configuration says with what was found.

    `states` are those of the ports that were tried from outside, `interface` is what the machine
    calls the card through which they were.
    """
    verdict = Verdict()
    tried = [each for each in there.listeners if each.protocol == "tcp" and each.port in states]
    if not firewall.enabled:
        if reached := [each for each in tried if states[each.port] == "open"]:
            verdict.notes.append(
                "networking.firewall.enable is false, so everything that listens can be reached: "
                + and_more(map(str, reached))
            )
        return verdict
    for each in tried:
        _judge_listener(verdict, firewall, each, interface, states[each.port])
    for port in sorted(set(states) - {each.port for each in tried}):
        _judge_silent(verdict, firewall, port, states[port])
    silent = [p for p in _declared(firewall, "udp", longest=1) if there.on(p, "udp") is None]
    if silent:
        verdict.notes.append(
            f"nobody listens on udp port {and_more(map(str, silent))}, which the firewall opens"
        )
    return verdict


def _judge_listener(
    verdict: Verdict, firewall: Firewall, each: Listener, interface: str | None, state: State
) -> None:
    declared = firewall.opens(each.port, interface)
    if state == "open" and not declared:
        text = f"{each} can be reached from outside, and no option opens it"
        if firewall.own_rules:
            verdict.notes.append(f"{text}; rules of your own may (extraCommands, nftables)")
        else:
            verdict.wrong.append(f"{text}.")
    elif declared and state != "open":
        where = f", through {interface}" if interface in firewall.interface_tcp else ""
        if not each.everywhere:
            verdict.notes.append(
                f"{each} is opened{where}, and not reached: the VM may not have that address"
            )
        elif each.addresses == ("::",) and state == "closed":
            verdict.notes.append(f"{each} is opened{where}, and takes IPv6 only: it was not tried")
        else:
            verdict.wrong.append(f"{each} is opened{where}, but is {_words(state)} from outside.")


def _judge_silent(verdict: Verdict, firewall: Firewall, port: int, state: State) -> None:
    if state == "filtered" and not firewall.own_rules:
        verdict.wrong.append(
            f"tcp port {port} is opened, but gives no answer from outside: the firewall that runs "
            "is not the one that is configured, or the network is not up."
        )
    elif state == "closed":
        verdict.notes.append(f"nobody listens on tcp port {port}, which the firewall opens")


def _words(state: State) -> str:
    return {"closed": "refused", "filtered": "without an answer", "open": "open"}[state]


def _reach(vm: Machine, expected: dict[int, bool]) -> dict[int, State]:
    """Try ports from outside; `expected` says of each whether it should be open."""

    def reach(port: int) -> State:
        return vm.reachable(port, OPENS if expected[port] else STAYS_SHUT).state

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(expected, pool.map(reach, expected), strict=True))


def _declared(firewall: Firewall, protocol: str = "tcp", longest: int = 3) -> list[int]:
    """Return the ports that the firewall opens; of a long range the ends only."""
    ranges: Iterable[tuple[int, int]] = firewall.tcp if protocol == "tcp" else firewall.udp
    found: list[int] = []
    if not firewall.enabled:
        return found
    for first, last in ranges:
        if last - first < longest:
            found += range(first, last + 1)
        elif longest > 1:
            found += [first, last]
    return list(dict.fromkeys(found))
