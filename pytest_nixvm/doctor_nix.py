"""What `nixvm doctor` finds out of nix: the command, its settings, its caches, the flake."""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import socket
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pytest_nixvm.doctor import Finding, disk, said_by
from pytest_nixvm.errors import FlakeError, NixvmError
from pytest_nixvm.flake.build import MachineInfo
from pytest_nixvm.flake.nix import Nix

_GIB = 2**30
_REACHABLE = 5.0  # seconds
_NO_STORE = ("--store", "dummy://")  # whether the daemon answers is another question
_FLAKES = ("--extra-experimental-features", "nix-command flakes")


def command(find: Callable[[], Nix]) -> tuple[Finding, Nix | None]:
    """Look for nix."""
    try:
        nix = find()
    except NixvmError as error:
        mend = (
            ("Debian", "sudo apt-get install nix-bin nix-setup-systemd"),
            ("", "sh <(curl -L https://nixos.org/nix/install) --daemon"),
        )
        return Finding("nix", "fail", str(error), "Nothing can be built.", mend), None
    return Finding("nix", "ok", f"{nix.version} ({nix.program})"), nix


def settings_of(nix: Nix) -> dict[str, str]:
    """Return nix's settings as it sees them, none where it does not say."""
    options = [word for option in nix.options for word in ("--option", *option)]
    for words in (["show-config"], ["config", "show"]):  # up to 2.19, and from 2.20 on
        lines = said_by([str(nix.program), *_FLAKES, *words, *options]).splitlines()
        pairs = (line.partition(" =") for line in lines)
        found = {name: value.strip() for name, equals, value in pairs if equals}
        if "substituters" in found:
            return found
    return {}


def features(nix: Nix) -> Finding:
    """Look whether `nix build .#x` works by hand; we ask for flakes ourselves."""
    lacking = set()
    said = said_by([str(nix.program), "eval", *_NO_STORE, "--expr", "1"])
    if "1" not in said.splitlines():
        lacking.add("nix-command")
    only = ["--extra-experimental-features", "nix-command", "eval", *_NO_STORE, "--expr"]
    said = said_by([str(nix.program), *only, "builtins ? getFlake"])
    if "true" not in said.splitlines():
        lacking.add("flakes")
    if not lacking:
        return Finding("nix features", "ok", "nix-command and flakes are on")
    return Finding(
        "nix features",
        "warn",
        f"{' and '.join(sorted(lacking))} not on",
        "nixvm and pytest do without; `nix build .#…` by hand does not.",
        (
            ("NixOS", 'nix.settings.experimental-features = [ "nix-command" "flakes" ];'),
            (
                "Debian",
                "echo 'experimental-features = nix-command flakes' | sudo tee -a /etc/nix/nix.conf",
            ),
        ),
    )


def store(nix: Nix) -> Finding:
    """Look how the store is reached: by the daemon, or directly."""
    remote = os.environ.get("NIX_REMOTE", "")
    # What `store = auto` means: a store that we can write is ours, else the daemon's.
    state = Path(os.environ.get("NIX_STATE_DIR", "/nix/var/nix"))
    if not remote and os.access(state, os.W_OK):
        return Finding("nix store", "ok", "used directly, without the daemon")
    address = remote or "daemon"
    if address != "daemon":
        return Finding("nix store", "ok", address)
    where = Path(os.environ.get("NIX_DAEMON_SOCKET_PATH", state / "daemon-socket/socket"))
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_REACHABLE)
            connection.connect(str(where))
    except OSError as error:
        return Finding(
            "nix store",
            "fail",
            f"the daemon does not answer at {where}: {error.strerror or error}",
            f"{nix.program} can't build anything.",
            _mend_daemon(error),
        )
    return Finding("nix store", "ok", f"the daemon answers at {where}")


def _mend_daemon(error: OSError) -> tuple[tuple[str, str], ...]:
    user = os.environ.get("USER") or "USER"
    if isinstance(error, PermissionError):  # Debian has a group of those who may ask it
        return (("Debian", f"sudo usermod -aG nix-users {user}    (then log in again)"),)
    return (
        ("Debian", f"sudo apt-get install nix-setup-systemd; sudo usermod -aG nix-users {user}"),
        ("NixOS", "sudo systemctl start nix-daemon.socket"),
        ("", "sudo systemctl enable --now nix-daemon.socket"),
    )


def building(nix: Nix, settings: dict[str, str]) -> Finding:
    """Look at the sandbox, and at who may change settings."""
    sandbox = settings.get("sandbox", "?")
    if nix.config:
        return Finding(
            "nix builds",
            "warn",
            nix.notes[0] if nix.notes else "there are no build users",
            "Builds run as root, without users of their own.",
            (("Debian", "sudo apt-get install nix-setup-systemd"),),
        )
    if sandbox == "false":
        return Finding(
            "nix builds",
            "warn",
            "the sandbox is off",
            "A build may use what is on this computer, and fail elsewhere.",
            (("NixOS", "nix.settings.sandbox = true;"), ("", "sandbox = true in nix.conf")),
        )
    return Finding("nix builds", "ok", f"sandbox: {sandbox}, jobs: {settings.get('max-jobs', '?')}")


