"""Throwaway values for secrets: what modules/secrets.nix finds, and what its script does.

The script runs here as it would in the machine, with its directories moved below `tmp_path`.
"""

from __future__ import annotations

import base64
import grp
import os
import pwd
import re
import stat
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from _flake import needs_nix
from _nix_modules import evaluate

from pytest_nixvm.flake.declared import value_file
from pytest_nixvm.flake.variant import secrets_of

pytestmark = needs_nix

ME = pwd.getpwuid(os.geteuid()).pw_name
OURS = grp.getgrgid(os.getegid()).gr_name
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file to somebody else")

# What the modules make of `sops.secrets.api = { };` and so on, in their own options' form.
SOPS = """{
  users.users.alice.hashedPasswordFile = "/run/secrets-for-users/alice";
  services.openssh.hostKeys = [ { path = "/etc/ssh/host_key"; type = "ed25519"; } ];
  networking.wireguard.interfaces.wg0.privateKeyFile = "/run/secrets/wg";
  sops.secrets = {
    alice = {
      name = "alice"; neededForUsers = true; path = "/run/secrets-for-users/alice"; mode = "0400";
      owner = null; uid = 0; group = null; gid = 0; restartUnits = [ ]; reloadUnits = [ ];
    };
    "web/api" = {
      name = "web/api"; path = "/var/lib/app/key"; mode = "0440"; owner = "@ME@"; group = "@OURS@";
      restartUnits = [ "app.service" "b.service" ]; reloadUnits = [ "nginx.service" ];
    };
    wg = { name = "wg"; path = "/run/secrets/wg"; uid = 7; };
    host = { name = "host"; path = "/etc/ssh/host_key"; };
  };
  sops.placeholder = { "web/api" = "<SOPS:1:PLACEHOLDER>"; wg = "<SOPS:2:PLACEHOLDER>"; };
  sops.templates.env = {
    name = "env"; path = "/run/secrets/rendered/env"; mode = "0400";
    owner = "@ME@"; group = "@OURS@";
    file = builtins.toFile "env" "KEY=<SOPS:1:PLACEHOLDER>\\nAGAIN=<SOPS:1:PLACEHOLDER>\\n";
  };
  system.activationScripts.setupSecrets.text = "false";
}""".replace("@ME@", ME).replace("@OURS@", OURS)
AGE = f"""{{
  age.secretsDir = "/run/agenix";
  age.secrets = {{
    a = {{ name = "a"; path = "/run/agenix/a"; owner = "{ME}"; group = "{OURS}"; mode = "u=r"; }};
    b = {{
      name = "b"; path = "/srv/b"; symlink = true; owner = "{ME}"; group = "{OURS}"; mode = "0400";
    }};
    c = {{
      name = "c"; path = "/srv/c"; symlink = false; owner = "{ME}"; group = "{OURS}"; mode = "0400";
    }};
  }};
}}"""
HOOK = f"""[ {{ name = "token"; path = "/etc/token"; owner = "{ME}"; group = "{OURS}"; }} ]"""


def overrides(configuration: str, more: str = "[ ]") -> dict[str, Any]:
    """Return the overrides by the names of their options."""
    found = evaluate(f"(import (modules + /secrets.nix)).overrides ({configuration}) {more}")
    return {".".join(one["option"]): one for one in found}


def scripts(configuration: str, more: str = "[ ]") -> dict[str, str]:
    prefix = "system.activationScripts"
    found = {
        name.removeprefix(f"{prefix}.").removesuffix(".text"): one["value"]
        for name, one in overrides(configuration, more).items()
    }
    if prefix in found:
        found.update({name: one["text"] for name, one in found.pop(prefix).items()})
    return found


