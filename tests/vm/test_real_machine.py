"""Machines that are configured for their own hardware are tested as they are.

A server (GRUB, static address, sops-nix) and a laptop (LUKS, systemd-boot, DHCP, agenix): see
household/. One template each, and one of the server with network="nat".
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace

import pytest

from pytest_nixvm import Fleet, Secret, Secrets
from pytest_nixvm.errors import MachineError
from pytest_nixvm.fidelity import fidelity, lines
from pytest_nixvm.flake.packages import read_closure

SERVER = "192.168.7.20"
GATEWAY = "192.168.7.1"  # QEMU, which would pass connections to it on to the host's loopback

HOOK = Secret("backup/passphrase", "/etc/backup/passphrase", "alice", "users", "0440")


@pytest.fixture(scope="module")
def household(fleet_of):
    fleet = fleet_of("household")
    fleet.more_secrets = lambda name: [HOOK] if name == "server" else []
    return fleet


@pytest.fixture(scope="module")
def server(household):
    """The server, for tests that only look."""
    with household.start("server") as vm:
        yield vm


@pytest.fixture
def own_server(household):
    """A server that the test may change."""
    with household.start("server") as vm:
        yield vm


@pytest.fixture(scope="module")
def laptop(household):
    with household.start("laptop") as vm:
        yield vm


@pytest.fixture(scope="module")
def open_server(household):
    with household.start("server", network="nat") as vm:
        yield vm


def addresses(vm) -> dict[str, str]:
    """The guest's interfaces with their first IPv4 addresses."""
    found = re.findall(r"^\d+: (\S+)\s+inet (\S+)", vm.succeed("ip -o -4 addr show"), re.MULTILINE)
    return dict(reversed(found))


def owned(vm, path: str) -> str:
    return vm.succeed(f"stat -L -c '%U:%G %a' {path}").strip()


def page(vm, wanted: str | None = None, patience: float = 90) -> str:
    """What the shop says to somebody outside; `wanted` is what it is going to say."""
    end = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{vm.port(8080)}/index.html", timeout=10
            ) as answer:
                said = answer.read().decode().split()[0]
        except (OSError, urllib.error.URLError) as error:
            said = str(error)
        if time.monotonic() > end or (wanted is None and len(said) == 64) or said == wanted:
            return said
        time.sleep(0.3)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- it runs ---


@pytest.mark.parametrize("name", ["server", "laptop"])
def test_it_boots_without_its_hardware_and_its_keys(request, name):
    vm = request.getfixturevalue(name)
    assert vm.boot.state == "running"
    assert vm.failed_units() == ()
    console = vm.get_console_log()
    for trouble in ("sops-install-secrets:", "age: error", "nixvm:", "failed ("):
        assert trouble not in console


# --- its network ---


def test_the_card_has_its_name_and_its_static_address(server):
    assert addresses(server) == {"lo": "127.0.0.1/8", "enp3s0": f"{SERVER}/24"}
    assert f"default via {GATEWAY} dev enp3s0" in server.succeed("ip route")


def test_ssh_comes_in_at_the_static_address(server):
    came_in = server.ssh.run("echo $SSH_CONNECTION; hostname").stdout.split()
    assert came_in[2:] == [SERVER, "22", "server"]


def test_what_only_that_card_opens_is_reached_from_outside(server):
    assert server.reachable(8080)
    assert page(server) == digest(Secrets(server)["shop/database"])
    assert server.reachable(8081).state == "filtered"


def test_a_card_with_dhcp_has_its_name_and_its_rules(laptop):
    assert set(addresses(laptop)) == {"lo", "enp0s31f6"}
    assert laptop.reachable(22)
    assert laptop.reachable(22000).state == "closed"  # let in, and nobody listens
    assert laptop.reachable(22001).state == "filtered"  # the antenna's


# --- isolation, as the guest sees it ---


