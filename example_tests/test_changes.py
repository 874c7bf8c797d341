"""What becomes of dev-vm, while it runs, when its configuration changes: seven made-up changes.

The change that is about to be made for real is tested with the `change` fixture, and needs no more
than `pytest --nixvm-flake=nix --nixvm-from=HEAD~1`. Here each change is a copy of the flake with
another `guestbook.nix`, and `nixvm.change` takes it from there. The deployed generation boots once;
each test gets a clone of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest

from pytest_nixvm import Change, Fleet, errors

pytestmark = pytest.mark.change

# What all of them have in common, if they don't say otherwise: a service with state.
GUESTBOOK = """
{
  imports = [
    (
      { lib, ... }:
      {
        CHANGE
      }
    )
  ];

  systemd.services.guestbook = {
    description = "Who was here";
    wantedBy = [ "multi-user.target" ];
    serviceConfig.StateDirectory = "guestbook";
    script = ''
      touch "$STATE_DIRECTORY/guests"
      exec tail --follow "$STATE_DIRECTORY/guests"
    '';
  };
}
"""

CHANGES = {
    "deployed": "",
    # A good change: another description, and a file that the service reads.
    "good": """
        systemd.services.guestbook.environment.GREETING = "welcome";
        environment.etc."guestbook/greeting".text = "welcome";
    """,
    # Its service starts, and fails a moment later.
    "fails": """
        systemd.services.guestbook.script = lib.mkForce "echo no paper left >&2; exit 3";
    """,
    # Evaluates, builds, switches without a word, and lets nobody in any more.
    "locks-out": """
        services.openssh.settings.AllowUsers = [ "carol" ];
    """,
    # Takes effect with the next boot only.
    "reboot": """
        boot.kernelParams = [ "audit=1" ];
    """,
    # Restrat: systemd ignores it, and says so in the journal only.
    "mistyped": """
        systemd.services.guestbook.serviceConfig.Restrat = "always";
    """,
    # The state is kept under another name from now on.
    "migrates": """
        systemd.services.guestbook = {
          preStart = ''
            [ -e "$STATE_DIRECTORY/book" ] || cp "$STATE_DIRECTORY/guests" "$STATE_DIRECTORY/book"
          '';
          script = lib.mkForce ''exec tail --follow "$STATE_DIRECTORY/book"'';
        };
    """,
}


@pytest.fixture(scope="session")
def flakes(nixvm: Fleet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A copy of the flake for each change: its reference."""
    source = nixvm.flake.reference.local
    if source is None:
        pytest.skip(f"{nixvm.settings.flake} is no directory that could be copied and changed")
    found = {}
    for name, change in CHANGES.items():
        copy = tmp_path_factory.mktemp(name) / "nix"
        shutil.copytree(source, copy)
        place = copy / "machines" / "vms" / "dev-vm"
        (place / "guestbook.nix").write_text(GUESTBOOK.replace("CHANGE", change))
        main = place / "configuration.nix"
        main.write_text(main.read_text().replace("imports = [", "imports = [ ./guestbook.nix", 1))
        found[name] = f"path:{copy}"
    return found


@pytest.fixture
def proposal(nixvm: Fleet, flakes: dict[str, str]) -> Iterator[Callable[[str], Change]]:
    """Return a function that gives a change by its name; its machine ends with the test."""
    made: list[Change] = []

    def propose(name: str) -> Change:
        base, *candidates = flakes.values()
        made.append(nixvm.change("dev-vm", base=base, candidate=flakes[name], beside=candidates))
        return made[-1]

    yield propose
    for change in made:
        nixvm.end(change.vm)


def test_a_good_change(proposal):
    change = proposal("good")
    assert [unit.name for unit in change.diff.units.changed] == ["guestbook.service"]

    plan = change.dry_activate()
    result = change.switch()

    assert plan.restarted == ("guestbook.service",)
    assert result.happened.restarted == ("guestbook.service",)
    assert not result.surprises
    assert change.vm.succeed("cat /etc/guestbook/greeting") == "welcome"


def test_a_unit_that_fails_after_the_switch(proposal):
    change = proposal("fails")

    with pytest.raises(errors.SwitchError, match=r"guestbook\.service") as caught:
        change.switch()

    assert "no paper left" in str(caught.value)


def test_a_rollback_that_heals(proposal):
    change = proposal("fails")
    change.before.succeed("echo Alice >> /var/lib/guestbook/guests")

    result = change.switch(check=False)
    assert [unit.name for unit in result.newly_failed] == ["guestbook.service"]
    change.rollback()

    assert change.vm.unit("guestbook").is_active
    assert change.vm.succeed("cat /var/lib/guestbook/guests") == "Alice\n"


def test_a_change_that_locks_ssh_out(proposal):
    change = proposal("locks-out")

    with pytest.raises(errors.SwitchError, match="SSH") as caught:
        change.switch()

    assert "carol" in str(caught.value)
    assert change.vm.succeed("hostname") == "dev-vm\n"  # there are other ways in


def test_a_change_that_needs_a_reboot(proposal):
    change = proposal("reboot")

    result = change.switch()
    assert result.needs_reboot
    assert "audit=1" not in change.vm.succeed("cat /proc/cmdline")
    change.reboot()

    assert "audit=1" in change.vm.succeed("cat /proc/cmdline")


def test_a_change_that_silently_does_nothing(proposal):
    with pytest.raises(errors.SwitchError, match="silently ignored") as caught:
        proposal("mistyped").switch()

    assert "Restrat" in str(caught.value)


def test_a_state_migration(proposal):
    change = proposal("migrates")
    change.before.succeed("echo Alice >> /var/lib/guestbook/guests")

    change.switch()
    assert change.vm.succeed("cat /var/lib/guestbook/book") == "Alice\n"
    change.reboot()
    assert change.vm.succeed("cat /var/lib/guestbook/book") == "Alice\n"
    change.rollback()
    assert change.vm.succeed("cat /var/lib/guestbook/guests") == "Alice\n"
