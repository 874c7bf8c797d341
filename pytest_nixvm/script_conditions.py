"""Conditions that must hold while a test script does something else: `polling_condition`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from pytest_nixvm.errors import PollingConditionError
from pytest_nixvm.script_log import ScriptLog
from pytest_nixvm.verbs.guest import DEFAULT_TIMEOUT
from pytest_nixvm.wait import poll

__tracebackhide__ = True  # the script's own lines are what its author reads

T = TypeVar("T")

INTERVAL = 2.0
"""Seconds between two checks of a condition, as in the NixOS test driver."""


class Condition:
    """A function of the script that must stay true.

    Inside `with condition:` it is checked before each of the machines' verbs and, every `interval`
    seconds, while one is under way. `wait` waits until it is true.
    """

    def __init__(
        self,
        function: Callable[[], Any],
        conditions: Conditions,
        interval: float,
        description: str | None,
    ) -> None:
        self.function = function
        self.interval = interval
        name: str = getattr(function, "__name__", "condition")
        text = description or function.__doc__ or name
        self.description = " ".join(text.split())
        self._conditions = conditions
        self._last: float | None = None
        self._entered = False
        self._cause: Exception | None = None

    def __enter__(self) -> None:
        self._conditions.active.append(self)

    def __exit__(self, *_: object) -> None:
        self._conditions.active.remove(self)

    def wait(self, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Wait until the condition is true. Raises `WaitTimeoutError` after `timeout` seconds."""
        with self._conditions.log.nested(f"waiting for {self.description}"):
            poll(
                lambda: self.check(force=True),
                f"the polling condition {self.description!r}",
                timeout=timeout,
                saw=lambda: f"It raised {self._cause!r} at the end." if self._cause else "",
            )

    @property
    def due_in(self) -> float:
        """The seconds until the next check is due."""
        return 0.0 if self._last is None else self._last + self.interval - time.monotonic()

    def check(self, force: bool = False) -> bool:
        """Return whether it holds; one that is not due, or is being checked, is not called.

        A condition that returns None holds, one that raises does not.
        """
        if (self._entered or self.due_in > 0) and not force:
            return True
        self._entered = True
        self._cause = None
        try:
            with self._conditions.inside():
                result = self.function()
        except Exception as error:
            self._cause = error
            return False
        finally:
            self._entered = False
            self._last = time.monotonic()
        return result is None or bool(result)

    def maybe_raise(self) -> None:
        """Check it if that is due. Raises `PollingConditionError`."""
        if not self.check():
            raise PollingConditionError(
                f"The polling condition {self.description!r} does not hold any more."
            ) from self._cause


class Conditions:
    """The conditions of one script, and the verbs that they are checked beside."""

    def __init__(self, log: ScriptLog) -> None:
        self.log = log
        self.active: list[Condition] = []
        self._here = threading.local()

    def polling_condition(
        self,
        fun_: Callable[[], Any] | None = None,
        *,
        seconds_interval: float = INTERVAL,
        description: str | None = None,
    ) -> Any:
        """Make a condition of a function; a decorator, with or without arguments."""

        def decorate(function: Callable[[], Any]) -> Condition:
            return Condition(function, self, seconds_interval, description)

        return decorate if fun_ is None else decorate(fun_)

    def inside(self) -> _Inside:
        """A block in which a condition is being checked: its own verbs check none."""
        return _Inside(self._here)

    def check(self) -> None:
        """Check those that are due. Raises `PollingConditionError`."""
        for condition in tuple(self.active):
            condition.maybe_raise()

    def beside(self, verb: Callable[[], T]) -> T:
        """Call `verb` and return what it returns; check the conditions before and meanwhile.

        Raises `PollingConditionError` as soon as one does not hold. The verb is not waited for any
        longer then; a command that it has begun goes on in the guest until its own time is over.
        """
        if not self.active or getattr(self._here, "inside", False):
            return verb()
        self.check()
        call: _Call[T] = _Call(verb)
        thread = threading.Thread(target=call.run, name="nixvm script verb", daemon=True)
        thread.start()
        while not call.done.wait(max(0.05, min((c.due_in for c in self.active), default=INTERVAL))):
            self.check()
        return call.result()


class _Inside:
    def __init__(self, here: threading.local) -> None:
        self._here = here

    def __enter__(self) -> None:
        self._before = getattr(self._here, "inside", False)
        self._here.inside = True

    def __exit__(self, *_: object) -> None:
        self._here.inside = self._before


class _Call(Generic[T]):
    """A call in another thread, with its outcome."""

    def __init__(self, function: Callable[[], T]) -> None:
        self.done = threading.Event()
        self._function = function
        self._value: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._value.append(self._function())
        except BaseException as error:
            self._error = error
        finally:
            self.done.set()

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._value[0]
