"""How the use of a VM ends, and what is done in it: a machine that is none stands for it."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from pytest_nixvm import use as module
from pytest_nixvm.errors import (
    AgentError,
    GuestPanicError,
    MachineError,
    MachineGoneError,
    QemuError,
)
from pytest_nixvm.flake.build import VmBuild
from pytest_nixvm.qemu.monitor import Event
from pytest_nixvm.settings import Settings
from pytest_nixvm.use import Use, Wishes
from pytest_nixvm.wishes import Share


class Process:
    def __init__(self):
        self.returncode = None
        self.asked = threading.Event()

    def wait(self, timeout):
        if self.returncode is None:
            raise TimeoutError
        return self.returncode


class Qemu:
    """A QEMU that ends when its power button is pressed."""

    alive = True

    def __init__(self):
        self.process = Process()
        self.pressed = False

    def powerdown(self):
        self.pressed = True
        self.process.returncode = 0

    def cause_of_death(self):
        if self.process.returncode:
            return f"QEMU ended with exit status {self.process.returncode}"
        return "the guest shut down; QEMU ended with exit status 0"


class Agent:
    def __init__(self, qemu):
        self.scripts = []
        self.fails = ""
        self.gone = False
        self._qemu = qemu

    def exec(self, argv, timeout):
        if self.gone:
            raise AgentError("no answer")
        self.scripts.append(argv[4:])
        return SimpleNamespace(ok=not self.fails, stderr=self.fails, returncode=32)

    def ping(self, timeout):
        if self.gone:
            raise AgentError("no answer")

    def shutdown(self, mode):
        if self.gone:
            raise AgentError("no answer")
        self._qemu.process.returncode = 0


class Console:
    shown = "[  1.0] Kernel panic - not syncing: what happened\n"

    def mark(self):
        return len(self.shown)

    def text(self, since):
        return self.shown[since:]

    def tail(self, lines):
        return self.shown


class Machine:
    def __init__(self, tmp_path, qemu):
        self.agent = Agent(qemu)
        self.spec = SimpleNamespace(console_log=tmp_path / "console.log")
        self.console = Console()
        self.reconnected = 0
        self.forgotten = 0
        self.users = []

    def reconnect(self, timeout):
        self.reconnected += 1

    def ssh_as(self, user):
        self.users.append(user)
        if user == "nobody":
            raise MachineError("There is no SSH.")
        return SimpleNamespace(command_line="ssh -p 22 root@127.0.0.1")

    def forget_keys(self):
        self.forgotten += 1
        raise AgentError("one of them stays")


@pytest.fixture
def use(tmp_path):
    script = tmp_path / "run-vm"
    script.write_text("exec qemu\n")
    said = []
    build = VmBuild("vm", "a.vm", script, tmp_path, None, "", (), False, 0, 0)
    use = Use(
        build,
        SimpleNamespace(path=Path("/disk")),
        Wishes(shares=(Share(tmp_path, "/mnt/x"), Share(tmp_path, "/mnt/y", readonly=True))),
        flake="git+file:///a",
        settings=Settings.make(cache=str(tmp_path / "cache")),
        catalogue=SimpleNamespace(progress=None, out=None),
        say=said.append,
    )
    use.said = said
    qemu = use._qemu = Qemu()
    use._machine = Machine(tmp_path, qemu)
    use._ready.set()
    return use


def happens(use, name: str) -> None:
    use._read_event(Event(0, name, {}, 0.0))


def ends(use, status: int) -> None:
    use._qemu.process.returncode = status
    use._stirred.set()


def test_guest_that_powers_off_ends_it_well(use):
    ends(use, 0)
    assert use.wait() == "the guest shut down"


def test_qemu_that_fails_is_an_error(use):
    ends(use, 1)
    with pytest.raises(QemuError, match=r"vm has ended: QEMU ended with exit status 1\."):
        use.wait()


def test_panic_is_told_with_the_console(use):
    happens(use, "GUEST_PANICKED")
    with pytest.raises(GuestPanicError, match=r"(?s)vm's kernel panicked.*not syncing"):
        use.wait()


def test_panic_without_a_device_that_tells_is_read_from_the_console(use):
    use._machine.agent.gone = True
    use._read_console()
    with pytest.raises(GuestPanicError, match="what happened"):
        use.wait()


def test_last_words_of_a_vm_that_was_ended_are_no_error(use):
    class Ended(Machine):
        @property
        def console(self):
            raise MachineGoneError("vm is not running")

        @console.setter
        def console(self, value):
            pass

    use._machine = Ended(Path("/"), use._qemu)
    use._read_console()
    assert not use._suspect


def test_console_that_is_asked_for_before_qemu_runs_is_waited_for(use, monkeypatch):
    console, asked = use._machine.console, []

    class Starting(Machine):
        @property
        def console(self):
            asked.append(1)
            if len(asked) < 3 or len(asked) > 4:
                raise MachineGoneError("vm is not running; vm.start() starts it.")
            return console

        @console.setter
        def console(self, value):
            pass

    use._machine = Starting(Path("/"), use._qemu)
    assert use.serial_console() is console
    monkeypatch.setattr(module, "_CONSOLE", 0.1)
    assert use.serial_console() is console
    with pytest.raises(MachineError, match="vm is being started: try again in a moment"):
        use.serial_console()


def test_panic_that_somebody_reads_in_the_journal_is_none(use):
    use._read_console()
    ping = use._machine.agent.ping

    def then_end(timeout):
        ping(timeout)
        ends(use, 0)

    use._machine.agent.ping = then_end
    assert use.wait() == "the guest shut down"


def test_full_disk_pauses_it_until_there_is_room(use, monkeypatch):
    free = [0, 0, 2**40]
    resumed = []

    def resume():
        resumed.append(len(use.said))
        ends(use, 0)

    use._qemu.resume = resume
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=free.pop(0)))
    monkeypatch.setattr(module, "_RETRY", 0.01)
    use._read_event(Event(1, "BLOCK_IO_ERROR", {"nospace": True}, 0.0))
    use.wait()
    assert use.said == ["The disk under / is full. vm pauses until there is room."]
    assert resumed == [1]


def test_reboot_mounts_the_shares_again(use):
    happens(use, "RESET")
    reconnect = use._machine.reconnect

    def then_end(timeout):
        reconnect(timeout)
        ends(use, 0)

    use._machine.reconnect = then_end
    use.wait()
    assert use._machine.reconnected == 1
    assert use._machine.agent.scripts == [
        ["nixvm-share0", "/mnt/x", "rw"],
        ["nixvm-share1", "/mnt/y", "ro"],
    ]


def test_share_that_can_not_be_mounted_is_an_error_and_after_a_reboot_a_remark(use, tmp_path):
    use._machine.agent.fails = "mount: unknown filesystem type '9p'"
    with pytest.raises(MachineError, match=f"{tmp_path} can't be mounted at /mnt/x in vm: mount:"):
        use._mount()
    happens(use, "RESET")
    use._stirred.clear()
    use._again()
    assert use.said[0].startswith(f"vm has rebooted, and {tmp_path} can't be mounted")


def test_log_in_waits_for_a_reboot_that_is_under_way(use):
    happens(use, "RESET")
    found = []
    asking = threading.Thread(target=lambda: found.append(use.log_in(None)))
    asking.start()
    asking.join(0.1)
    assert not found
    use._again()
    asking.join(5)
    assert found == [["ssh", "-p", "22", "root@127.0.0.1"]]


def test_log_in_that_a_reboot_has_broken_is_tried_again(use):
    once = use._machine.ssh_as

    def broken(user):
        use._machine.ssh_as = once
        happens(use, "RESET")
        use._ready.set()
        raise AgentError("no answer")

    use._machine.ssh_as = broken
    assert use.log_in("alice")[0] == "ssh"
    with pytest.raises(MachineError, match="There is no SSH"):
        use.log_in("nobody")


def test_vm_that_has_ended_lets_nobody_in(use):
    with use:
        pass
    with pytest.raises(MachineError, match="vm has ended"):
        use.log_in(None)
    with pytest.raises(MachineError, match="vm is not running"):
        use.serial_console()


def test_power_down_forgets_the_keys(use):
    use.log_in(None)
    use.power_down()
    assert use._machine.forgotten == 1
    assert use._qemu.process.returncode == 0
    assert not use._qemu.pressed


def test_guest_without_an_agent_is_powered_down_by_its_button(use):
    use._machine.agent.gone = True
    use.power_down()
    assert use._qemu.pressed


def test_clock_is_set_when_the_computer_has_slept(use, monkeypatch):
    asleep = [100.0]
    monkeypatch.setattr(module, "_LOOK", 0.01)
    monkeypatch.setattr(module, "_slept", lambda: asleep[0])
    use._slept = 100.0
    tried = []

    def set_time():
        tried.append(asleep[0])
        if len(tried) == 2:
            ends(use, 0)
            raise AgentError("no answer")
        asleep[0] = 900.0

    use._machine.agent.set_time = set_time
    threading.Timer(0.2, lambda: asleep.__setitem__(0, 500.0)).start()
    assert use.wait() == "the guest shut down"
    assert tried == [500.0, 900.0]
    assert use.said == ["This computer has slept, and vm's clock may be slow: no answer"]


def test_computer_that_did_not_sleep_is_known_as_such():
    before = module._slept()
    assert before >= -0.01
    assert abs(module._slept() - before) < 0.5
