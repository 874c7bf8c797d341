"""Why a machine can't be frozen, and what in its configuration would lift that.

Some of it stands on QEMU's command line; the rest QEMU says when it is asked to save its state.

Sources: `migrate_add_blocker` and `unmigratable` in QEMU's source, 7.2 to 10.0.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_nixvm.qemu.drives import Drive, drives, options, settings
from pytest_nixvm.qemu.replay import RAM

SHARES = (
    "virtualisation.sharedDirectories = lib.mkForce {} and virtualisation.useNixStoreImage = true, "
    "which --nixvm-isolation=test sets by itself for machines that it builds"
)
DEVICE = "leave it out of virtualisation.qemu.options"
NETWORK = "leave it out of virtualisation.qemu.networkingOptions"
DRIVE = (
    "a file that the start script makes in its working directory, or "
    'driveExtraOpts.readonly = "on" in virtualisation.qemu.drives'
)
FORMAT = "another format (qemu-img convert -O qcow2)"
TPM = "virtualisation.tpm.enable = false"


@dataclass(frozen=True)
class Blocker:
    """What keeps a machine from being frozen.

    `remedy` says what would lift it, "" where nothing is known. With `ram_only`, only the file
    with the memory is at fault: the state with the memory in it can still be saved.
    """

    what: str
    remedy: str = ""
    ram_only: bool = False

    def __str__(self) -> str:
        text = f"{self.what} (to lift that: {self.remedy})" if self.remedy else self.what
        return " ".join(text.split())


def found(
    argv: Sequence[str], scratch: Path, qemu_version: tuple[int, int, int] | None = None
) -> tuple[Blocker, ...]:
    """Return what keeps the QEMU with this command line from being frozen, as far as it shows.

    `scratch` is the working directory, where the machine's own files are. A 9p share is not in
    it: it is in the way only while the guest has it mounted, which QEMU says itself.
    """
    result = [blocker for each in drives(argv) for blocker in _drive(each, scratch)]
    for option in options(argv):
        value = "" if option.at is None else argv[option.at]
        if option.name in _BY_OPTION:
            result += _BY_OPTION[option.name](value)
        if option.name == "device":
            result += _device(settings(value, "driver"), qemu_version)
    return tuple(dict.fromkeys(result))


# --- on the command line ------------------------------------------------------------------------

# Formats whose driver refuses, also where the image is only read.
_FORMATS = frozenset({"parallels", "qcow", "vdi", "vhdx", "vmdk", "vpc"})


def _drive(drive: Drive, scratch: Path) -> Iterator[Blocker]:
    name = f"the drive {drive.path}"
    if drive.format in _FORMATS:
        yield Blocker(f"{name}: QEMU can't freeze the format {drive.format}", FORMAT)
    if drive.readonly:
        return
    if drive.snapshot:
        yield Blocker(f"{name}: what is written goes into a file that ends with QEMU",
                      "leave out snapshot=on")  # fmt: skip
    elif drive.is_url:
        yield Blocker(f"{name}, which is written to and is no file", DRIVE)
    elif not _is_below(drive.path, scratch):
        yield Blocker(f"{name}, which is written to and not the machine's own", DRIVE)


def _is_below(path: str, scratch: Path) -> bool:
    place = Path(os.path.normpath(scratch / path))
    # The start script resolves links in the disk's path.
    return place.is_relative_to(scratch) or place.is_relative_to(scratch.resolve())


def _device(has: Mapping[str, str], version: tuple[int, int, int] | None) -> Iterator[Blocker]:
    driver = has.get("driver", "")
    if driver == "nvme" and version is not None and version >= (11, 0, 0):
        return  # newer ones can; one that can't says so
    for pattern, make in _DEVICES:
        if re.match(pattern, driver):
            yield make(driver, has)
            return


def _passed_through(driver: str, has: Mapping[str, str]) -> Blocker:
    which = has.get("host") or has.get("sysfsdev") or has.get("id") or ""
    return Blocker(f"the passed-through device {driver}" + (f" ({which})" if which else ""), DEVICE)


def _virtiofs(_driver: str, has: Mapping[str, str]) -> Blocker:
    return Blocker(f"the virtiofs share '{has.get('tag', '')}'", SHARES)


def _plain_device(driver: str, _has: Mapping[str, str]) -> Blocker:
    return Blocker(f"the device {driver}", DEVICE)


_DEVICES: tuple[tuple[str, Callable[[str, Mapping[str, str]], Blocker]], ...] = (
    (r"vhost-user-fs", _virtiofs),
    (r"vfio-|vhost-vdpa|usb-host\b", _passed_through),
    (
        r"nvme\b",
        lambda driver, _has: Blocker(
            f"the {driver} disk", "another deviceExtraOpts or interface, such as virtio-blk"
        ),
    ),
    (
        r"vhost-user-|vhost-scsi",
        lambda driver, _has: Blocker(
            f"the device {driver}, a part of which is not in QEMU", DEVICE
        ),
    ),
    (
        r"vhost-vsock",
        lambda driver, has: Blocker(
            f"the device {driver}: two clones can't both have the number "
            f"{has.get('guest-cid', '')} on the host",
            DEVICE,
        ),
    ),
    (
        r"virtio-(gpu|vga)-(gl|rutabaga)",
        lambda driver, _has: Blocker(
            f"the graphics card {driver}, a part of which is in the host's", "use virtio-gpu-pci"
        ),
    ),
    (r"ivshmem", _plain_device),
)


def _tpm(value: str) -> Iterator[Blocker]:
    has = settings(value, "type")
    if has.get("type") in ("emulator", "passthrough"):
        yield Blocker(f"the TPM {has.get('id', '')}, whose state is outside of QEMU", TPM)


def _numa(value: str) -> Iterator[Blocker]:
    has = settings(value, "type")
    if "memdev" in has:
        yield Blocker(
            f"NUMA memory (memdev={has['memdev']}), in the place of the plugin's",
            DEVICE,
            ram_only=True,
        )


def _object(value: str) -> Iterator[Blocker]:
    has = settings(value, "qom-type")
    kind, name = has.get("qom-type", ""), has.get("id", "")
    if kind.startswith(("sev", "tdx-")):
        yield Blocker(f"encrypted memory ({kind})", DEVICE)
    elif kind.startswith("memory-backend-") and (kind, name) != ("memory-backend-file", RAM):
        # A file is the same one for all clones.
        shared = kind == "memory-backend-file" and has.get("share") in ("on", "true", "yes", "y")
        yield Blocker(
            f"memory of the start script's own ({kind} '{name}')", DEVICE, ram_only=not shared
        )


def _network(value: str) -> Iterator[Blocker]:
    has = settings(value, "type")
    kind, name = has.get("type", ""), has.get("id", "")
    label = f"the network {kind}" + (f" '{name}'" if name else "")
    if any(key in has for key in ("fd", "fds", "vhostfd", "vhostfds")):
        yield Blocker(f"{label}, which has a descriptor from the start script", NETWORK)
    elif kind in ("vhost-vdpa", "vhost-user"):
        yield Blocker(f"{label}, a part of which is not in QEMU", NETWORK)
    elif kind == "tap" and "ifname" in has:
        yield Blocker(f"{label}: two clones can't both have {has['ifname']}", NETWORK)
    elif kind == "socket" and ("listen" in has or "localaddr" in has):
        port = has.get("listen", has.get("localaddr"))
        yield Blocker(f"{label}: two clones can't both listen on {port}", NETWORK)
    elif has.get("server") == "on" and has.get("addr.type") == "inet":
        yield Blocker(f"{label}: two clones can't both listen on {has.get('addr.port')}", NETWORK)


def _vnc(value: str) -> Iterator[Blocker]:
    has = settings(value, "vnc")
    place = has.get("vnc", "")
    fixed = re.fullmatch(r"[^/]*:\d+", place) and "to" not in has and "reverse" not in has
    if fixed or has.get("websocket", "").isdigit():
        yield Blocker(f"-vnc {place}: two clones can't both listen on one port", DEVICE)


def _display(value: str) -> Iterator[Blocker]:
    if value.startswith("vnc="):
        yield from _vnc(value)


def _spice(value: str) -> Iterator[Blocker]:
    has = settings(value)
    ports = [has[key] for key in ("port", "tls-port") if has.get(key, "0") != "0"]
    if ports:
        yield Blocker(
            f"-spice with port {' and '.join(ports)}: two clones can't both listen on it", DEVICE
        )


def _gdb(value: str) -> Iterator[Blocker]:
    if value != "none":
        yield Blocker(
            f"-gdb {value or 'tcp::1234'}: two clones can't both listen on one port", DEVICE
        )


def _usb(value: str) -> Iterator[Blocker]:
    if value.startswith("host:"):
        yield Blocker(f"the passed-through device usb-host ({value[5:]})", DEVICE)


def _loads(value: str) -> Iterator[Blocker]:
    # A clone that is to be frozen itself has "defer" from the plugin.
    if value != "defer":
        yield Blocker(f"the machine loads a state itself ({value})", DEVICE)


_BY_OPTION: Mapping[str, Callable[[str], Iterator[Blocker]]] = {
    "add-fd": lambda value: iter(
        [Blocker(f"-add-fd {value}: a descriptor from the start script", DEVICE)]
    ),
    "display": _display,
    "gdb": _gdb,
    "incoming": _loads,
    "loadvm": _loads,
    "mem-path": lambda value: iter(
        [Blocker(f"-mem-path {value}, in the place of the plugin's", DEVICE, ram_only=True)]
    ),
    "net": _network,
    "netdev": _network,
    "nic": _network,
    "numa": _numa,
    "object": _object,
    "readconfig": lambda value: iter(
        [Blocker(f"-readconfig {value}: more options, which the plugin does not know", DEVICE)]
    ),
    "s": _gdb,
    "spice": _spice,
    "tpmdev": _tpm,
    "usbdevice": _usb,
    "vnc": _vnc,
}


# --- what QEMU says -----------------------------------------------------------------------------


def explain(reason: str, argv: Sequence[str]) -> Blocker:
    """Return what QEMU's words mean for a machine with this command line.

    `reason` is an error of `migrate`, or one of `blocked-reasons` in `query-migrate`. Words that
    are not known stay as they are.
    """
    for pattern, make in _SAID:
        match = re.search(pattern, reason, re.IGNORECASE)
        if match is not None:
            return make(match, argv)
    return Blocker(reason.strip(), ram_only=ram_only(reason))


def ram_only(reason: str) -> bool:
    """Whether QEMU's words refuse only the file with the memory.

    The state with the memory in it can be saved all the same, in a file that is larger.
    """
    return re.search(r"ignore-shared|backing store|memory[- ]backend|-mem-path", reason) is not None


def _said_9p(match: re.Match[str], _argv: Sequence[str]) -> Blocker:
    path, tag = match.groups()
    return Blocker(f"the 9p share '{tag}'" + ("" if path == "NULL" else f" ({path})"), SHARES)


def _said_device(match: re.Match[str], argv: Sequence[str]) -> Blocker:
    # "0000:00:02.0/nvme": where it is, and what.
    place, _, driver = match[1].rpartition("/")
    known = [settings(argv[o.at], "driver") for o in options(argv) if o.name == "device" and o.at]
    same = [has for has in known if re.match(rf"{re.escape(driver)}\b", has.get("driver", ""))]
    blockers = dict.fromkeys(each for has in same for each in _device(has, None))
    if len(blockers) == 1:
        return next(iter(blockers))
    if driver == "vhost-user-fs":
        return Blocker("the virtiofs shares", SHARES)
    return Blocker(f"the device {driver}" + (f" at {place}" if place else ""), DEVICE)


def _said_format(match: re.Match[str], argv: Sequence[str]) -> Blocker:
    format_, node = match[1].split()[0].lower(), match[2]
    named = [d for d in drives(argv) if node in settings(argv[d.at]).values()]
    fitting = named or [d for d in drives(argv) if d.format == format_]
    if format_ == "vvfat":
        fitting = fitting or [d for d in drives(argv) if d.path.startswith("fat:")]
    which = f"the drive {fitting[0].path}" if len(fitting) == 1 else f"the drive '{node}'"
    return Blocker(f"{which}: QEMU can't freeze the format {format_}", FORMAT)


def _said_vhost_user(_match: re.Match[str], argv: Sequence[str]) -> Blocker:
    shares = [each for each in found(argv, Path("/")) if each.remedy == SHARES]
    if len(shares) == 1:
        return shares[0]
    if shares:
        return Blocker("the virtiofs shares", SHARES)
    return Blocker("a vhost-user device, a part of which is not in QEMU", DEVICE)


def _always(what: str, remedy: str) -> Callable[[re.Match[str], Sequence[str]], Blocker]:
    return lambda _match, _argv: Blocker(what, remedy)


_SAID: tuple[tuple[str, Callable[[re.Match[str], Sequence[str]], Blocker]], ...] = (
    (r"VirtFS export path '(.*)' is mounted in the guest using mount_tag '(.*?)'", _said_9p),
    (
        r"non-migratable CPU device \(invtsc",
        _always(
            "the CPU's invtsc flag: its clock can't be frozen",
            'virtualisation.qemu.options = [ "-cpu host,-invtsc" ]',
        ),
    ),
    (r"non-migratable device:? '?([^'\s]+)", _said_device),
    (r"(?:The|Block format) '?([^']+?)'?(?: format)? used by (?:node|device) '([^']*)'",
     _said_format),
    (
        r"nested (?:VMX |SVM )?virtualization",
        _always(
            "virtualisation in the guest (nested)",
            'virtualisation.qemu.options = [ "-cpu host,-vmx,-svm" ]',
        ),
    ),
    (r"vhost-user backend lacks", _said_vhost_user),
    (r"vhost lacks VHOST_F_LOG_ALL", _always("a vhost device of the host's kernel", NETWORK)),
    (r"vhost-vdpa|shadow virtqueue|vdpa", _always("a passed-through vDPA device", DEVICE)),
    (r"vhost-scsi", _always("the vhost-scsi device", DEVICE)),
    (r"VFIO", _always("a passed-through device (VFIO)", DEVICE)),
    (r"virgl|virtio-gpu|blob",
     _always("the graphics card, a part of which is in the host's", "use virtio-gpu-pci")),
    (r"TPM emulator", _always("the TPM, whose state is outside of QEMU", TPM)),
    (r"ivshmem", _always("the device ivshmem", DEVICE)),
    (r"\bSEV\b|\bTDX\b", _always("encrypted memory", DEVICE)),
    (r"vdagent", _always("the chardev qemu-vdagent", DEVICE)),
    (r"hv-no-nonarch-coresharing", _always("the CPU flag hv-no-nonarch-coresharing=auto", DEVICE)),
)  # fmt: skip
