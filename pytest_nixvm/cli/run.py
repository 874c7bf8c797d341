"""`nixvm run`: a VM to use, in the foreground, with a disk that is kept."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import click

from pytest_nixvm import wishes
from pytest_nixvm.cli.common import Context, with_flake
from pytest_nixvm.cli.completion import complete_directories, complete_machines
from pytest_nixvm.disks import KeptDisk, backing_file, virtual_size
from pytest_nixvm.errors import FlakeError
from pytest_nixvm.flake.build import Override, VmBuild
from pytest_nixvm.flake.nix import Nix, NixFailure
from pytest_nixvm.use import Use, Wishes

_BOOT_TIMEOUT = 900  # seconds; a person who has waited enough presses Ctrl-C
_ROOT_TIMEOUT = 60.0  # seconds
_NEW_DISK = re.compile(r'"\$NIX_DISK_IMAGE"[\s\\]+"(\d+)M"')  # in NixOS' start script
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@click.command(epilog="It is used with `nixvm ssh NAME` and `nixvm console NAME`.")
@click.argument("name", metavar="NAME", shell_complete=complete_machines)
@with_flake
@click.option(
    "--window/--headless",
    default=None,
    help="With or without a window (default: as virtualisation.graphics says).",
)
@click.option("--fresh", is_flag=True, help="Remove the disk of earlier runs and begin anew.")
@click.option(
    "-p",
    "--port",
    "ports",
    metavar="HOST:GUEST",
    multiple=True,
    help="Forward a TCP port of 127.0.0.1 to one of the guest.",
)
@click.option(
    "--share",
    "directories",
    metavar="DIR[:GUESTPATH][:ro]",
    multiple=True,
    shell_complete=complete_directories,
    help="Share a directory with the guest (default: at /mnt/NAME).",
)
@click.option("--memory", type=click.IntRange(min=1), metavar="MIB", help="Its memory.")
@click.option("--cores", type=click.IntRange(min=1), metavar="N", help="Its processors.")
def command(
    context: Context,
    name: str,
    window: bool | None,
    fresh: bool,
    ports: Sequence[str],
    directories: Sequence[str],
    memory: int | None,
    cores: int | None,
) -> int:
    """Start a VM to use: a window or none, a disk that is kept.

    It runs until it is powered off, from inside or with Ctrl-C here; Ctrl-C again cuts its power.
    Unlike a VM under test it reaches the network.
    """
    wanted = Wishes(
        window=window,
        fresh=fresh,
        memory=memory,
        cores=cores,
        forwards=wishes.forwards(ports),
        shares=wishes.shares(directories),
    )
    info = context.named(name)
    flake = context.flake.reference.url
    notes = _Notes()
    with KeptDisk(info.name, f"{flake}#{info.attribute}", fresh=fresh) as disk:
        wishes.check_free(wanted.forwards)
        wishes.check_display(window)
        build = context.catalogue.build(info.name)
        if not fresh:
            for note in out_of_date(disk, build):
                notes.add(note)
        use = Use(
            build,
            disk,
            wanted,
            flake=flake,
            settings=context.with_changes(isolation="session", boot_timeout=_BOOT_TIMEOUT),
            catalogue=context.catalogue,
            say=notes.add,
        )
        use.check()  # before the old disk is left without its image
        if build.image:
            hold_image(disk, build, context.catalogue.nix, fresh=fresh)
        with _signals() as ignore, use:
            try:
                _start(use)
                context.progress.close()
                notes.show()
                return _wait(use, _what_runs(use, wanted, build.overrides))
            finally:
                ignore()


def _start(use: Use) -> None:
    try:
        use.start()
    except KeyboardInterrupt:
        # Whoever has waited enough wants to know for what.
        if use.console_log is not None:
            _say(f"\n{use.name} had not booted yet. What its console has shown: {use.console_log}")
        raise


def out_of_date(disk: KeptDisk, build: VmBuild) -> Iterator[str]:
    """Say what of the configuration a disk of earlier runs does not have."""
    below = backing_file(disk.path)
    if build.image and below and not below.is_relative_to(build.output):
        yield (
            f"{build.name}'s disk was made of an older image: the system on it is that one's. "
            "--fresh begins anew, with the image as it is now."
        )
    size = virtual_size(disk.path)
    new = _NEW_DISK.search(build.start_script.read_text(errors="replace"))
    if size is not None and new is not None and size != int(new[1]) << 20:
        yield (
            f"{build.name}'s disk is that of earlier runs and has {size >> 20} MiB, not the "
            f"{new[1]} MiB of virtualisation.diskSize. --fresh begins anew."
        )


def hold_image(disk: KeptDisk, build: VmBuild, nix: Nix, *, fresh: bool) -> None:
    """Keep the image that a disk is made over: without it nothing that is on the disk can be read.

    The cache lets an image go when the configuration has another. Raises `FlakeError`.
    """
    below = None if fresh else backing_file(disk.path)
    store = build.output.parent
    image = build.output
    if below is not None and below.is_relative_to(store):
        image = store / below.relative_to(store).parts[0]
    try:
        nix.realise(str(image), "", disk.root, timeout=_ROOT_TIMEOUT)
    except NixFailure as failure:
        raise FlakeError(f"{build.name}'s image can't be kept for its disk: {failure}") from None


class _Notes:
    """What a person is told besides: shown behind the progress of the start, later at once."""

    def __init__(self) -> None:
        self._waiting: list[str] | None = []

    def add(self, text: str) -> None:
        if self._waiting is None:
            _say(text)
        else:
            self._waiting.append(text)

    def show(self) -> None:
        waiting, self._waiting = self._waiting, None
        for text in waiting or ():
            _say(text)


def _say(text: str) -> None:
    # The terminal may have been closed: then the guest powers off all the same, unheard.
    with contextlib.suppress(OSError):
        click.echo(text, err=True)


def _wait(use: Use, told: str) -> int:
    """Say that it runs, wait for its end, by itself or by a signal, and return the exit status."""
    try:
        with contextlib.suppress(OSError):  # nobody reads that any more: it runs all the same
            click.echo(told)
        _say(f"{use.name} has ended: {use.wait()}.")
    except KeyboardInterrupt:
        _say(f"\n{use.name} powers down. Ctrl-C again cuts its power.")
        try:
            use.power_down()
        except KeyboardInterrupt:
            _say(f"\n{use.name}'s power is cut.")
            raise
        _say(f"{use.name} is off.")
    return 0


def _what_runs(use: Use, wanted: Wishes, overrides: Sequence[Override]) -> str:
    lines = [f"{use.name} runs{'' if use.window else ', without a window'}."]
    lines += [f"    its disk is kept: {use.disk.path}"] if use.disk is not None else []
    lines += [f"    differs from its configuration: {o.option} = {o.value}" for o in overrides]
    for forward in wanted.forwards:
        lines.append(f"    127.0.0.1:{forward.host} is its port {forward.guest}")
    for share in wanted.shares:
        how = ", read-only" if share.readonly else ""
        lines.append(f"    {share.source} is its {share.target}{how}")
    lines += [
        f"    log in:         nixvm ssh {use.name}",
        f"    serial console: nixvm console {use.name}",
        "Ctrl-C powers it down.",
    ]
    return "\n".join(lines)


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], None]]:
    """Take the signals that end us for Ctrl-C. What is given stops that: the end is under way."""
    before = {number: signal.getsignal(number) for number in _ENDING}

    def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        # A closed terminal tells it twice, by the shell and by the kernel: that hurries nobody.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        raise KeyboardInterrupt

    def ignore() -> None:
        for number in _ENDING:
            signal.signal(number, signal.SIG_IGN)

    try:
        for number in _ENDING:
            if number != signal.SIGHUP or before[number] != signal.SIG_IGN:  # nohup's wish
                signal.signal(number, interrupt)
        yield ignore
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
