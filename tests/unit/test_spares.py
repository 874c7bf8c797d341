"""Spares: made in the background, handed out once, ended when nobody wants them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from _guest import until

from pytest_nixvm.errors import MachineGoneError, QemuError, SettingsError
from pytest_nixvm.spares import MOST, Spares, Want


class Machine:
    """A clone that notes what was done to it; `wait` holds it while it is loaded."""

    def __init__(self, factory: Factory, name: str) -> None:
        self.name = name
        self.factory = factory
        self.qemu = SimpleNamespace(alive=False)
        self.warmed_for: tuple[str | None, ...] | None = None
        self.cleared = 0
        self.rested = False

    def __repr__(self) -> str:
        return self.name

    def load(self) -> None:
        with self.factory.loading():
            self.factory.began.release()
            assert self.factory.go.acquire(timeout=10)
            if self.factory.trouble is not None:
                raise self.factory.trouble
            self.qemu.alive = True

    def rest(self) -> None:
        with self.factory.changed:
            self.rested = True
            self.factory.changed.notify_all()

    def is_loaded(self) -> bool:
        return self.qemu.alive

    def warm(self, users: tuple[str | None, ...]) -> None:
        self.warmed_for = tuple(users)


class Factory:
    """A workshop, and what makes the machines."""

    def __init__(self) -> None:
        self.made: list[Machine] = []
        self.cleared: list[Machine] = []
        self.started_ones: list[Machine] = []
        self.memory = 100  # machines
        self.contended = False
        self.trouble: Exception | None = None
        self.began = threading.Semaphore(0)  # a load each
        self.go = threading.Semaphore(10**6)  # loads that may go on
        self.most_at_once = 0
        self._at_once = 0
        self.changed = threading.Condition()

    def hold(self) -> None:
        """Let every load wait for `go.release()`."""
        self.go = threading.Semaphore(0)

    def loading(self) -> Any:
        factory = self

        class Loading:
            def __enter__(self) -> None:
                factory._at_once += 1
                factory.most_at_once = max(factory.most_at_once, factory._at_once)

            def __exit__(self, *_: object) -> None:
                factory._at_once -= 1

        return Loading()

    def want(self, template: object, *users: str | None) -> Want:
        def make() -> Machine:
            self.made.append(Machine(self, f"{template}-{len(self.made)}"))
            return self.made[-1]

        return Want(template, make, users)  # type: ignore[arg-type]

    def until(self, condition: Any) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, 10)

    # the workshop
    def reserve(self, _: Machine, *, wait: bool = True) -> bool:
        assert not wait  # a spare is never worth a wait
        if self.memory == 0:
            return False
        self.memory -= 1
        return True

    def is_contended(self) -> bool:
        return self.contended

    def started(self, machine: Machine) -> None:
        self.started_ones.append(machine)

    def clear(self, machine: Machine) -> None:
        machine.qemu.alive = False
        with self.changed:
            self.cleared.append(machine)
            self.changed.notify_all()


@pytest.fixture
def factory() -> Factory:
    return Factory()


@pytest.fixture
def spares(factory: Factory) -> Iterator[Spares]:
    spares = Spares(factory)  # type: ignore[arg-type]
    spares.enabled = True
    yield spares
    for _ in range(10):
        factory.go.release()
    spares.close()


def take(spares: Spares, template: str) -> Any:
    return spares.take(template)  # type: ignore[arg-type]


def test_a_spare_is_ready_when_it_is_taken_and_taken_once(spares: Spares, factory: Factory) -> None:
    spares.expect([factory.want("web", "alice", None)])
    assert factory.began.acquire(timeout=10)

    machine = take(spares, "web")

    assert machine is factory.made[0]
    assert machine.qemu.alive
    assert machine.warmed_for == ("alice", None)
    assert factory.started_ones == [machine]
    assert take(spares, "web") is None
    assert factory.cleared == []


def test_there_is_none_of_a_template_that_was_not_expected(
    spares: Spares, factory: Factory
) -> None:
    assert take(spares, "web") is None
    spares.expect([factory.want("web")])
    assert factory.began.acquire(timeout=10)
    assert take(spares, "db") is None
    assert take(spares, "web") is not None


def test_one_that_is_under_way_is_waited_for(spares: Spares, factory: Factory) -> None:
    factory.hold()
    spares.expect([factory.want("web")])
    assert factory.began.acquire(timeout=10)
    taken: list[Any] = []
    thread = threading.Thread(target=lambda: taken.append(take(spares, "web")))
    thread.start()
    assert taken == []

    factory.go.release()

    thread.join(10)
    assert taken == factory.made
    assert taken[0].qemu.alive


def test_one_that_was_not_begun_is_not_waited_for(spares: Spares, factory: Factory) -> None:
    factory.hold()
    spares.expect([factory.want("web"), factory.want("db")])
    assert factory.began.acquire(timeout=10)

    assert take(spares, "db") is None

    factory.go.release()
    assert take(spares, "web") is factory.made[0]
    assert len(factory.made) == 1  # nobody needs the other one any more


def test_one_is_prepared_at_a_time(spares: Spares, factory: Factory) -> None:
    factory.hold()
    spares.expect([factory.want("web"), factory.want("db"), factory.want("web")])
    for number in range(3):
        assert factory.began.acquire(timeout=10)
        assert len(factory.made) == number + 1
        factory.go.release()

    assert {take(spares, "web"), take(spares, "web"), take(spares, "db")} == set(factory.made)
    assert factory.most_at_once == 1


def test_there_are_never_too_many(spares: Spares, factory: Factory) -> None:
    spares.expect([factory.want(f"vm-{number}") for number in range(MOST + 2)])

    taken = [take(spares, f"vm-{number}") for number in range(MOST + 2)]

    assert taken[MOST:] == [None, None]
    assert len(factory.made) <= MOST


def test_what_is_wanted_again_is_kept_and_the_rest_is_ended(
    spares: Spares, factory: Factory
) -> None:
    spares.expect([factory.want("web"), factory.want("db")])
    factory.began.acquire(timeout=10)
    factory.began.acquire(timeout=10)

    spares.expect([factory.want("db"), factory.want("mail")])

    factory.until(lambda: factory.cleared)
    assert [str(each) for each in factory.cleared] == ["web-0"]
    assert str(take(spares, "db")) == "db-1"
    assert take(spares, "web") is None


def test_a_spare_serves_who_logs_in_as_nobody_but_not_the_other_way_round(
    spares: Spares, factory: Factory
) -> None:
    spares.expect([factory.want("web", "alice")])
    factory.began.acquire(timeout=10)
    spares.expect([factory.want("web")])
    assert len(factory.made) == 1

    spares.expect([factory.want("web", "bob")])
    factory.until(lambda: factory.cleared)
    assert take(spares, "web") in (None, *factory.made[1:])
    assert factory.cleared == factory.made[:1]


def test_nobody_waits_for_one_that_is_under_way_and_unwanted(
    spares: Spares, factory: Factory
) -> None:
    factory.hold()
    spares.expect([factory.want("web")])
    assert factory.began.acquire(timeout=10)

    spares.expect([factory.want("db")])  # returns, although the load of the other goes on

    assert factory.cleared == []
    factory.go.release()
    assert factory.began.acquire(timeout=10)  # the next one, and not before the other was ended
    assert factory.cleared == factory.made[:1]
    factory.go.release()
    assert take(spares, "db") is factory.made[1]


def test_without_memory_there_is_none_and_nothing_is_left(spares: Spares, factory: Factory) -> None:
    factory.memory = 0
    spares.expect([factory.want("web")])
    factory.until(lambda: factory.cleared)
    assert factory.cleared == factory.made
    assert take(spares, "web") is None
    assert factory.started_ones == []


def test_room_is_made_by_ending_one_after_the_other(spares: Spares, factory: Factory) -> None:
    spares.expect([factory.want("web"), factory.want("db")])
    factory.began.acquire(timeout=10)
    factory.began.acquire(timeout=10)

    assert spares.drop()
    assert len(factory.cleared) == 1
    assert spares.drop()
    assert set(factory.cleared) == set(factory.made)
    assert not spares.drop()
    assert (take(spares, "web"), take(spares, "db")) == (None, None)


def test_room_is_made_of_one_that_is_under_way(spares: Spares, factory: Factory) -> None:
    factory.hold()
    spares.expect([factory.want("web"), factory.want("db")])
    assert factory.began.acquire(timeout=10)
    dropped: list[bool] = []
    thread = threading.Thread(target=lambda: dropped.append(spares.drop()))
    thread.start()
    until(lambda: not spares._spares, "the spare to be taken away")
    factory.go.release()
    thread.join(10)

    assert dropped == [True]
    assert factory.cleared == factory.made
    assert len(factory.made) == 1  # what was not begun is not begun either


@pytest.mark.parametrize(
    "trouble", [QemuError("no"), MachineGoneError("no"), SettingsError("no"), OSError(28, "full")]
)
def test_a_trouble_while_one_is_prepared_is_nobody_s(
    spares: Spares, factory: Factory, trouble: Exception
) -> None:
    factory.trouble = trouble
    spares.expect([factory.want("web")])
    factory.until(lambda: factory.cleared)
    assert factory.cleared == factory.made
    assert take(spares, "web") is None

    factory.trouble = None
    spares.expect([factory.want("web")])
    assert factory.began.acquire(timeout=10)
    assert factory.began.acquire(timeout=10)
    assert take(spares, "web") is factory.made[1]


def test_one_that_can_not_even_be_made_is_nobody_s_trouble(
    spares: Spares, factory: Factory
) -> None:
    failed = threading.Event()

    def make() -> Any:
        failed.set()
        raise SettingsError("the disk is full")

    spares.expect([Want("web", make)])  # type: ignore[arg-type]
    assert failed.wait(10)
    assert take(spares, "web") is None
    spares.expect([factory.want("db")])
    assert factory.began.acquire(timeout=10)
    assert take(spares, "db") is factory.made[0]


def test_one_that_has_died_is_not_handed_out(spares: Spares, factory: Factory) -> None:
    spares.expect([factory.want("web"), factory.want("db")])
    factory.began.acquire(timeout=10)
    factory.began.acquire(timeout=10)  # the first one is ready
    factory.made[0].qemu.alive = False

    assert take(spares, "web") is None
    assert factory.cleared == factory.made[:1]


def test_the_end_ends_all_of_them_and_the_thread(factory: Factory) -> None:
    spares = Spares(factory)  # type: ignore[arg-type]
    spares.enabled = True
    factory.hold()
    spares.expect([factory.want("web"), factory.want("db"), factory.want("mail")])
    assert factory.began.acquire(timeout=10)
    factory.go.release()
    assert factory.began.acquire(timeout=10)  # one is ready, one is under way
    factory.go.release()

    spares.close()

    assert set(factory.cleared) == set(factory.made)
    assert not [each for each in threading.enumerate() if each.name == "nixvm-spare"]
    spares.expect([factory.want("web")])
    assert take(spares, "web") is None
    assert len(factory.made) <= 3
    spares.close()


def test_a_single_processor_is_the_test_s(factory: Factory) -> None:
    spares = Spares(factory)  # type: ignore[arg-type]
    spares.enabled = False
    spares.expect([factory.want("web")])
    assert take(spares, "web") is None
    assert factory.made == []
    spares.close()


def test_one_that_nobody_takes_is_paused(
    factory: Factory, spares: Spares, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_nixvm.spares.LINGER", 0.01)
    spares.expect([factory.want("a")])
    with factory.changed:
        assert factory.changed.wait_for(lambda: factory.made and factory.made[0].rested, 10)
    assert take(spares, "a") is factory.made[0]


def test_spares_end_while_another_process_waits_for_memory(
    factory: Factory, spares: Spares
) -> None:
    ready = factory.want("a")
    spares.expect([ready])
    assert ready.done.wait(10)
    factory.contended = True
    spares.expect([factory.want("a")])
    with factory.changed:
        assert factory.changed.wait_for(lambda: factory.cleared == factory.made, 10)
    assert len(factory.made) == 1
    assert take(spares, "a") is None