class Listener:
    """Somebody on the host who waits for a guest: TCP and UDP on the same port of every address."""

    def __init__(self) -> None:
        self.tcp = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        self.port: int = self.tcp.getsockname()[1]
        self.udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        self.udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.udp.bind(("::", self.port))
        self.heard: list[str] = []
        for listen in (self._connections, self._packets):
            threading.Thread(target=listen, daemon=True).start()

    def _connections(self) -> None:
        while True:
            try:
                connection, _ = self.tcp.accept()
                with connection:
                    connection.settimeout(5)
                    self.heard.append(connection.recv(100).decode())
            except TimeoutError:
                continue
            except OSError:
                return

    def _packets(self) -> None:
        while True:
            try:
                self.heard.append(self.udp.recv(100).decode())
            except OSError:
                return

    def close(self) -> None:
        for each in (self.tcp, self.udp):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.close()


def own_address() -> str | None:
    """The host's address in its own network, None where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            return None
        return probe.getsockname()[0]


def call(vm, listener: Listener) -> list[str]:
    """Have the guest call the host in every way; return which calls it could make."""
    # QEMU's IPv6 network is there whatever the guest makes of its announcements.
    vm.succeed("ip -6 addr replace fec0::77/64 dev enp3s0 nodad")
    hosts = [GATEWAY, "10.0.2.2", "fec0::2", *filter(None, [own_address()])]
    tries = [f"{protocol}/{host}" for host in hosts for protocol in ("tcp", "udp")]
    script = "".join(
        f"timeout 8 bash -c 'echo {one} > /dev/{one}/{listener.port}' 2>&- && echo {one} &\n"
        for one in tries
    )
    made = vm.succeed(f"{script} wait").split()
    time.sleep(1)  # what was sent and is under way
    return made


def test_isolated_is_the_default_and_nobody_is_reached(server, listener):
    made = call(server, listener)
    assert listener.heard == []
    # A packet that is lost was sent all the same.
    assert [one for one in made if one.startswith("tcp/")] == []


def test_no_name_is_found_while_isolated(server):
    # 192.168.7.3 is QEMU's name server here.
    server.succeed("(echo nameserver 192.168.7.3; echo options timeout:3 attempts:1) > /tmp/dns")
    asking = "unshare -m sh -ec 'mount --bind /tmp/dns /etc/resolv.conf; getent ahosts {}'"
    server.succeed(asking.format("localhost"))
    server.fail(asking.format("cache.nixos.org"))


def test_the_hosts_own_network_is_not_reached_though_it_has_the_same_addresses(server):
    """The VM's 192.168.7.0/24 is QEMU's: others in it do not answer, only the gateway does."""
    server.succeed(f"ping -c 1 -W 5 {GATEWAY}")
    server.fail("ping -c 1 -W 2 192.168.7.99")


def test_nat_opens_it(open_server, listener):
    made = call(open_server, listener)
    assert f"tcp/{GATEWAY}" in made
    assert {f"tcp/{GATEWAY}\n", f"udp/{GATEWAY}\n", "tcp/fec0::2\n"} <= set(listener.heard)
    if own_address():
        assert f"tcp/{own_address()}\n" in listener.heard
    # And in from outside as before.
    assert addresses(open_server)["enp3s0"] == f"{SERVER}/24"
    assert open_server.reachable(8080)


# --- secrets ---


def test_secrets_are_where_they_are_declared(server, laptop):
    assert owned(server, "/run/secrets/shop/database") == "shop:shop 440"
    assert owned(server, "/run/secrets-for-users/alice/password") == "root:root 400"
    assert owned(server, "/var/lib/shop-keys/mail") == "root:root 400"
    assert server.succeed("readlink /var/lib/shop-keys/mail") == "/run/secrets/shop/mail\n"
    assert owned(server, "/run/secrets/rendered/shop.env") == "shop:root 400"
    assert owned(laptop, "/run/agenix/backup") == "alice:users 440"
    assert owned(laptop, "/home/alice") == "alice:users 700"
    assert owned(laptop, "/home/alice/.mail/token") == "alice:users 400"
    laptop.succeed("test -f /home/alice/.mail/token -a ! -L /home/alice/.mail/token")


def test_other_peoples_secrets_are_not_read(server, laptop):
    server.succeed("su shop -s /bin/sh -c 'cat /run/secrets/shop/database'")
    server.fail("su alice -c 'cat /run/secrets/shop/database'")
    laptop.succeed("su alice -c 'cat /run/agenix/backup /home/alice/.mail/token'")
    laptop.fail("su alice -c 'cat /run/agenix/password'")


def test_secrets_of_the_hook_are_there(server):
    assert owned(server, HOOK.path) == "alice:users 440"
    assert re.fullmatch("[0-9a-f]{64}", Secrets(server)[HOOK.name])


def test_values_are_nobodys(server, laptop):
    values = [Secrets(vm)[name] for vm in (server, laptop) for name in Secrets(vm)]
    assert len(set(values)) == len(values) == 7
    assert not any("SOPS" in value or "PLACEHOLDER" in value for value in values)


def test_a_template_has_the_value_in_it(server):
    value = Secrets(server)["shop/database"]
    rendered = server.succeed("cat /run/secrets/rendered/shop.env")
    assert rendered == f"DATABASE=postgres://shop:{value}@localhost/shop\n"


def test_a_user_has_the_password_of_the_secret(server, laptop):
    for vm, name in ((server, "alice/password"), (laptop, "password")):
        assert vm.succeed("grep ^alice: /etc/shadow").split(":")[1] == Secrets(vm)[name]


def test_no_value_is_in_the_store(household, server, laptop):
    values = [Secrets(vm)[name] for vm in (server, laptop) for name in Secrets(vm)]
    closure = sorted(
        {
            path
            for vm in (server, laptop)
            for path in read_closure(household.nix, vm.build.output).sizes
        }
    )
    assert str(server.build.toplevel) in closure
    found = subprocess.run(
        ["grep", "-rlFf", "-", *closure],
        input="\n".join(values) + "\n",
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout) == (1, "")


def test_a_test_may_choose_a_value_and_its_service_reads_it(own_server):
    secrets = Secrets(own_server)
    before = page(own_server)
    secrets["shop/database"] = "hunter2"
    assert page(own_server, digest("hunter2")) == digest("hunter2") != before
    assert secrets["shop/database"] == "hunter2"
    assert owned(own_server, "/run/secrets/shop/database") == "shop:shop 440"

    # A service that has failed for want of a good value starts with one.
    secrets["shop/database"] = ""
    own_server.wait_until_succeeds("systemctl is-failed shop")
    secrets["shop/database"] = "hunter2"
    assert page(own_server, digest("hunter2")) == digest("hunter2")

    secrets[HOOK.name] = "two\nlines, and a quote: '\n"
    assert own_server.succeed(f"cat {HOOK.path}") == "two\nlines, and a quote: '\n"

    # Nothing of it is lost when the machine reboots.
    kept = {name: secrets[name] for name in secrets}
    hashed = own_server.succeed("grep ^alice: /etc/shadow")
    own_server.reboot()
    assert {name: secrets[name] for name in secrets} == kept
    assert page(own_server, digest("hunter2")) == digest("hunter2")
    assert own_server.succeed("grep ^alice: /etc/shadow") == hashed
    assert "hunter2" in own_server.succeed("cat /run/secrets/rendered/shop.env")
    assert addresses(own_server)["enp3s0"] == f"{SERVER}/24"


def test_another_clone_has_not_the_chosen_value(server):
    assert re.fullmatch("[0-9a-f]{64}", Secrets(server)["shop/database"])


def test_a_secret_that_is_not_declared_is_named(server):
    with pytest.raises(MachineError, match=r"no secret 'shop/databse'.*shop/database"):
        Secrets(server)["shop/databse"] = "x"


# --- what is not tested is said ---


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "server",
            [
                *("/ (ext4), /srv (xfs)", "by-label/swap", "boot loader (GRUB)", "enp3s0"),
                *("shop/database", "sops-nix", "pytest_nixvm_secrets", "shop.env", "chrony"),
            ],
        ),
        (
            "laptop",
            [
                *("/ (btrfs), /boot (vfat)", "(LUKS) of vault", "systemd-boot", "enp0s31f6"),
                *("wlp2s0", "wireless", "Bluetooth", "agenix", "amdgpu", "systemd-timesyncd"),
            ],
        ),
    ],
)
def test_fidelity_names_it(household, name, words):
    build = household.build(name, freezable=True)
    said = "\n".join(lines(fidelity(build, household.declared(name))))
    assert [word for word in words if word not in said] == []


# --- by pytest's own ways ---

TESTS = """
import pytest
from pytest_nixvm import Secret

