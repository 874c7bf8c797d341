"""Many isolated tests in one run: nothing of a clone is left when its test is over."""

from __future__ import annotations

import threading
from pathlib import Path

from pytest_nixvm.fleet import Wanted
from pytest_nixvm.wait import poll

MANY = 24


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_clones_leave_nothing_behind(fleet_of):
    fleet = fleet_of("example")
    request = fleet._request()

    def use(scope: str, following: list[Wanted]) -> None:
        vm = fleet.acquire("dev-vm", request, scope)
        fleet.expect(following)
        assert vm.succeed("test ! -e /here && touch /here && echo fine") == "fine\n"
        pid, spec = vm.qemu.pid, vm.spec
        fleet.release(scope)
        assert vm not in fleet.started
        assert not Path(f"/proc/{pid}").exists()
        assert not spec.scratch.exists()
        assert not spec.sockets.exists()

    use("before", [Wanted(("dev-vm", request))])  # what stays for the session is made now
    use("first", [])
    files, threads = open_files(), threading.active_count()
    for number in range(MANY):
        use(f"test-{number}", [Wanted(("dev-vm", request))] if number < MANY - 1 else [])

    # The sockets of a VM that has ended are closed by another thread.
    poll(lambda: open_files() <= files, "the files of clones to be closed", timeout=60)
    poll(lambda: threading.active_count() <= threads, "the threads of clones to end", timeout=60)
