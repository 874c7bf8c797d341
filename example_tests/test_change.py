"""The change that is about to be made: from the generation that is deployed to the flake as it is.

    pytest --nixvm-flake=nix --nixvm-from=HEAD~1 test_change.py

Without --nixvm-from, and for a machine that has not changed, the test is skipped.
"""


def test_the_change(change):
    change.before.succeed("echo 'written before' > /var/lib/witness")

    plan = change.dry_activate()
    assert "sshd.service" not in plan.stop, "the change ends open connections"
    change.switch()  # raises, and says why, if a unit fails or a way in is lost
    change.reboot()
    change.rollback()

    assert change.vm.succeed("cat /var/lib/witness") == "written before\n"
