"""A system's closure: compared with a host's, and copied into its store."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterable, Mapping

from pytest_nixvm.deploy.host import DeployError, Facts, Host
from pytest_nixvm.flake import process
from pytest_nixvm.flake.nix import FEATURES, Nix
from pytest_nixvm.flake.packages import split_name
from pytest_nixvm.progress import Progress

_COPY_TIMEOUT = 7200.0
_MISSING_TIMEOUT = 300.0
_LEFT = 256 << 20  # bytes that a host should have free when all was copied
# File systems that compress, by stat's names: how much a path takes there, nobody can say.
_COMPRESSES = ("btrfs", "zfs", "bcachefs", "UNKNOWN")


def missing(host: Host, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return what of a closure (path → bytes) a host's store has not.

    Raises `SshError`, `DeployError`.
    """
    said = host.call("missing", data="\n".join(sizes) + "\n", timeout=_MISSING_TIMEOUT).split()
    return {path: sizes[path] for path in said if path in sizes}


def check_room(host: Host, facts: Facts, lacking: Mapping[str, int]) -> None:
    """Raise `DeployError` where what has to be copied would fill the host's disk."""
    free = int(facts["space"] or 0) << 10
    needed = 0 if facts["filesystem"].startswith(_COMPRESSES) else sum(lacking.values())
    if free >= needed + _LEFT:
        return
    what = f"{host.target} has {free >> 20} MiB free in /nix/store"
    if needed:
        paths = f"{len(lacking)} store path{'s' if len(lacking) > 1 else ''}"
        what += f", and what it lacks of the system ({paths}) takes {-(-needed >> 20)} MiB"
    raise DeployError(
        f"{what}: make room first (nix-collect-garbage), so that {_LEFT >> 20} MiB are left."
    )


def difference(old: Iterable[str], new: Iterable[str]) -> list[str]:
    """Say by name what differs between two closures: + new, - gone, ~ changed.

    They are store paths, of which the old ones are another store's: `flake.packages` has more to
    say of two closures in this one.
    """
    left, right = _names(old), _names(new)
    lines = []
    for name in sorted(left.keys() | right.keys()):
        before, after = left.get(name, set()), right.get(name, set())
        if before == after:
            continue
        versions = [", ".join(sorted({v for v, _ in each if v})) for each in (before, after)]
        if not before:
            lines.append(f"+ {name} {versions[1]}".rstrip())
        elif not after:
            lines.append(f"- {name} {versions[0]}".rstrip())
        elif versions[0] != versions[1]:
            lines.append(f"~ {name} {versions[0] or '?'} → {versions[1] or '?'}")
        else:
            lines.append(f"~ {name}, rebuilt")
    return lines


def _names(paths: Iterable[str]) -> dict[str, set[tuple[str, str]]]:
    """Name → version and path of each."""
    found: dict[str, set[tuple[str, str]]] = {}
    for path in paths:
        name, version = split_name(path.rpartition("/")[2].partition("-")[2])
        found.setdefault(name, set()).add((version, path))
    return found


def copy(nix: Nix, host: Host, toplevel: str, progress: Progress, *, substitutes: bool) -> None:
    """Copy a system with all that it needs into the host's store.

    With `substitutes` the host fetches what its binary caches have. Raises `DeployError`.
    """
    argv = [str(nix.program), *FEATURES, "copy", "--to", host.target.store, toplevel]
    argv += ["--no-check-sigs"]  # for root, as whom we come, the host's store does not ask either
    if substitutes:
        argv += ["--substitute-on-destination"]
    given = os.environ.get("NIX_SSHOPTS", "")
    options = shlex.join(host.ssh_options)  # nix splits it at blanks, or as a shell does
    lines: list[str] = []
    step = progress.step(f"Copying to {host.target}")
    try:
        ended = process.run(
            argv,
            timeout=_COPY_TIMEOUT,
            env=nix.environment({"NIX_SSHOPTS": f"{given} {options}".strip()}),
            on_line=lines.append,
            stop=signal.SIGTERM,
        )
    except process.ProgramTimeoutError:
        step.fail()
        raise DeployError(
            f"Copying to {host.target} did not end within {_COPY_TIMEOUT:g} s."
        ) from None
    except BaseException:
        step.fail()
        raise
    if ended.returncode != 0:
        step.fail()
        said = "\n".join(lines[-10:]).strip() or f"exit status {ended.returncode}"
        raise DeployError(f"Copying to {host.target} failed; nothing was changed there.\n{said}")
    step.finish()
