"""What the checks conclude from what a machine says, in the words of systemd, the kernel and ss."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from pytest_nixvm.checks import BUILT_IN
from pytest_nixvm.checks.base import Checked, DoesNotApply, ToldError
from pytest_nixvm.checks.logins import Account, key_trouble, parse
from pytest_nixvm.checks.logins import judge as judge_users
from pytest_nixvm.checks.ports import judge as judge_ports
from pytest_nixvm.checks.power import shutdown_trouble
from pytest_nixvm.checks.sockets import (
    Listener,
    Sockets,
    listening,
    processes,
    socket_units,
    unit_of,
)
from pytest_nixvm.checks.units import excuse
from pytest_nixvm.errors import BootError
from pytest_nixvm.flake.declared import Firewall, User
from pytest_nixvm.guest.directives import hint
from pytest_nixvm.guest.ignored import ignored, option_of
from pytest_nixvm.guest.journal import JournalEntry

KEY = (
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl alice@laptop"
)


def entry(message: str, identifier: str = "systemd", **fields: str) -> JournalEntry:
    return JournalEntry(
        time=datetime.now(UTC),
        unit="",
        identifier=identifier,
        pid=1,
        priority=4,
        message=message,
        cursor="",
        fields=fields,
        all_fields={},
    )


def test_every_check_is_documented_and_has_a_name_that_fits_a_node_id():
    names = [check.name for check in BUILT_IN]
    assert len(set(names)) == len(names)
    for check in BUILT_IN:
        assert check.doc, check.name
        assert check.name.replace("-", "").isalpha()


# --- what is ignored ------------------------------------------------------------------------------


def said(*entries: JournalEntry, params: str = "") -> str:
    return "\n".join(map(str, ignored(entries, params)))


@pytest.mark.parametrize(
    ("message", "option", "meant"),
    [
        (
            "/etc/systemd/system/web.service:12: Unknown key 'Restrat' in section [Service], "
            "ignoring.",
            "systemd.services.web.serviceConfig.Restrat",
            "Did you mean Restart?",
        ),
        (
            "/etc/systemd/system/web.service:3: Unknown key name 'WantedBy' in section 'Unit', "
            "ignoring.",
            "systemd.services.web.unitConfig.WantedBy",
            "WantedBy belongs into [Install].",
        ),
        (
            "/etc/systemd/system/nginx.service.d/overrides.conf:5: Failed to parse "
            "TimeoutStopSec= parameter, ignoring: soon",
            "systemd.services.nginx",
            "",
        ),
        (
            "/etc/systemd/system/a@.timer:5: Unknown key 'OnCalender' in section [Timer], "
            "ignoring.",
            'systemd.timers."a@".timerConfig.OnCalender',
            "Did you mean OnCalendar?",
        ),
        (
            "/etc/systemd/logind.conf:4: Unknown section 'Logn'. Ignoring.",
            "services.logind.settings",
            "",
        ),
    ],
)
def test_what_systemd_ignores_is_told_with_its_option(message, option, meant):
    text = said(entry(message))
    assert message.partition(": ")[0] in text
    assert option in text
    assert meant in text


def test_the_journal_s_fields_tell_the_place_as_well():
    found = said(
        entry("Unknown section 'X'. Ignoring.", CONFIG_FILE="/etc/systemd/x.conf", CONFIG_LINE="7")
    )
    assert found == "/etc/systemd/x.conf:7: Unknown section 'X'. Ignoring."


@pytest.mark.parametrize(
    "message",
    [
        "/etc/systemd/system/x.service:8: PIDFile= references a path below legacy directory "
        "/var/run/, updating /var/run/x.pid → /run/x.pid; please update the unit file accordingly.",
        "/etc/systemd/system/x.service:8: Standard output type syslog is obsolete, automatically "
        "updating to journal. Please update your unit file, and consider removing the setting.",
        "x.service: Main process exited, code=exited, status=1/FAILURE",
        # systemd-run's, which systemd itself has written.
        '/run/systemd/transient/run-1.service:9: Ignoring unknown escape sequences: "echo \\$0"',
    ],
)
def test_what_is_obeyed_all_the_same_is_not_told(message):
    assert said(entry(message)) == ""


def test_an_application_s_own_words_are_not_systemd_s():
    assert said(entry("/etc/app.conf:3: unknown key 'a', ignoring", "app")) == ""
    assert said(entry("module left-pad not found", "node")) == ""


def test_the_same_line_is_told_once():
    message = "/etc/systemd/system/web.service:12: Unknown key 'A' in section [Service], ignoring."
    assert len(ignored([entry(message), entry(message)], "")) == 1


def test_units_that_are_refused_cycles_and_modules_are_told():
    text = said(
        entry("a.service: Service has no ExecStart=, ExecStop=, or SuccessAction=. Refusing."),
        entry("b.service: Found ordering cycle on c.service/start"),
        entry("b.service: Found dependency on b.service/start"),
        entry("b.service: Job c.service/start deleted to break ordering cycle starting with b"),
        entry("Failed to find module 'nosuch'", "systemd-modules-load"),
    )
    assert "systemd.services.a" in text
    assert "deleted to break ordering cycle" in text
    assert "There is no kernel module 'nosuch'" in text
    assert "boot.kernelModules" in text


def test_the_kernel_s_unknown_parameters_count_where_the_configuration_has_them():
    line = entry(
        'Unknown kernel command line parameters "quiett splash regInfo=/nix/store/x", '
        "will be passed to user space.",
        "kernel",
    )
    text = said(line, params="quiett splash loglevel=4")
    assert "'quiett'" in text
    assert "splash" not in text
    assert "regInfo" not in text


def test_hints():
    assert hint("execstart", "Service") == "Did you mean ExecStart? Case counts."
    assert hint("Xyzzy", "Service") == ""
    assert option_of("/etc/systemd/network/10-lan.network", "Network", "DHPC") == (
        "systemd.network.networks.10-lan"
    )


# --- ports ----------------------------------------------------------------------------------------

NGINX = Listener("tcp", 80, ("0.0.0.0",), "nginx", "nginx.service")
POSTGRES = Listener("tcp", 5432, ("0.0.0.0",), "postgres", "postgresql.service")


def verdict(firewall: Firewall, states: dict, *listeners: Listener):
    return judge_ports(firewall, Sockets(listeners, ("eth0",)), "eth0", states)


def test_ports_as_declared():
    found = verdict(
        Firewall(True, tcp=((80, 80),)), {80: "open", 5432: "filtered"}, NGINX, POSTGRES
    )
    assert (found.wrong, found.notes) == ([], [])


def test_a_port_that_no_option_opens_is_wrong_when_it_is_reached():
    found = verdict(Firewall(True), {5432: "open"}, POSTGRES)
    assert "tcp port 5432 (postgres of postgresql.service, on 0.0.0.0)" in found.wrong[0]
    own = verdict(Firewall(True, own_rules=True), {5432: "open"}, POSTGRES)
    assert not own.wrong
    assert "rules of your own" in own.notes[0]


def test_a_port_that_is_opened_must_answer():
    assert (
        "without an answer"
        in verdict(Firewall(True, tcp=((80, 80),)), {80: "filtered"}, NGINX).wrong[0]
    )
    one_address = Listener("tcp", 80, ("10.1.2.3",))
    assert not verdict(Firewall(True, tcp=((80, 80),)), {80: "closed"}, one_address).wrong


def test_a_port_on_which_nobody_listens_is_told_unless_it_is_filtered():
    opened = Firewall(True, tcp=((443, 443),))
    assert "nobody listens on tcp port 443" in verdict(opened, {443: "closed"}).notes[0]
    assert "no answer" in verdict(opened, {443: "filtered"}).wrong[0]


def test_interfaces_and_trusted_ones_count():
    lan = Firewall(True, interface_tcp={"eth0": ((80, 80),)})
    assert not verdict(lan, {80: "open"}, NGINX).wrong
    other = Firewall(True, interface_tcp={"wg0": ((80, 80),)})
    assert verdict(other, {80: "open"}, NGINX).wrong
    assert not verdict(Firewall(True, trusted=("eth0",)), {80: "open"}, NGINX).wrong


def test_without_a_firewall_nothing_is_wrong_and_what_is_reached_is_told():
    found = verdict(Firewall(False), {80: "open"}, NGINX)
    assert not found.wrong
    assert "networking.firewall.enable is false" in found.notes[0]


def test_the_kernel_s_tables_are_read():
    table = (
        "  sl  local_address rem_address   st tx_queue rx_queue\n"
        "   0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000\n"
        "   1: 0100007F:1538 00000000:0000 0A 00000000:00000000 00:00000000\n"
        "   2: 0F02000A:0016 0202000A:D4F4 01 00000000:00000000 00:00000000\n"
    )
    assert listening(table, "tcp") == [("0.0.0.0", 22), ("127.0.0.1", 5432)]
    six = "   0: 00000000000000000000000001000000:0050 0000:0000 0A 0"
    assert listening(six, "tcp") == [("::1", 80)]
    told = 'tcp LISTEN 0 128 0.0.0.0:22 0.0.0.0:* users:(("sshd",pid=210,fd=3))\n'
    assert processes(told) == {("tcp", 22): ("sshd", 210)}
    assert unit_of("0::/system.slice/nginx.service") == "nginx.service"
    listed = "/run/udev/control udevd.socket x.service\n[::]:5555 listen.socket listen@.service\n"
    assert socket_units(listed) == {5555: "listen.socket"}


# --- users ----------------------------------------------------------------------------------------

HASHED = "$6$salt$abcdefghijklmnop"


def alice(**more) -> User:
    return User(
        **{
            "name": "alice",
            "normal": True,
            "shell": "",
            "home": "/home/alice",
            "password": "hashed",
            "keys": 0,
            "hashed": HASHED,
            **more,
        }
    )


def account(**more) -> Account:
    return Account(**{"shell": "/run/current-system/sw/bin/bash", "shadow": HASHED, **more})


def users(user: User, found: Account) -> tuple[str, str]:
    wrong, notes = judge_users([user], {"alice": found})
    return "\n".join(wrong), "\n".join(notes)


def test_a_user_as_declared():
    assert users(alice(), account()) == ("", "")


def test_what_keeps_a_user_out():
    assert "does not exist" in users(alice(), Account(there=False))[0]
    assert "programs.NAME.enable" in users(alice(), account(shell_runs=False))[0]
    assert (
        "home /home/alice does not exist"
        in users(alice(), account(has_home=False, home="/home/alice"))[0]
    )
    plain = users(alice(hashed="opensesame"), account(shadow="opensesame"))[0]
    assert "is not a hash" in plain
    assert "opensesame" not in plain
    assert "is not the one of" in users(alice(), account(shadow="$6$other$abcdefghijk"))[0]


def test_a_locked_user_without_a_key_is_told_only():
    wrong, notes = users(alice(password="none", hashed=None), account(shadow="!"))
    assert not wrong
    assert "neither a password nor a key" in notes
    assert users(alice(password="none", hashed=None, keys=1), account(shadow="!")) == ("", "")
    service = account(shadow="!", shell="/run/current-system/sw/bin/nologin")
    assert users(alice(password="none", hashed=None), service) == ("", "")


def test_keys_that_sshd_would_not_take():
    assert key_trouble(KEY) == ""
    assert key_trouble('command="echo \\"a b\\"",no-pty ' + KEY) == ""
    assert "was cut" in key_trouble("ssh-ed25519 AAAAC3NzaC1lZDI1 alice")
    assert "was cut" in key_trouble("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIcut alice")
    assert "not base64" in key_trouble("ssh-ed25519 AAAAC3NzaC1lZDI alice")
    assert "is none" in key_trouble("AAAAC3NzaC1lZDI1NTE5AAAA alice")


def test_the_guest_s_answer_is_read():
    found = parse(
        "nixvm alice ok noshell\nshell /bin/zsh\nhome /home/alice\nshadow !\nkey # a\n"
        f"key {KEY}\nnixvm bob missing\n"
    )
    assert not found["alice"].shell_runs
    assert (found["alice"].shadow, found["alice"].keys) == ("!", [KEY])
    assert not found["bob"].there


# --- units and power ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "curl: (6) Could not resolve host: example.org",
        "dial tcp: lookup api.example.org on 10.0.2.3:53: server misbehaving",
        "ping: connect: Network is unreachable",
        "Temporary failure in name resolution",
    ],
)
def test_a_unit_that_misses_the_network_is_no_defect_while_there_is_none(words):
    assert "wants the network" in excuse("update.service", words, isolated=True)
    assert excuse("update.service", words, isolated=False) == ""


def test_other_failures_are_defects_and_missing_hardware_is_none():
    assert excuse("web.service", "config missing", isolated=True) == ""
    kvm = "Failed to insert module 'kvm_intel': Operation not supported"
    assert "hardware" in excuse("systemd-modules-load.service", kvm, isolated=False)


def test_a_shutdown_s_console():
    clean = "[  OK  ] Reached target poweroff.target\n[ 9.1] reboot: Power down\n"
    assert shutdown_trouble(clean) == []
    store = "(sd-umount)[239]: Failed to unmount /usr: Device or resource busy\n"
    assert shutdown_trouble(store + clean) == []
    data = "(sd-umount)[239]: Failed to unmount /srv/data: Device or resource busy\r\n"
    assert shutdown_trouble(data) == ["Failed to unmount /srv/data: Device or resource busy"]
    job = "\x1b[0m[ \x1b[31m*\x1b[0m] A stop job is running for Web (1min 29s / 1min 30s)\r"
    assert shutdown_trouble(job) == ["Web did not stop within 90 s, and was killed"]
    assert shutdown_trouble("A stop job is running for Web (12s / 1min 30s)\r") == []


# --- what several checks meet ---------------------------------------------------------------------


def test_an_error_is_told_in_full_once_and_in_short_to_the_others():
    memory: dict[str, object] = {}
    calls = []

    def make():
        calls.append(1)
        raise BootError("It does not boot.", stage="kernel", console_tail="panic")

    def checked() -> Checked:
        return Checked("dev-vm", None, lambda _: None, memory)  # type: ignore[arg-type]

    with pytest.raises(BootError, match="panic"):
        checked().once("vm", make)
    with pytest.raises(ToldError) as told:
        checked().once("vm", make)
    assert str(told.value).endswith(": It does not boot.")
    assert "panic" not in str(told.value)
    assert len(calls) == 1


def test_a_reason_to_skip_holds_for_the_others():
    memory: dict[str, object] = {}

    def make():
        raise DoesNotApply("there is no change")

    for _ in range(2):
        with pytest.raises(DoesNotApply, match="there is no change"):
            Checked("a", None, lambda _: None, memory).once("x", make)  # type: ignore[arg-type]