@pytest.mark.nixvm("server")
def test_secrets(vm, nixvm_secrets):
    assert "backup/passphrase" in nixvm_secrets
    nixvm_secrets["backup/passphrase"] = "correct horse"
    assert vm.succeed("cat /etc/backup/passphrase") == "correct horse"

@pytest.mark.nixvm("server")
def test_pristine(nixvm_secrets):
    assert len(nixvm_secrets["backup/passphrase"]) == 64
"""

CONFTEST = f"""
from pytest_nixvm import Secret

def pytest_nixvm_secrets(machine):
    return [{HOOK!r}] if machine == "server" else []
"""


def test_the_hook_and_the_fixture(household, arguments_of, tmp_path):
    flake = household.settings.flake
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", f"--nixvm-flake={flake}", *arguments_of(flake),
         "--nixvm-memory=1024", "--nixvm-fidelity"],
        cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    for words in ("(pytest_nixvm_secrets): throwaway values", "the boot loader (GRUB)", "enp3s0"):
        assert words in done.stdout


# --- secrets over a switch ---


@pytest.fixture
def renewed(household, flake_copy, tmp_path):
    """The server, and a candidate with another set of secrets."""
    place = flake_copy("household")
    me = ["-c", "user.name=a", "-c", "user.email=a@example"]
    subprocess.run(["git", "-C", place, *me, "commit", "-qm", "deployed"], check=True)
    text = (place / "server.nix").read_text()
    text = text.replace("shop/mail", "shop/post").replace('mode = "0440"', 'mode = "0400"')
    (place / "server.nix").write_text(text)
    settings = replace(household.settings, flake=str(place), from_="HEAD")
    with Fleet(settings, output=tmp_path / "out") as fleet:
        fleet.more_secrets = lambda _: [HOOK]
        yield fleet.change("server")


def test_a_switch_keeps_values_and_brings_new_secrets(renewed):
    vm = renewed.vm
    secrets = Secrets(vm)
    secrets["shop/database"] = "hunter2"
    password = secrets["alice/password"]
    assert owned(vm, "/run/secrets/shop/mail") == "root:root 400"

    renewed.switch()

    assert vm.succeed("cat /run/secrets/shop/database") == "hunter2"
    assert owned(vm, "/run/secrets/shop/database") == "shop:shop 400"
    assert vm.succeed(f"cat {HOOK.path} | wc -c").strip() == "64"
    assert vm.succeed("grep ^alice: /etc/shadow").split(":")[1] == password
    assert re.fullmatch("[0-9a-f]{64}", vm.succeed("cat /run/secrets/shop/post"))
    vm.fail("test -e /run/secrets/shop/mail")
    # A template follows at a switch.
    assert "hunter2" in vm.succeed("cat /run/secrets/rendered/shop.env")
    assert page(vm, digest("hunter2")) == digest("hunter2")
