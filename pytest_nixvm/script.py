"""Scripts of the NixOS test driver (`testScript`), run as they are.

The names that a script may use are the driver's (nixos/lib/test-driver, driver.py).
"""

from __future__ import annotations

import ast
import itertools
import linecache
import os
import re
import sys
import textwrap
import time
import types
import unittest
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pytest_nixvm.errors import ScriptError
from pytest_nixvm.script_conditions import Conditions
from pytest_nixvm.script_log import ScriptLog
from pytest_nixvm.script_machine import ScriptMachine
from pytest_nixvm.verbs.guest import DEFAULT_TIMEOUT
from pytest_nixvm.wait import timed_out

__tracebackhide__ = True  # the script's own lines are what its author reads

_number = itertools.count(1)


def run(text: str | Path, machines: Sequence[Maker], name: str = "testScript") -> None:
    """Run a script with `machines`: the name of each, and what makes it when it is needed.

    A path is read. Raises `ScriptError` for a syntax error, and whatever the script raises, with
    the script's own lines in the traceback.
    """
    if isinstance(text, Path):
        filename, source = str(text), text.read_text(encoding="utf-8")
    else:
        filename, source = f"<{name} {next(_number)}>", text
    log = ScriptLog()
    conditions = Conditions(log)
    wrapped = [ScriptMachine(each, make, log, conditions) for each, make in machines]
    code = compiled(source, filename)
    driver = ScriptDriver(wrapped, log, conditions)
    names = driver.names()
    try:
        exec(code, names)  # noqa: S102 - running the user's test is what this is for
        for machine in wrapped:
            machine.finish()
    except NameError as error:
        error.add_note(
            "The script has the names of the NixOS test driver, and of its machines: "
            f"{', '.join(each for each, _ in machines) or 'none'}."
        )
        raise
    finally:
        for machine in wrapped:
            machine.abandon()


Maker = tuple[str, Callable[[], Any]]
"""A machine's name in the script, and what makes it."""


def identifier(name: str) -> str:
    """Return a machine's name as a script writes it: "dev-vm" is dev_vm there."""
    return re.sub(r"^[^A-Za-z_]|[^A-Za-z0-9_]", "_", name)


# --- the text --------------------------------------------------------------------------------


def compiled(source: str, filename: str) -> types.CodeType:
    """Compile a script, pasted with whatever indentation. Raises `ScriptError`."""
    errors: list[SyntaxError] = []
    for candidate in _dedented(source):
        try:
            tree = ast.parse(candidate, filename)
        except SyntaxError as error:
            errors.append(error)
            continue
        _explain_assertions(tree, candidate, filename)
        # Tracebacks show these lines; no file is looked for, as there is no time of change.
        lines = candidate.splitlines(keepends=True)
        linecache.cache[filename] = (len(candidate), None, lines, filename)
        return compile(tree, filename, "exec", dont_inherit=True)
    raise ScriptError(_syntax_error(errors[0], filename)) from None


def _dedented(source: str) -> list[str]:
    """Return what `source` may mean, the likeliest first. Each keeps the numbers of its lines."""
    plain = textwrap.dedent(source)
    lines = source.expandtabs().splitlines()
    code = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    # Comments, or the first line after the opening quotes, may stand further left than the rest.
    found = [plain, _without_margin(lines, code)]
    if lines and lines[0].strip():
        found.append(_without_margin([lines[0].lstrip(), *lines[1:]], code[1:]))
    return found


def _without_margin(lines: Sequence[str], code: Sequence[str]) -> str:
    margin = min((len(line) - len(line.lstrip()) for line in code), default=0)
    cut = [line[min(margin, len(line) - len(line.lstrip())) :] for line in lines]
    return "\n".join(cut) + "\n"


def _syntax_error(error: SyntaxError, filename: str) -> str:
    text = (error.text or "").rstrip("\n")
    shown = text.lstrip()
    column = max(0, (error.offset or 1) - 1 - (len(text) - len(shown)))
    message = (
        f"The test script has a syntax error in line {error.lineno} of {filename}: {error.msg}"
        f"\n    {shown}\n    {' ' * column}^"
    )
    if "${" in shown:
        message += "\nIs that Nix's ${…}? Write what it stands for: the text is Python only."
    return message


def _explain_assertions(tree: ast.Module, source: str, filename: str) -> None:
    """Let failing assertions show their values, as those of pytest's test files do."""
    try:
        from _pytest.assertion.rewrite import rewrite_asserts
    except ImportError:  # not a public name of pytest's: the plain assertion will do
        return
    rewrite_asserts(tree, source.encode(), filename)


# --- the names -------------------------------------------------------------------------------


