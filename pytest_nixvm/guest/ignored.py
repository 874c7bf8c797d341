"""Configuration that systemd or the kernel has read and not obeyed, and said only in the journal.

systemd logs such lines with the fields CONFIG_FILE and CONFIG_LINE (sd-messages; log_syntax in its
source); what it says of units in whole, and the kernel of its command line, is known by its words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pytest_nixvm.guest.directives import hint

if TYPE_CHECKING:
    from pytest_nixvm.guest.journal import JournalEntry

_PLACE = re.compile(r"^(?P<file>/[^\s:]+)(?::(?P<line>\d+))?: (?P<said>.+)$", re.DOTALL)
_IGNORED = re.compile(
    r"ignor|unknown|failed to parse|unbalanced quoting|invalid|refusing|missing '='"
    r"|not absolute|neither a valid|assignment outside of section|lacks both|bad unit file",
    re.IGNORECASE,
)
# What is obeyed all the same: systemd puts it right by itself, or only says that it is old.
_OBEYED = re.compile(
    r"legacy directory|is obsolete|is deprecated|automatically updating|Standard(?:Output|Error)"
    r"=syslog|KillMode=none|executable\. |world-writable|world-inaccessible",
    re.IGNORECASE,
)
_KEY = re.compile(r"Unknown (?:key|lvalue)(?: name)? '([^']+)' in section (?:\[([^]]+)]|'([^']+)')")
_UNIT_REFUSED = re.compile(
    r"^(?P<unit>\S+\.(?:service|socket|timer|mount|automount|path|slice|target|swap)): "
    r"(?P<said>.*(?:Refusing\.|has a bad unit file setting\.|lacks both ExecStart=.*)|"
    r"Unit configuration has fatal error.*)$"
)
_CYCLE = re.compile(r"Found ordering cycle|deleted to break ordering cycle|Unable to break cycle")
_MODULE = re.compile(
    r"Failed to find module '([^']+)'|FATAL: Module (\S+) not found|module (\S+) not found", re.I
)
_PARAMETERS = re.compile(r"Unknown kernel command line parameters \"([^\"]*)\"")

# Who says such things; an application's own words are its own business.
_TOLD_BY = re.compile(r"systemd(?:-[\w-]+)?|\([\w-]+\)|kernel|modprobe|stage-[12]-init|udevadm")

# What a userland of NixOS reads from the kernel's command line, though the kernel does not know it.
_WORDS = """
splash rhgb BOOT_IMAGE copytoram findiso debugtrace shell allowShell single emergency rescue 1 2 3 4
5 s S fastboot forcefsck fsck nofail auto toram live boottrace debug1 debug1mounts debug1devices
panic_on_fail stage1panic regInfo selinux apparmor net ip ifname netroot nfsroot
"""
_USER_SPACE = frozenset(_WORDS.split())


@dataclass
class Ignored:
    """One thing that was not obeyed."""

    where: str  # /etc/systemd/system/web.service:12, the kernel's command line
    said: str
    option: str = ""
    hint: str = ""
    more: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.said}" if self.where else self.said]
        lines += [f"    {each}" for each in self.more]
        advice = " ".join(filter(None, (self.hint, self.option and f"Option: {self.option}")))
        return "\n".join([*lines, *([f"    {advice}"] if advice else [])])


def ignored(entries: Iterable[JournalEntry], kernel_params: str) -> list[Ignored]:
    """Return what a boot's journal says was not obeyed, each once."""
    found: dict[str, Ignored] = {}
    cycle: Ignored | None = None
    for entry in entries:
        message = entry.message.strip()
        if not _TOLD_BY.fullmatch(entry.identifier) and "CONFIG_FILE" not in entry.fields:
            continue
        if entry.identifier == "kernel":
            for each in _kernel(message, kernel_params):
                found.setdefault(str(each), each)
            continue
        if _CYCLE.search(message):
            # Several lines, one after the other: the cycle's jobs, and the one that was dropped.
            if cycle is None or message.find("Found ordering cycle") >= 0:
                cycle = found.setdefault(
                    message, Ignored("", message, "the units' after and before")
                )
            elif message not in cycle.more:
                cycle.more.append(message)
            continue
        one = _module(message) or _syntax(entry, message) or _refused(message)
        if one is not None:
            found.setdefault(str(one), one)
    return list(found.values())


