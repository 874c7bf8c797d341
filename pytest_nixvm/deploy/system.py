"""A system's closure: looked at, compared, and copied into a host's store."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Sequence

from pytest_nixvm.deploy.host import DeployError, Host
from pytest_nixvm.errors import FlakeError
from pytest_nixvm.flake import process
from pytest_nixvm.flake.nix import FEATURES, Nix
from pytest_nixvm.flake.packages import split_name
from pytest_nixvm.progress import Progress

_COPY_TIMEOUT = 7200.0


def closure(nix: Nix, toplevel: str) -> list[str]:
    """Return the store paths that a system needs. Raises `FlakeError`."""
    ended = process.run([str(nix.store_program), "--query", "--requisites", toplevel], timeout=300)
    if ended.returncode != 0:
        raise FlakeError(f"{toplevel}: nix-store can't say what it needs.")
    return ended.stdout.decode().split()


def difference(old: Sequence[str], new: Sequence[str]) -> list[str]:
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


def _names(paths: Sequence[str]) -> dict[str, set[tuple[str, str]]]:
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