class ScriptDriver:
    """The `driver` of a script, and the names that its script has."""

    def __init__(
        self, machines: list[ScriptMachine], log: ScriptLog, conditions: Conditions
    ) -> None:
        self.machines = machines
        self.logger = log
        self.polling_condition = conditions.polling_condition
        self.subtest = log.subtest
        self.check_polling_conditions = conditions.check
        self.debug = _Debug(log)

    def names(self) -> dict[str, Any]:
        """Return a script's global names."""
        own = {
            "Machine": ScriptMachine,
            "create_machine": _Instead(
                "create_machine", "every machine is one of the flake: give its name in machines=[…]"
            ),
            "debug": self.debug,
            "driver": self,
            "join_all": self.join_all,
            "log": self.logger,
            "machines": self.machines,
            "os": os,
            "polling_condition": self.polling_condition,
            "retry": retry,
            "run_tests": self.run_tests,
            "serial_stdout_off": self.serial_stdout_off,
            "serial_stdout_on": self.serial_stdout_on,
            "start_all": self.start_all,
            "subtest": self.subtest,
            "t": _Assertions(),
            "test_script": self.test_script,
            "vlans": _Instead(
                "vlans",
                "machines have no VDE switches between them; vm.block() and vm.unblock() pull a "
                "machine's cables",
            ),
        }
        by_name = {identifier(machine.name): machine for machine in self.machines}
        if len(self.machines) == 1:
            by_name.setdefault("machine", self.machines[0])
        return {"__name__": "testScript", "__builtins__": __builtins__, **own, **by_name}

    @property
    def out_dir(self) -> Path:
        """Where what machines leave behind is, if there is one machine; else ask each."""
        if len(self.machines) != 1:
            raise ScriptError(
                "driver.out_dir: each machine has a directory of its own, NAME.out_dir."
            )
        return self.machines[0].out_dir

    def start_all(self) -> None:
        """Start all machines, at the same time; the first verb that needs one waits for it."""
        with self.logger.nested("start all VMs"):
            for machine in self.machines:
                machine.start()

    def join_all(self) -> None:
        """Wait until all machines have powered themselves off."""
        with self.logger.nested("wait for all VMs to finish"):
            for machine in self.machines:
                machine.wait_for_shutdown()

    def serial_stdout_on(self) -> None:
        """Do nothing: the serial console goes into a file, and a failure shows its end."""
        self.logger.log("The serial console is in console.log, beside the machine's other output.")

    def serial_stdout_off(self) -> None:
        """Do nothing: the serial console is not on stdout."""

    def test_script(self) -> NoReturn:
        """Raise `ScriptError`: in the driver, this is for its Python prompt."""
        raise ScriptError(
            "test_script() and run_tests() run the script, which is under way. They are for the "
            "driver's Python prompt."
        )

    run_tests = test_script


class _Instead:
    """A name of the driver's that means nothing here. Raises as soon as it is used."""

    def __init__(self, name: str, instead: str) -> None:
        self.__dict__["_message"] = (
            f"{name} is not there in a script run by pytest-nixvm: {instead}."
        )

    def __getattr__(self, name: str) -> NoReturn:
        raise ScriptError(self._message)

    def __call__(self, *_: object, **__: object) -> NoReturn:
        raise ScriptError(self._message)

    def __getitem__(self, key: object) -> NoReturn:
        raise ScriptError(self._message)

    def __iter__(self) -> NoReturn:
        raise ScriptError(self._message)

    def __len__(self) -> NoReturn:
        raise ScriptError(self._message)


class _Assertions(unittest.TestCase):
    """The `t` of a script: `t.assertEqual(a, b)` and its like."""

    maxDiff = None

    def runTest(self) -> None:
        """Do nothing; without it there is no object of this class."""


class _Debug:
    """The `debug` of a script."""

    def __init__(self, log: ScriptLog) -> None:
        self._log = log

    def breakpoint(self, host: str = "127.0.0.1", port: int = 4444) -> None:  # noqa: ARG002 - the driver's signature
        """Stop in the debugger, if somebody sits at the terminal."""
        if sys.stdin is not None and sys.__stdin__ is not None and sys.__stdin__.isatty():
            breakpoint()
        else:
            self._log.log("debug.breakpoint(): nobody sits at a terminal, so the script goes on.")


def retry(fn: Callable[[bool], Any], timeout_seconds: float = DEFAULT_TIMEOUT) -> None:
    """Call `fn` every second until it returns something true.

    It is given whether this is the last try, which it is after `timeout_seconds`. Raises
    `WaitTimeoutError` when that is in vain too.
    """
    end = time.monotonic() + timeout_seconds
    while time.monotonic() < end:
        if fn(False):
            return
        time.sleep(1)
    if not fn(True):
        raise timed_out(f"{getattr(fn, '__name__', 'a function')}() to succeed", timeout_seconds)


def makers(machines: Mapping[str, Any] | Sequence[Any], make: Callable[[str], Any]) -> list[Maker]:
    """Return the machines of `Fleet.run_test_script`, by their names in the script.

    A string is a machine of the flake, which `make` makes; anything else is a machine already.
    Raises `ScriptError` for names that a script can't tell apart.
    """
    pairs = (
        list(machines.items())
        if isinstance(machines, Mapping)
        else [(each if isinstance(each, str) else each.name, each) for each in machines]
    )
    found: list[Maker] = []
    taken: dict[str, str] = {}
    for name, machine in pairs:
        written = identifier(name)
        if written in taken:
            raise ScriptError(
                f"A script can't tell the machines {taken[written]!r} and {name!r} apart, both are "
                f'{written} there. Name them: machines={{"one": …, "two": …}}.'
            )
        taken[written] = name
        maker = (lambda m=machine: make(m)) if isinstance(machine, str) else (lambda m=machine: m)
        found.append((name, maker))
    return found
