"""From a flake to a built VM, with real nix."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from _flake import Seen, Workshop, evaluations, git, machine, needs_nix, write_flake

from pytest_nixvm.errors import BuildError, EvaluationError, FlakeError, NotAVirtualMachineError
from pytest_nixvm.flake import MachineInfo, Override

pytestmark = needs_nix


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def own_build(flake: Path, attribute: str) -> str:
    """What the user gets for an attribute without us."""
    done = subprocess.run(
        [
            *("nix", "--extra-experimental-features", "nix-command flakes"),
            *("eval", "--raw", "--no-write-lock-file", f"{flake}#{attribute}.outPath"),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


def test_a_machine_is_built_as_its_owner_would_build_it(shop: Workshop) -> None:
    flake = write_flake(shop.tmp / "config", machine("dev-vm", shop.host))
    before = sorted(path for path in flake.rglob("*") if ".git" not in path.parts)
    vm = shop.flake(flake).build("dev-vm")
    assert vm.name == "dev-vm"
    assert vm.attribute == "nixosConfigurations.dev-vm"
    assert vm.start_script == vm.output / f"bin/run-{shop.host}-vm"
    assert vm.toplevel is not None
    assert vm.toplevel.name.endswith(f"-nixos-system-{shop.host}")
    assert vm.system == "x86_64-linux"
    assert vm.overrides == ()
    assert vm.evaluated > 0
    assert vm.built > 0
    own = own_build(flake, "nixosConfigurations.dev-vm.config.system.build.vm")
    assert str(vm.output) == own
    assert before == sorted(path for path in flake.rglob("*") if ".git" not in path.parts)
    assert git(flake, "status", "--porcelain") == ""


@pytest.mark.parametrize("direct", ["false", "true"])
def test_an_agent_that_was_turned_off_is_turned_on_and_reported(
    shop: Workshop, direct: str
) -> None:
    off = "services.qemuGuest.enable = force false;"
    if direct == "false":
        off = f"virtualisation.vmVariant = {{ {off} virtualisation.memorySize = 512; }};"
    body = machine("vm", shop.host, f"({{ force, ... }}: {{ {off} }})")
    body = body.replace("nixosSystem {", f"nixosSystem {{ direct = {direct};")
    vm = shop.flake(write_flake(shop.tmp / "config", body)).build("vm")
    assert vm.toplevel is not None
    assert (vm.toplevel / "what").read_text() == "agent on\n"
    (override,) = vm.overrides
    assert isinstance(override, Override)
    assert (override.option, override.value) == ("services.qemuGuest.enable", "true")
    assert "agent" in override.reason


def test_the_machines_are_listed_in_one_evaluation(shop: Workshop) -> None:
    body = (
        machine("a", "a")
        + machine("needs quotes", "b")
        + machine("pi", "pi").replace("nixosSystem {", 'nixosSystem { system = "aarch64-linux";')
        + "darwinConfigurations.mac = { };"
    )
    seen = Seen()
    found = shop.flake(write_flake(shop.tmp / "config", body), progress=seen).machines()
    assert evaluations(seen) == 1
    assert found[0] == MachineInfo("a", "nixosConfigurations.a", "x86_64-linux")
    assert {info.name: info.skip for info in found if info.skip} == {
        "pi": "it is for aarch64-linux, this machine is x86_64-linux",
        "mac": "it is a Darwin (macOS) host: there is no NixOS to boot",
    }
    assert [i.attribute for i in found if i.name == "needs quotes"] == [
        'nixosConfigurations."needs quotes"'
    ]
    with pytest.raises(FlakeError, match=r"pi of .* can't be tested here: it is for aarch64"):
        shop.flake(shop.tmp / "config").build("pi")


@pytest.mark.parametrize("broken", ['throw "broken on purpose"', '1 + "a"', 'abort "no"'])
def test_a_broken_host_does_not_hide_the_others(shop: Workshop, broken: str) -> None:
    pi = machine("pi", "pi").replace("nixosSystem {", 'nixosSystem { system = "aarch64-linux";')
    body = machine("good", shop.host) + pi + f"nixosConfigurations.bad = {broken};"
    flake = shop.flake(write_flake(shop.tmp / "config", body))
    names = {info.name: info.skip is None for info in flake.machines()}
    assert names == {"good": True, "pi": False, "bad": True}
    assert flake.build("good").start_script.exists()
    with pytest.raises(EvaluationError, match=r"nixosConfigurations\.bad of .*/config"):
        flake.build("bad")


@pytest.mark.parametrize(
    ("fragment", "attribute"),
    [
        ("dev-vm", "nixosConfigurations.dev-vm"),
        ("nixosConfigurations.dev-vm", "nixosConfigurations.dev-vm"),
        ("packages.x86_64-linux.my-vm", "packages.x86_64-linux.my-vm"),
        ("my-vm", "packages.x86_64-linux.my-vm"),
        ("hosts.inner", "hosts.inner"),
        ('hosts."a.b"', 'hosts."a.b"'),
        (".hosts.inner", "hosts.inner"),
    ],
)
def test_one_attribute_is_named(shop: Workshop, fragment: str, attribute: str) -> None:
    body = machine("dev-vm", "dev-vm") + machine("other", "other")
    body += "packages.x86_64-linux.my-vm = self.nixosConfigurations.other.config.system.build.vm;"
    body += 'hosts.inner = self.nixosConfigurations.other; hosts."a.b" = self.hosts.inner;'
    flake = shop.flake(f"{write_flake(shop.tmp / 'config', body)}#{fragment}")
    (info,) = flake.machines()
    assert info.attribute == attribute
    vm = flake.build(info.name)
    assert vm.start_script.exists()
    assert vm.attribute == attribute


def test_the_result_is_rooted_and_found_again_without_nix(shop: Workshop) -> None:
    flake = write_flake(shop.tmp / "config", machine("dev-vm", shop.host))
    first = shop.flake(flake).build("dev-vm")
    roots = {root.readlink() for root in (shop.cache / "roots").iterdir()}
    assert roots == {first.output}
    again = shop.flake(flake)
    again.nix.__dict__["evaluate"] = again.nix.__dict__["realise"] = None  # any call would fail
    second = again.build("dev-vm")
    assert (second.evaluated, second.built) == (0, 0)
    assert second.output == first.output


def test_a_root_that_is_gone_is_made_again(shop: Workshop) -> None:
    flake = write_flake(shop.tmp / "config", machine("dev-vm", shop.host))
    vm = shop.flake(flake).build("dev-vm")
    (root,) = (shop.cache / "roots").iterdir()
    root.unlink()
    assert shop.flake(flake).build("dev-vm").evaluated == 0
    assert root.readlink() == vm.output


def test_a_result_that_was_collected_is_built_again(shop: Workshop) -> None:
    flake = write_flake(shop.tmp / "config", machine("dev-vm", shop.host))
    vm = shop.flake(flake).build("dev-vm")
    for root in (shop.cache / "roots").iterdir():
        root.unlink()
    subprocess.run(["nix-store", "--delete", vm.output], check=True, capture_output=True)
    assert not vm.output.exists()
    again = shop.flake(flake).build("dev-vm")
    assert again.output == vm.output
    assert again.start_script.exists()


def test_progress_tells_what_is_built_and_how_much_is_left(shop: Workshop) -> None:
    seen = Seen()
    flake = write_flake(shop.tmp / "config", machine("dev-vm", shop.host))
    shop.flake(flake, progress=seen).build("dev-vm")
    assert seen.titles[-2:] == ["Evaluating dev-vm", "Building dev-vm"]
    assert seen.ends == ["finished"] * 3
    assert (f"building nixos-system-{shop.host}", 0, 2) in seen.details
    assert ("building nixos-vm", 2, 2) in seen.details


def test_a_build_that_fails_shows_its_log(shop: Workshop) -> None:
    command = "echo the reason; echo more >&2; exit 3"
    body = machine("dev-vm", shop.host, f'{{ test.build = "{command}"; }}')
    seen = Seen()
    flake = shop.flake(write_flake(shop.tmp / "config", body), progress=seen)
    with pytest.raises(BuildError) as caught:
        flake.build("dev-vm")
    text = str(caught.value)
    assert f"nixos-system-{shop.host} failed with exit code 3" in text
    assert "    the reason\n    more\n" in text
    log = shop.logs / "build-dev-vm.log"
    assert f"The whole log: {log}" in text
    assert f"nixos-system-{shop.host}> the reason" in log.read_text()
    assert seen.ends[-1] == "failed"


def test_what_is_no_vm_is_said_to_be_none(shop: Workshop) -> None:
    plain = 'derivation { name = "plain"; builder = "/bin/sh"; args = [ "-c" ": > $out" ]; '
    plain += 'system = "x86_64-linux"; }'
    body = machine("box", "box", "{ test.vm = false; }")
    named = f'{plain} // {{ meta.mainProgram = "firefox"; }}'
    body += f"packages.x86_64-linux = {{ plain = {plain}; named = {named}; text = {{ }}; }};"
    flake = write_flake(shop.tmp / "config", body)
    for name, message in {
        "box": "box of .*/config can't be built as a VM: it has no config.system.build.vm",
        "plain": "plain of .* is no VM: its build has no bin/run-NAME-vm",
        "named": "named of .* is no VM: its program is bin/firefox",
        "text": "text of .* is neither a NixOS configuration nor a derivation",
    }.items():
        with pytest.raises(NotAVirtualMachineError, match=message):
            shop.flake(f"{flake}#{name}").build(name)


def test_an_override_replaces_an_input(shop: Workshop) -> None:
    write_flake(shop.tmp / "lib", "lib.nixosSystem = nixosSystem;", tracked=False)
    config = shop.tmp / "config"
    config.mkdir()
    body = machine("vm", shop.host).replace("nixosSystem {", "nixpkgs.lib.nixosSystem {")
    (config / "flake.nix").write_text(
        '{ inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11"; '
        "outputs = { self, nixpkgs }: { " + body + " }; }"
    )
    vm = shop.flake(config, override_inputs=[("nixpkgs", str(shop.tmp / "lib"))]).build("vm")
    assert vm.start_script.exists()
    assert sorted(path.name for path in config.iterdir()) == ["flake.nix"]


def _build_in_process(tmp: str, queue: multiprocessing.Queue[tuple[float, float]]) -> None:
    shop = Workshop(Path(tmp))
    vm = shop.flake(shop.tmp / "config").build("dev-vm")
    queue.put((vm.evaluated, vm.built))


def test_two_sessions_share_one_build(shop: Workshop) -> None:
    body = machine("dev-vm", shop.host, '{ test.build = "sleep 1"; }')
    write_flake(shop.tmp / "config", body)
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[tuple[float, float]] = context.Queue()
    both = [
        context.Process(target=_build_in_process, args=(str(shop.tmp), queue)) for _ in range(2)
    ]
    for process in both:
        process.start()
    results = sorted(queue.get(timeout=60) for _ in both)
    for process in both:
        process.join(10)
    assert results[0] == (0, 0)
    assert results[1][1] >= 1


def test_a_module_folder_is_all_that_is_shipped() -> None:
    """The wrapper is read by nix in whole: nothing may lie beside it."""
    from pytest_nixvm.flake.remember import MODULES

    assert sorted(path.name for path in MODULES.iterdir()) == [
        "declared.nix",
        "flake.nix",
        "interface.nix",
        "options.nix",
        "overrides.nix",
        "secrets.nix",
        "secrets.sh",
        "target.nix",
    ]
    assert sys.executable
    assert os.access(MODULES / "flake.nix", os.R_OK)
