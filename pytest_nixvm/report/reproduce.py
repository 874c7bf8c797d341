"""How a failed test is run again, and what it ran on."""

from __future__ import annotations

import platform
import shlex
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import pytest

from pytest_nixvm.options import OPTIONS, Option
from pytest_nixvm.settings import Settings

if TYPE_CHECKING:
    from pytest_nixvm.machine import Machine

# pytest's own options that decide what a test is; the rest selects, or only shows.
_OWN = ("-c", "--config-file", "-o", "--override-ini", "-p", "--rootdir", "--confcutdir")


def command(config: pytest.Config, settings: Settings, nodeid: str) -> str:
    """Return the shell command that runs one test again, the way it ran now.

    What the ini file says is not repeated: pytest reads it again.
    """
    words = ["pytest", *_own(list(config.invocation_params.args))]
    for option in OPTIONS:
        if option.name not in ("output", "keep"):
            words += _words(option, config.getoption(option.ini), settings)
    words.append(nodeid)
    return f"cd {shlex.quote(str(config.rootpath))} && {shlex.join(words)}"


def _words(option: Option, value: object, settings: Settings) -> list[str]:
    """Return an option as it was given, with references and paths made absolute."""
    if value in (None, [], False):
        return []
    if option.values == 0:
        return [option.flag]
    name = option.ini.removeprefix("nixvm_")
    absolute = getattr(settings, "from_" if name == "from" else name)
    if option.values == 2:
        return [word for pair in absolute for word in (option.flag, *pair)]
    if option.repeat:
        return [f"{option.flag}={each}" for each in absolute]
    return [f"{option.flag}={absolute if isinstance(absolute, str) or name == 'cache' else value}"]


def _own(arguments: list[str]) -> list[str]:
    kept = []
    while arguments:
        word = arguments.pop(0)
        name, equals, _ = word.partition("=")
        if name in _OWN:
            kept.append(word)
            if not equals and arguments:
                kept.append(arguments.pop(0))
        elif word[:2] in ("-c", "-o", "-p") and not word.startswith("--"):
            kept.append(word)
    return kept


def versions(settings: Settings, machines: list[Machine]) -> str:
    """Return what is known of the host and of what was built, a line each."""
    lines = [
        f"{name}: {_version(name)}"
        for name in ("pytest-nixvm", "pytest", "qemu.qmp", "paramiko", "pytest-xdist")
    ]
    lines.append(f"Python: {platform.python_version()}")
    lines.append(f"host: {platform.platform()}")
    lines.append(f"flake: {settings.flake}")
    for machine in machines:
        build = machine.build
        lines.append(f"{machine.build.name}: {build.toplevel or build.start_script}")
        lines.append(f"{machine.build.name}: accelerator {machine.spec.accelerator.name}")
        if machine.qemu_version:
            lines.append(f"{machine.build.name}: QEMU {'.'.join(map(str, machine.qemu_version))}")
        lines += [
            f"{machine.build.name}: not as configured: {each.option} = {each.value} ({each.reason})"
            for each in build.overrides
        ]
    return "\n".join(lines) + "\n"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
