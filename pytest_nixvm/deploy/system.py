"""A system's closure: looked at, and copied into a host's store."""

from __future__ import annotations

import os
import shlex
import signal

from pytest_nixvm.deploy.host import DeployError, Host
from pytest_nixvm.errors import FlakeError
from pytest_nixvm.flake import process
from pytest_nixvm.flake.nix import FEATURES, Nix
from pytest_nixvm.progress import Progress

_COPY_TIMEOUT = 7200.0


def closure(nix: Nix, toplevel: str) -> list[str]:
    """Return the store paths that a system needs. Raises `FlakeError`."""
    ended = process.run([str(nix.store_program), "--query", "--requisites", toplevel], timeout=300)
    if ended.returncode != 0:
        raise FlakeError(f"{toplevel}: nix-store can't say what it needs.")
    return ended.stdout.decode().split()


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