def _kernel(message: str, kernel_params: str) -> list[Ignored]:
    if one := _module(message):
        return [one]
    match = _PARAMETERS.search(message)
    if match is None:
        return []
    given = set(kernel_params.split())
    return [
        Ignored(
            "the kernel's command line",
            f"the kernel does not know {word!r}, and hands it on",
            "boot.kernelParams",
        )
        for word in match[1].split()
        if word in given and word.partition("=")[0] not in _USER_SPACE
    ]


def _module(message: str) -> Ignored | None:
    match = _MODULE.search(message)
    if match is None:
        return None
    name = match[1] or match[2] or match[3]
    return Ignored(
        "",
        f"There is no kernel module {name.rstrip('.')!r}",
        "boot.kernelModules (or boot.initrd.kernelModules); a module that is not in the kernel "
        "itself comes from boot.extraModulePackages",
    )


def _syntax(entry: JournalEntry, message: str) -> Ignored | None:
    place = _PLACE.match(message)
    file = entry.fields.get("CONFIG_FILE") or (place["file"] if place else "")
    # What a program has started with systemd-run is nobody's configuration.
    if not file or file.startswith("/run/systemd/transient/"):
        return None
    said = place["said"] if place else message
    if not _IGNORED.search(said) or _OBEYED.search(said):
        return None
    line = entry.fields.get("CONFIG_LINE") or (place["line"] if place else "") or ""
    key = _KEY.search(said)
    name, section = (key[1], key[2] or key[3]) if key else ("", "")
    return Ignored(
        f"{file}:{line}" if line not in ("", "0") else file,
        said,
        option_of(file, section, name),
        hint(name, section) if key else "",
    )


def _refused(message: str) -> Ignored | None:
    match = _UNIT_REFUSED.match(message)
    if match is None:
        return None
    return Ignored(match["unit"], match["said"], option_of(f"/{match['unit']}", "", ""))


_KINDS = {
    "service": "services",
    "socket": "sockets",
    "timer": "timers",
    "path": "paths",
    "mount": "mounts",
    "automount": "automounts",
    "slice": "slices",
    "target": "targets",
}
_FILES = (
    (r"/etc/systemd/(?:system|user)\.conf.*", "systemd.settings.Manager (systemd.extraConfig)"),
    (r"/etc/systemd/journald\.conf.*", "services.journald.extraConfig"),
    (r"/etc/systemd/logind\.conf.*", "services.logind.settings (extraConfig)"),
    (r"/etc/systemd/resolved\.conf.*", "services.resolved.settings (extraConfig)"),
    (r"/etc/systemd/timesyncd\.conf.*", "services.timesyncd.extraConfig"),
    (r"/etc/systemd/coredump\.conf.*", "systemd.coredump.extraConfig"),
    (r"/etc/systemd/network/(?P<n>[^/]+)\.network", "systemd.network.networks.{n}"),
    (r"/etc/systemd/network/(?P<n>[^/]+)\.netdev", "systemd.network.netdevs.{n}"),
    (r"/etc/systemd/network/(?P<n>[^/]+)\.link", "systemd.network.links.{n}"),
    (r".*/tmpfiles\.d/.*", "systemd.tmpfiles.rules (or .settings)"),
    (r".*/sysctl\.d/.*", "boot.kernel.sysctl"),
    (r".*/modules-load\.d/.*", "boot.kernelModules"),
    (r".*/udev/rules\.d/.*", "services.udev.extraRules (or services.udev.packages)"),
)


def option_of(file: str, section: str, key: str) -> str:
    """Return the option that a file of the running system probably comes from; "" if unknown."""
    for pattern, option in _FILES:
        if match := re.fullmatch(pattern, file):
            return option.format(**match.groupdict())
    match = re.search(
        r"/(?P<name>[^/]+)\.(?P<kind>service|socket|timer|path|mount|automount|slice|target)"
        r"(?:\.d/[^/]+\.conf)?$",
        file,
    )
    if match is None:
        return ""
    kind, user = match["kind"], "systemd.user." if "/systemd/user/" in file else "systemd."
    name = (
        match["name"] if re.fullmatch(r"[A-Za-z_][\w-]*", match["name"]) else f'"{match["name"]}"'
    )
    if kind in ("mount", "automount"):
        return f"{user}{_KINDS[kind]} (fileSystems)"
    place = f"{user}{_KINDS[kind]}.{name}"
    if section == "Unit":
        place += ".unitConfig"
    elif section and section != "Install":
        place += f".{kind}Config"
    return f"{place}.{key}" if key and section not in ("", "Install") else place
