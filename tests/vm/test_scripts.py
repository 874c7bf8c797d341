"""Scripts of the NixOS test driver on real machines."""

from __future__ import annotations

import time

import pytest

from pytest_nixvm.errors import BootError, CommandFailedError, PollingConditionError


@pytest.mark.nixvm("dev-vm", isolation="module")
def test_a_script_on_a_machine_that_runs(vm, nixvm, capsys):
    nixvm.run_test_script(
        """
        start_all()
        machine.wait_for_unit("multi-user.target")

        with subtest("a user of the machine's"):
            t.assertIn("root", machine.succeed("id"))
            status, out = machine.execute("exit 3")
            assert (status, out) == (3, "")
            machine.fail("test -e /nowhere")

        machine.execute("(sleep 1; touch /run/ready) >&2 &")
        machine.wait_for_file("/run/ready")

        def there(last):
            return machine.execute("test -e /run/ready")[0] == 0

        retry(there)
        machine.screenshot("script")
        """,
        {"machine": vm},
    )

    assert vm.is_up()
    assert (vm.output / "script.png").exists()
    shown = capsys.readouterr().out
    assert "subtest: a user of the machine's" in shown
    assert "    machine.fail('test -e /nowhere')" in shown


@pytest.mark.nixvm("dev-vm", isolation="module")
def test_the_script_s_error_is_the_verb_s(vm, nixvm):
    with pytest.raises(CommandFailedError, match="no such luck") as caught:
        nixvm.run_test_script(
            """
            with subtest("hopes"):
                dev_vm.succeed("echo no such luck >&2; exit 3")
            """,
            [vm],
        )

    assert caught.value.__notes__ == ["in subtest 'hopes'"]


@pytest.mark.nixvm("dev-vm", isolation="module")
def test_a_condition_ends_a_long_command(vm, nixvm):
    began = time.monotonic()

    with pytest.raises(PollingConditionError, match="the flag is there"):
        nixvm.run_test_script(
            """
            @polling_condition(seconds_interval=0.2)
            def flag():
                "the flag is there"
                machine.succeed("test -e /run/flag")

            machine.succeed("touch /run/flag")
            flag.wait()
            with flag:
                machine.execute("(sleep 1; rm /run/flag) >&2 &")
                machine.succeed("sleep 40")
            """,
            {"machine": vm},
        )

    assert time.monotonic() - began < 30


def test_machines_by_name_start_when_used_and_again_after_their_end(fleet_of, capsys, monkeypatch):
    fleet = fleet_of("example")
    started = []
    monkeypatch.setattr(fleet, "on_start", lambda vm, _: started.append(vm))

    fleet.run_test_script(
        """
        assert not dev_vm.is_up()
        dev_vm.succeed("echo kept > /var/kept && sync")
        dev_vm.shutdown()
        assert not dev_vm.is_up()
        t.assertEqual(dev_vm.succeed("cat /var/kept"), "kept\\n")
        dev_vm.crash()
        dev_vm.wait_for_unit("multi-user.target")
        # a wait goes on over a reboot that the script began
        dev_vm.succeed("touch /run/before")
        dev_vm.execute("systemctl reboot >&2 &")
        dev_vm.wait_until_fails("test -e /run/before")
        dev_vm.wait_for_unit("multi-user.target")
        dev_vm.fail("test -e /run/before")
        dev_vm.execute("systemctl poweroff >&2 &")
        join_all()
        """,
        ["dev-vm", "test-vm"],
    )

    assert {vm.name for vm in started} == {"dev-vm"}, "test-vm is not used"
    assert not started[-1].is_up()
    assert not started[-1].spec.scratch.exists()
    assert capsys.readouterr().out.count("dev-vm.start()") == 3


def test_machines_start_together_and_can_be_seen_while_they_do(fleet_of):
    fleet = fleet_of("example", cores="1", isolation="session")  # clones do not boot

    fleet.run_test_script(
        """
        start_all()
        assert not dev_vm.booted
        dev_vm.wait_for_console_text(".", timeout=60)
        dev_vm.send_key("ret")
        booting = not dev_vm.booted
        for each in machines:
            each.wait_for_unit("multi-user.target")
        t.assertTrue(booting, "the keyboard waited for the boot")
        t.assertEqual(test_vm.succeed("hostname"), "test-vm\\n")
        t.assertEqual(dev_vm.succeed("hostname"), "dev-vm\\n")
        """,
        ["dev-vm", "test-vm"],
    )

    assert fleet.started == []


def test_a_boot_that_fails_is_raised_by_the_first_verb_that_needs_it(fleet_of):
    with pytest.raises(BootError, match="panic"):
        fleet_of("machines").run_test_script(
            """
            machine.start()
            machine.wait_for_unit("multi-user.target")
            """,
            {"machine": "panics"},
        )
