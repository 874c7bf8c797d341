"""The real machine's system: built, and copied into a host's store."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
from pathlib import Path

from pytest_nixvm.deploy.host import DeployError, Host
from pytest_nixvm.errors import FlakeError
from pytest_nixvm.flake import explain, process
from pytest_nixvm.flake.flake import Flake
from pytest_nixvm.flake.nix import _FEATURES, Nix, NixFailure
from pytest_nixvm.progress import Progress

_BUILD_TIMEOUT = 7200.0
_COPY_TIMEOUT = 7200.0


def build(flake: Flake, name: str, root: Path, progress: Progress) -> str:
    """Build what the machine really runs; `root` keeps it. Returns its store path.

    Raises:
        FlakeError, EvaluationError, BuildError.
    """
    attribute = next(info.attribute for info in flake.machines() if info.name == name)
    evaluator = flake._evaluator
    argv = [
        *(str(flake.nix.program), *_FEATURES, "build"),
        f"{flake.reference.url}#{attribute}.config.system.build.toplevel",
        *("--out-link", str(root), "--no-write-lock-file", "--option", "eval-cache", "false"),
    ]
    for given, url in evaluator.overrides:
        argv += ["--override-input", given, url]
    if flake.nix.offline:
        argv += ["--offline"]
    root.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    step = progress.step(f"Building the system of {name}")
    try:
        flake.nix._run(argv, timeout=_BUILD_TIMEOUT, watch=step.update, stop=signal.SIGTERM)
    except NixFailure as failure:
        step.fail("failed")
        raise explain.build_failed(failure, evaluator.subject(attribute), None) from None
    except BaseException:
        step.fail()
        raise
    step.finish()
    return str(root.readlink())


def closure(nix: Nix, toplevel: str) -> list[str]:
    """Return the store paths that a system needs. Raises `FlakeError`."""
    program = nix.program.parent / "nix-store"
    if not program.exists():
        program = Path(shutil.which("nix-store") or program)
    ended = process.run([str(program), "--query", "--requisites", toplevel], timeout=300)
    if ended.returncode != 0:
        raise FlakeError(f"{toplevel}: nix-store can't say what it needs.")
    return ended.stdout.decode().split()


def copy(nix: Nix, host: Host, toplevel: str, progress: Progress, *, substitutes: bool) -> None:
    """Copy a system with all that it needs into the host's store.

    With `substitutes` the host fetches what its binary caches have. Raises `DeployError`.
    """
    argv = [str(nix.program), *_FEATURES, "copy", "--to", host.target.store, toplevel]
    argv += ["--no-check-sigs"]  # for root, as whom we come, the host's store does not ask either
    if substitutes:
        argv += ["--substitute-on-destination"]
    given = os.environ.get("NIX_SSHOPTS", "")
    options = shlex.join(host.ssh_options)  # nix splits it at blanks, or as a shell does
    extra = {"NIX_SSHOPTS": f"{given} {options}".strip()}
    if nix.config:
        extra["NIX_CONFIG"] = f"{os.environ.get('NIX_CONFIG', '')}\n{nix.config}\n"
    lines: list[str] = []
    step = progress.step(f"Copying to {host.target}")
    try:
        ended = process.run(
            argv,
            timeout=_COPY_TIMEOUT,
            env=process.environment(extra),
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
