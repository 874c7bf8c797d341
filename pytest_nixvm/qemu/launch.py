"""A start script becomes a running QEMU under control.

The script is run as `nix run` would run it, with devices added as arguments: they are quoted by
its `"$@"`, where `$QEMU_OPTS` is split at spaces. Of two options of a kind QEMU takes the later
one, so ours win.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from pytest_nixvm.errors import MachineGoneError, QemuError, QmpError
from pytest_nixvm.qemu.accelerator import architecture, find_qemu
from pytest_nixvm.qemu.loop import IoThread
from pytest_nixvm.qemu.monitor import Monitor
from pytest_nixvm.qemu.output import full_disk, quote, read_end
from pytest_nixvm.qemu.running import Qemu
from pytest_nixvm.qemu.spec import LaunchSpec, arguments, environment, private_directory
from pytest_nixvm.qemu.supervisor import Process, Supervisor, describe_status
from pytest_nixvm.wait import Deadline

__all__ = ["LaunchSpec", "Qemu", "launch", "private_directory", "start"]


def launch(spec: LaunchSpec, *, supervisor: Supervisor, io: IoThread, timeout: float) -> Qemu:
    """Run the start script and return the QEMU it became, once that answers commands.

    Raises `SettingsError` for paths that can't work, `MissingProgramError` without a QEMU, and
    `QemuError` with what the script and QEMU said, as soon as they end or after `timeout` seconds.
    """
    spec.check()
    guest = architecture(find_qemu(spec.start_script))
    script = spec.start_script.read_text(errors="replace")
    return start(
        spec,
        (str(spec.start_script), *arguments(spec, script, guest)),
        environment(spec, script, guest),
        supervisor=supervisor,
        io=io,
        timeout=timeout,
    )


def start(
    spec: LaunchSpec,
    argv: Sequence[str],
    env: Mapping[str, str],
    *,
    supervisor: Supervisor,
    io: IoThread,
    timeout: float,
) -> Qemu:
    """Run any command that becomes a QEMU with the sockets of `spec` and return it as `launch`."""
    spec.check()
    deadline = Deadline(timeout)
    began = time.monotonic()
    try:
        spec.scratch.mkdir(parents=True, exist_ok=True)
        (spec.scratch / "shared").mkdir(exist_ok=True)
        spec.sockets.mkdir(mode=0o700, parents=True, exist_ok=True)
        for log in (spec.console_log, spec.qemu_log):
            log.parent.mkdir(parents=True, exist_ok=True)
        monitor = Monitor(io, spec.monitor_socket, name=spec.name)
    except OSError as error:
        raise QemuError(
            f"{spec.name} can't be started: {error}{full_disk(str(error), spec.places)}"
        ) from None
    process: Process | None = None
    try:
        process = supervisor.spawn(argv, env=env, cwd=spec.scratch, log=spec.qemu_log)
        monitor.connect(process, deadline.remaining())
        return Qemu(spec, process, monitor, time.monotonic() - began)
    except BaseException as error:
        monitor.close()
        ended = process.returncode if process is not None else None
        if process is not None:
            process.kill()
        if isinstance(error, MachineGoneError) and ended is not None:
            raise _failed(spec, f"ended with {describe_status(ended)}", ended) from None
        if isinstance(error, MachineGoneError):
            raise _failed(spec, "still ran when its QEMU was gone") from None
        if isinstance(error, QmpError):
            what = f"did not come up within {timeout:g} s" if deadline.expired else "failed"
            raise _failed(spec, f"{what} ({error})") from None
        if isinstance(error, QemuError):
            raise QemuError(f"{spec.name}: {error}{full_disk(str(error), spec.places)}") from None
        raise


def _failed(spec: LaunchSpec, what: str, status: int | None = None) -> QemuError:
    said = read_end(spec.qemu_log)
    text = f"{spec.name}: QEMU's start script {what}.{full_disk(said, spec.places, status)}"
    if said.strip():
        text += f"\nIt said:\n{quote(said, 25)}"
    else:
        text += " It said nothing."
    return QemuError(f"{text}\nStart script: {spec.start_script}\nIts output: {spec.qemu_log}")