def trusted(nix: Nix, settings: dict[str, str]) -> Finding | None:
    """Look whether the user's own settings (substituters, say) count; None where all do."""
    if not nix.options or os.access(os.environ.get("NIX_STATE_DIR", "/nix/var/nix"), os.W_OK):
        return None
    said = said_by([str(nix.program), *_FLAKES, "store", "ping", "--json"])
    if '"trusted":true' in said.replace(" ", ""):
        return Finding("nix trust", "ok", "this user is trusted")
    users = settings.get("trusted-users", "root")
    return Finding(
        "nix trust",
        "warn",
        f"trusted users are: {users}",
        "The daemon ignores some of the given --nix-option.",
        (
            ("NixOS", 'nix.settings.trusted-users = [ "root" "@wheel" ];'),
            (
                "Debian",
                "echo 'trusted-users = root @sudo' | sudo tee -a /etc/nix/nix.conf; "
                "sudo systemctl restart nix-daemon",
            ),
        ),
    )


def substituters(settings: dict[str, str], *, offline: bool) -> list[Finding]:
    """Ask each cache that nix would fetch from for its nix-cache-info, all at once."""
    if offline:
        return [Finding("binary cache", "ok", "not asked (--offline)")]
    if settings.get("substitute", "true") == "false":
        return [Finding("binary cache", "ok", "nix is told to fetch nothing")]
    if "substituters" not in settings:
        return [Finding("binary cache", "ok", "not asked: nix does not say which it has")]
    urls = settings["substituters"].split()
    if not urls:
        return [
            Finding(
                "binary cache",
                "warn",
                "nix has none to fetch from",
                "Everything is built here, which takes hours for a real machine.",
                (
                    ("NixOS", 'nix.settings.substituters = [ "https://cache.nixos.org" ];'),
                    ("", "substituters = https://cache.nixos.org in nix.conf"),
                ),
            )
        ]
    with ThreadPoolExecutor(len(urls)) as pool:
        return list(pool.map(_substituter, urls))


def _substituter(url: str) -> Finding:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        return Finding("binary cache", "ok", f"{_shown(url)} is not asked: only http is")
    try:
        address = parts._replace(
            netloc=parts.netloc.rpartition("@")[2],
            path=parts.path.rstrip("/") + "/nix-cache-info",
            query="",
        )
        request = urllib.request.Request(urllib.parse.urlunsplit(address))  # noqa: S310
        if parts.username is not None:  # as curl, which nix uses, understands such an address
            user, password = map(urllib.parse.unquote, (parts.username, parts.password or ""))
            token = base64.b64encode(f"{user}:{password}".encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {token}")
        with urllib.request.urlopen(request, timeout=_REACHABLE) as answer:  # noqa: S310
            answer.read(1000)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Finding(
            "binary cache",
            "warn",
            f"{_shown(url)} can't be reached: {_why(error)}",
            "What it has is built here, or fails; what is in the store already still works.",
            (("", "look at the network, the proxy (https_proxy), and the certificates"),
             ("", "without a network: --offline")),
        )  # fmt: skip
    return Finding("binary cache", "ok", f"{_shown(url)} answers")


def _shown(url: str) -> str:
    """Return an address without a password that may be in it."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=""))


def _why(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(error, urllib.error.HTTPError):
        return f"it answers {error.code}"
    if isinstance(reason, TimeoutError):
        return f"no answer within {_REACHABLE:g} s"
    if isinstance(reason, ssl.SSLError):
        return f"TLS: {reason.reason or reason}"
    return getattr(reason, "strerror", None) or str(reason)


def flake(name: str, given: bool, machines: Callable[[], Sequence[MachineInfo]]) -> Finding:
    """Look whether the flake evaluates; that there is none is no mistake unless it was `given`."""
    if not given and not (Path(name) / "flake.nix").exists():
        return Finding(
            "flake",
            "ok",
            "none in this directory",
            mend=(("", "nixvm init writes one, --flake REF names another"),),
        )
    try:
        found = machines()
    except FlakeError as error:
        return Finding("flake", "fail", str(error), "No machine can be tested.")
    except NixvmError as error:
        return Finding("flake", "warn", f"not looked at: {error}")
    here = [machine.name for machine in found if machine.skip is None]
    seen = f"{name}: {len(found)} machines, {len(here)} can be tested here"
    if here:
        return Finding("flake", "ok", seen)
    reasons = "; ".join(f"{machine.name}: {machine.skip}" for machine in found)
    return Finding("flake", "warn", seen, reasons)


def nix_findings(
    find: Callable[[], Nix],
    *,
    offline: bool,
    reference: str,
    given: bool,
    machines: Callable[[], Sequence[MachineInfo]],
) -> list[Finding]:
    """Look at nix and, if there is one, the flake."""
    first, nix = command(find)
    if nix is None:
        return [first]
    settings = settings_of(nix)
    found = [first, features(nix), store(nix), building(nix, settings)]
    with contextlib.suppress(OSError):
        one = trusted(nix, settings)
        found += [] if one is None else [one]
    found += substituters(settings, offline=offline)
    where = Path(os.environ.get("NIX_STORE_DIR", "/nix/store"))
    found.append(disk("room in the store", where, 2 * _GIB, 10 * _GIB,
                      "nix-collect-garbage --delete-older-than 30d"))  # fmt: skip
    found.append(flake(reference, given, machines))
    return found
