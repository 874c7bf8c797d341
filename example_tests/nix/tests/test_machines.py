"""No machine is named here: each test runs once for each machine of the flake.

`pytest --nixvm-machine='*-vm'` runs them for the virtual ones only. What is to hold for one
machine begins with `pytestmark = pytest.mark.nixvm("dev-vm")`, in a file of its own.
"""


def test_is_the_machine_we_asked_for(vm):
    assert vm.succeed("hostname").strip() == vm.name


def test_no_unit_has_failed(vm):
    assert vm.succeed("systemctl list-units --failed --plain --no-legend") == ""


def test_somebody_can_log_in(vm, ssh):
    vm.wait_for_unit("sshd.service")

    assert ssh.run(["systemctl", "is-active", "sshd"]).stdout == "active\n"