@dataclass
class Machine:
    """A directory that stands for the machine's /."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    def activate(self, script: str, expect: int = 0, bash: tuple[str, ...] = ("bash",)) -> str:
        moved = re.sub(r"/(?=(run|var|srv|etc)/)", f"{self.root}/", script)
        done = subprocess.run(
            [*bash, "-c", moved],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={"PATH": os.environ["PATH"], **self.environment},
        )
        assert done.returncode == expect, done.stdout + done.stderr
        assert not done.stderr or expect
        return done.stdout

    def __truediv__(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def read(self, path: str) -> str:
        return (self / path).read_text()

    def mode(self, path: str) -> int:
        return stat.S_IMODE((self / path).stat().st_mode)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# --- what is found ---


def test_the_secrets_that_a_configuration_declares() -> None:
    for configuration, provider in ((SOPS, "sops"), (AGE, "age")):
        found = secrets_of(
            evaluate(f"(import (modules + /secrets.nix)).find ({configuration}) [ ]")
        )
        assert {secret.provider for secret in found} == {provider}
    by_name = {
        s.name: s
        for s in secrets_of(evaluate(f"(import (modules + /secrets.nix)).find ({SOPS}) {HOOK}"))
    }
    api = by_name["web/api"]
    assert (api.path, api.owner, api.group, api.mode) == ("/var/lib/app/key", ME, OURS, "0440")
    assert api.restart_units == ("app.service", "b.service")
    assert (by_name["wg"].owner, by_name["wg"].group) == ("7", "root")
    assert by_name["token"].provider == "hook"


def test_nothing_is_changed_where_there_are_none() -> None:
    assert overrides("{ }") == {}
    assert overrides("{ sops.secrets = { }; age.secrets = { }; }") == {}
    assert evaluate("(import (modules + /secrets.nix)).find { } [ ]") == []


def test_a_set_of_secrets_that_can_t_be_evaluated_does_not_hide_the_other() -> None:
    broken = '{ sops.secrets = throw "no"; age.secrets.a = { name = "a"; }; }'
    assert [
        s["name"] for s in evaluate(f"(import (modules + /secrets.nix)).find {broken} [ ]")
    ] == ["a"]


def test_only_scripts_are_in_what_is_built() -> None:
    """No value, and nothing that the modules would decrypt."""
    for text in scripts(SOPS, HOOK).values():
        assert "/dev/urandom" in text
        assert not re.search(r"[0-9a-f]{64}", text)


# --- what the script does ---


def test_sops_secrets_are_where_they_are_declared(machine: Machine) -> None:
    machine.activate(scripts(SOPS)["setupSecrets"], expect=0 if os.geteuid() == 0 else 1)
    value = machine.read("/run/secrets/web/api")
    assert re.fullmatch("[0-9a-f]{64}", value)
    assert machine.read("/var/lib/app/key") == value
    assert (machine / "/var/lib/app/key").is_symlink()
    assert machine.mode("/run/secrets/web/api") == 0o440
    assert machine.mode("/run/secrets") == 0o751
    assert (machine / "/run/secrets/web/api").owner() == ME
    kept = machine / value_file("web/api")
    assert (kept.read_text(), stat.S_IMODE(kept.stat().st_mode)) == (value, 0o600)
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700


def test_templates_are_filled(machine: Machine) -> None:
    machine.activate(scripts(SOPS)["setupSecrets"], expect=0 if os.geteuid() == 0 else 1)
    value = machine.read("/run/secrets/web/api")
    assert machine.read("/run/secrets/rendered/env") == f"KEY={value}\nAGAIN={value}\n"
    assert machine.mode("/run/secrets/rendered/env") == 0o400
    assert evaluate(f"(import (modules + /secrets.nix)).templates ({SOPS})") == [
        "/run/secrets/rendered/env"
    ]


@needs_root
def test_a_value_has_the_form_that_its_reader_needs(machine: Machine) -> None:
    found = scripts(SOPS)
    machine.activate(found["setupSecretsForUsers"])
    machine.activate(found["setupSecrets"])
    password = machine.read("/run/secrets-for-users/alice")
    assert re.fullmatch(r"\$6\$[./0-9A-Za-z]{16}\$[./0-9A-Za-z]{85}[./01]", password)
    assert len(base64.b64decode(machine.read("/run/secrets/wg"), validate=False)) == 32
    assert (machine / "/run/secrets/wg").stat().st_uid == 7
    # sshd makes its own key where it finds none; it would not start with random bytes.
    assert not (machine / "/etc/ssh/host_key").exists()


@needs_root
def test_agenix_secrets(machine: Machine) -> None:
    found = scripts(AGE)
    assert found["agenixNewGeneration"] == ""
    machine.activate(found["agenixInstall"])
    before = machine.read("/run/agenix/a")
    machine.activate(found["agenixChown"])
    assert machine.read("/run/agenix/a") == before
    assert machine.mode("/run/agenix/a") == 0o400
    assert (machine / "/srv/b").readlink() == machine / "/run/agenix/b"
    assert (machine / "/srv/c").is_file()
    assert not (machine / "/srv/c").is_symlink()


def test_secrets_of_the_hook(machine: Machine) -> None:
    entry = overrides("{ }", HOOK)["system.activationScripts"]
    assert entry["merge"] is True
    assert entry["value"]["nixvmSecrets"]["deps"] == ["users", "groups"]
    machine.activate(scripts("{ }", HOOK)["nixvmSecrets"])
    assert re.fullmatch("[0-9a-f]{64}", machine.read("/etc/token"))
    assert machine.mode("/etc/token") == 0o400


def test_a_particular_value_is_used_as_it_is(machine: Machine) -> None:
    (machine / value_file("token")).parent.mkdir(parents=True)
    (machine / value_file("token")).write_bytes(b"my\0own\n")
    machine.activate(scripts("{ }", HOOK)["nixvmSecrets"])
    assert (machine / "/etc/token").read_bytes() == b"my\0own\n"


def test_values_stay_the_same(machine: Machine) -> None:
    """A switch and a reboot find what was there, and two machines have nothing in common."""
    script = scripts("{ }", HOOK)["nixvmSecrets"]
    machine.activate(script)
    value = machine.read("/etc/token")
    (machine / "/etc/token").unlink()
    machine.activate(script)
    assert machine.read("/etc/token") == value
    other = Machine(machine / "/srv/other")
    other.root.mkdir(parents=True)
    other.activate(script)
    assert other.read("/etc/token") != value


def test_a_secret_that_is_not_declared_any_more_is_gone(machine: Machine) -> None:
    both = f"({HOOK.replace('token', 'old')} ++ {HOOK})"
    machine.activate(scripts("{ }", both)["nixvmSecrets"])
    assert (machine / "/etc/old").exists()
    machine.activate(scripts("{ }", HOOK)["nixvmSecrets"])
    assert not (machine / "/etc/old").exists()
    assert (machine / "/etc/token").exists()


@needs_root
def test_what_reads_a_changed_secret_is_restarted_by_a_switch(machine: Machine) -> None:
    script = scripts(SOPS)["setupSecrets"]
    machine.activate(script)  # while booting: nothing runs yet
    restart = machine / "/run/nixos/activation-restart-list"
    assert not restart.exists()
    machine.environment["NIXOS_ACTION"] = "switch"
    machine.activate(script)
    assert not restart.exists()
    (machine / value_file("web/api")).write_text("new")
    machine.activate(script)
    assert restart.read_text() == "app.service\nb.service\n"
    assert machine.read("/run/nixos/activation-reload-list") == "nginx.service\n"
    assert machine.read("/run/secrets/rendered/env") == "KEY=new\nAGAIN=new\n"


def test_a_dry_activation_changes_nothing(machine: Machine) -> None:
    machine.environment["NIXOS_ACTION"] = "dry-activate"
    machine.activate(scripts("{ }", HOOK)["nixvmSecrets"])
    assert list(machine.root.iterdir()) == []


def test_an_owner_that_does_not_exist_is_told_and_fails(machine: Machine) -> None:
    hook = '[ { name = "x"; path = "/etc/x"; owner = "nobody-of-that-name"; group = "root"; } ]'
    said = machine.activate(scripts("{ }", hook)["nixvmSecrets"], expect=1)
    assert "can't be given to nobody-of-that-name:root" in said


# --- systems whose users are made by a unit ---


def test_units_are_replaced_where_the_modules_use_units() -> None:
    found = overrides(
        SOPS.rstrip("}")
        + """
        systemd.services.sops-install-secrets.serviceConfig.ExecStart = [ "x" ];
        systemd.services.sops-install-secrets-for-users.after = [ "y" ]; }"""
    )
    unit = "systemd.services.sops-install-secrets"
    assert found[f"{unit}.serviceConfig.ExecStart"]["value"].endswith("/bin/true")
    assert "install_secret" in found[f"{unit}.preStart"]["value"]
    # Ordering it does not make it one that installs anything.
    assert f"{unit}-for-users.preStart" not in found


@needs_root
def test_a_unit_installs_them_under_set_e(machine: Machine) -> None:
    """As nixpkgs runs `preStart`."""
    found = overrides(
        f"{SOPS} // {{ systemd.services.sops-install-secrets.serviceConfig.ExecStart = [ ]; }}"
    )
    script = found["systemd.services.sops-install-secrets.preStart"]["value"]
    for _ in range(2):
        machine.activate(script, bash=("bash", "-e"))
    assert re.fullmatch("[0-9a-f]{64}", machine.read("/var/lib/app/key"))


def test_the_hook_s_secrets_wait_for_the_users() -> None:
    found = overrides("{ services.userborn.enable = true; }", HOOK)
    [entry] = found.values()
    service = entry["value"]["nixvm-secrets"]
    assert "userborn.service" in service["after"]
    assert "install_secret" in service["script"]
