"""A machine that is made ready once. Each test gets a clone of it, to do with as it likes."""

import pytest_nixvm


@pytest_nixvm.template("test-vm")
def reception(vm):
    """A guest book, and a unit that reads it aloud."""
    vm.succeed("echo Alice > /var/guests")
    vm.succeed("systemd-run --quiet --unit=reader tail --follow --lines=+1 /var/guests")


def test_who_arrives_is_announced(reception):
    reception.succeed("echo Bob >> /var/guests")

    reception.wait_until_succeeds("journalctl --unit=reader | grep Bob", timeout=60)


def test_who_was_there_first(reception):
    """Bob, of the test above, has never been here."""
    assert reception.succeed("cat /var/guests") == "Alice\n"
    assert reception.unit("reader.service").is_active

    reception.succeed("systemctl stop reader && rm /var/guests")
