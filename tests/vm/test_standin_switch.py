"""The stand-in's switch-to-configuration and nix-env: what others' tests of changes rely on."""

from __future__ import annotations

import re

import pytest

PROFILE = "/nix/var/nix/profiles/system"


@pytest.fixture(scope="module")
def vm(fleet_of):
    vm = fleet_of("switching").start("switched")
    # The specialisations by a name that stays, whatever is switched to.
    vm.succeed("ln -s /run/booted-system/specialisation /root/to")
    yield vm
    vm.kill()


@pytest.fixture
def base(vm):
    """The machine as it was booted, again so after the test."""
    yield vm
    vm.succeed("/run/booted-system/bin/switch-to-configuration test", timeout=300)


def switch(vm, candidate, mode="test", environment=""):
    """The exit status, and what switch-to-configuration wrote."""
    program = f"/root/to/{candidate}/bin/switch-to-configuration"
    result = vm.run(f"{environment} {program} {mode} 2>&1", timeout=300)
    return result.returncode, result.stdout


def pids(vm, *units):
    shown = vm.succeed(f"systemctl show --value --property=MainPID {' '.join(units)}")
    return dict(zip(units, shown.split(), strict=True))


def test_a_dry_run_tells_and_changes_nothing(vm):
    services = "{changed,removed,with-socket,not-restarted,reloaded,at-once,sshd}.service"
    asked = f"systemctl show --property=Id,ActiveState,SubState,InvocationID {services}"
    units = vm.succeed(asked)

    assert switch(vm, "other", "dry-activate") == (
        0,
        "Not checking switch inhibitors (action = dry-activate)\n"
        "would stop the following units: changed.service, removed.service, "
        "with-socket.service, with-socket.socket\n"
        "would NOT stop the following changed units: not-restarted.service\n"
        "would activate the configuration...\n"
        "would reload the following units: reloaded.service\n"
        "would restart the following units: at-once.service, sshd.service\n"
        "would start the following units: changed.service, with-socket.socket\n",
    )
    assert vm.succeed(asked) == units
    vm.fail("systemctl is-active fresh")
    assert vm.succeed("cat /etc/gone; hostname") == "gone\nswitched\n"


def test_a_switch_and_back(vm, base):
    stay = ("same.service", "described.service", "not-restarted.service", "reloaded.service")
    go = ("changed.service", "at-once.service", "sshd.service")
    before = pids(vm, *stay, *go, "kept.service")
    owner = vm.succeed("stat -c %u /home/bob")

    status, output = switch(vm, "other", "switch")

    assert output == (
        "Checking switch inhibitors... done\n"
        "stopping the following units: changed.service, removed.service, "
        "with-socket.service, with-socket.socket\n"
        "NOT restarting the following changed units: not-restarted.service\n"
        "activating the configuration...\n"
        "restarting sysinit-reactivation.target\n"
        "reloading the following units: reloaded.service\n"
        "restarting the following units: at-once.service, sshd.service\n"
        "starting the following units: changed.service, with-socket.socket\n"
        "the following new units were started: fresh.service, sysinit-reactivation.target, "
        "systemd-tmpfiles-resetup.service\n"
    )
    assert status == 0
    after = pids(vm, *stay, *go, "kept.service")
    assert {unit: after[unit] == before[unit] for unit in before} == {
        **dict.fromkeys((*stay, "kept.service"), True),
        **dict.fromkeys(go, False),
    }
    vm.succeed("systemctl is-active fresh with-socket.socket && ! systemctl is-active removed")
    vm.succeed("test -e /run/reloaded && test -d /var/lib/made")
    vm.succeed("test ! -e /etc/gone && test ! -e /etc/copied")
    assert vm.succeed("cat /etc/fresh; hostname; hello") == "fresh\nother\nHello, world!\n"
    assert vm.succeed("readlink -f /run/current-system /root/to/other | uniq | wc -l") == "1\n"
    # An account that comes before another one in the alphabet does not take its number.
    assert vm.succeed("stat -c %u /home/bob; id -u bob") == owner * 2
    assert vm.succeed("stat -c %U /home/alice") == "alice\n"

    back = vm.run("/run/booted-system/bin/switch-to-configuration switch 2>&1", timeout=300)

    assert back.returncode == 0
    assert "stopping the following units: changed.service, fresh.service, " in back.stdout
    assert re.search(r"new units were started: .*\bremoved\.service", back.stdout)
    assert "removing user ‘alice’" in back.stdout
    assert vm.succeed("cat /etc/gone /etc/copied; hostname") == "gone\ncopied\nswitched\n"
    assert vm.succeed("stat -c '%a %F' /etc/copied") == "440 regular file\n"
    vm.succeed("test ! -e /etc/fresh && systemctl is-active removed && ! id alice")
    vm.fail("hello")


