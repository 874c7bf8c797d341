"""Many isolated tests in one run: nothing of a clone is left when its test is over."""

from __future__ import annotations

import threading
from pathlib import Path

from pytest_nixvm.fleet import Wanted

MANY = 24


def test_clones_leave_nothing_behind(fleet_of):
    fleet = fleet_of("example")
    request = fleet._request()
    seen = []
    for number in range(MANY):
        vm = fleet.acquire("dev-vm", request, f"test-{number}")
        fleet.expect([Wanted(("dev-vm", request))] if number < MANY - 1 else [])
        assert vm.succeed("test ! -e /here && touch /here && echo fine") == "fine\n"
        pid, spec = vm.qemu.pid, vm.spec
        fleet.release(f"test-{number}")
        assert not Path(f"/proc/{pid}").exists()
        assert not spec.scratch.exists()
        assert not spec.sockets.exists()
        assert vm not in fleet.started
        seen.append((len(list(Path("/proc/self/fd").iterdir())), threading.active_count()))

    # A spare under way has some open; no more than one is.
    descriptors = [each for each, _ in seen]
    assert max(descriptors[MANY // 2 :]) <= max(descriptors[: MANY // 2])
    assert {threads for _, threads in seen[2:]} <= {seen[2][1], seen[2][1] + 1}