def test_units_that_fail(vm, base):
    status, output = switch(vm, "failing")

    assert status == 4
    failed = "changed.service, fails.service, loops.service"
    assert (
        f"\nFailed to start changed.service\nwarning: the following units failed: {failed}\n"
        in output
    )
    assert "× fails.service\n" in output
    assert "status=3" in output


def test_checks_and_inhibitors_refuse(vm, base):
    assert switch(vm, "refused") == (
        1,
        "Checking switch inhibitors... done\nit is too late\n"
        "Pre-switch check 'too-late' failed\nPre-switch checks failed\n",
    )
    status, output = switch(vm, "inhibited")
    assert status == 1
    assert (
        "There are changes to critical components of the system:\n\nweather : dry -> wet\n"
        in output
    )
    assert output.endswith("Pre-switch check 'switchInhibitors' failed\nPre-switch checks failed\n")
    assert switch(vm, "inhibited", "boot")[0] == 0
    assert vm.succeed("readlink -f /run/current-system") == vm.succeed(
        "readlink -f /run/booted-system"
    )

    status, output = switch(vm, "refused", environment="NIXOS_NO_CHECK=1")
    assert (status, output.splitlines()[0]) == (0, "activating the configuration...")


@pytest.mark.parametrize(
    ("candidate", "mode", "status", "text"),
    [
        ("unbootable", "switch", 1, "\nFailed to install bootloader\n"),
        (
            "another-init",
            "test",
            100,
            "\nWarning: the new NixOS configuration has an ‘init’ that is",
        ),
        (
            "other",
            "jump",
            1,
            "Usage: switch-to-configuration [check|switch|boot|test|dry-activate]",
        ),
        ("other", "check", 0, "Checking switch inhibitors... done\n"),
    ],
)
def test_what_ends_before_anything_is_changed(vm, candidate, mode, status, text):
    returned, output = switch(vm, candidate, mode)

    assert (returned, text in output) == (status, True)
    assert vm.succeed("readlink -f /run/current-system") == vm.succeed(
        "readlink -f /run/booted-system"
    )


def test_one_switch_at_a_time(vm):
    lock = "/run/nixos/switch-to-configuration.lock"
    vm.succeed("mkdir -p /run/nixos")
    program = "/root/to/other/bin/switch-to-configuration test"
    result = vm.run(f"flock {lock} {program} 2>&1", timeout=60)

    assert (result.returncode, result.stdout) == (11, "Could not acquire lock\n")


def test_an_activation_that_fails_and_another_configuration_of_systemd(vm, base):
    status, output = switch(vm, "half-active")
    assert status == 2
    assert "\nFailed to run activate script\n" in output
    assert (
        vm.succeed("readlink -f /run/current-system /root/to/half-active | uniq | wc -l") == "1\n"
    )

    status, output = switch(vm, "manager")
    assert status == 0
    assert "\nrestarting systemd...\n" in output
    assert vm.succeed("systemctl show --value --property=DefaultLimitNOFILE") == "2048\n"


def test_generations(vm):
    def nix_env(arguments):
        result = vm.run(f"nix-env -p {PROFILE} {arguments} 2>&1")
        return result.returncode, result.stdout

    def generations():
        return re.findall(r"^ +(\d+) .*?(\(current\))?$", nix_env("--list-generations")[1], re.M)

    assert nix_env("--set /run/booted-system") == (0, "")
    assert nix_env("--set /root/to/other") == (0, "")
    assert nix_env("--set /root/to/other") == (0, "")  # the same: no new one
    assert generations() == [("1", ""), ("2", "(current)")]
    assert vm.succeed(f"readlink {PROFILE}") == "system-2-link\n"
    assert nix_env("--rollback") == (0, "switching profile from version 2 to 1\n")
    assert nix_env("--rollback") == (
        1,
        "error: no generation older than the current (1) exists\n",
    )
    assert nix_env("--switch-generation 7") == (
        1,
        "error: profile version '7' does not exist\n",
    )
    assert nix_env("--set /root/to/manager") == (0, "")
    assert generations() == [("1", ""), ("2", ""), ("3", "(current)")]
    assert vm.succeed(f"readlink -f {PROFILE}") == vm.succeed("readlink -f /root/to/manager")


def test_a_machine_that_can_t_be_switched(fleet_of):
    build = fleet_of("switching").build("fixed")

    assert not (build.toplevel / "bin" / "switch-to-configuration").exists()
