"""Images without nix: the names of formats and machines, the start script, the firmware."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from pytest_nixvm.disks import backing_file
from pytest_nixvm.errors import FlakeError, MissingProgramError
from pytest_nixvm.flake.build import MachineInfo
from pytest_nixvm.flake.images import find, known_as, matching, offered, variant_of
from pytest_nixvm.qemu import firmware, image_script
from pytest_nixvm.qemu.accelerator import find_qemu
from pytest_nixvm.qemu.drives import drives
from pytest_nixvm.qemu.firmware import Firmware, find_firmware
from pytest_nixvm.qemu.image_script import Guest
from pytest_nixvm.qemu.spec import configured_memory

DEV = MachineInfo("dev-vm", "nixosConfigurations.dev-vm", "x86_64-linux")
TEST = MachineInfo("test-vm", "nixosConfigurations.test-vm", "x86_64-linux")
ODD = MachineInfo("me@home", 'nixosConfigurations."me@home"', "x86_64-linux")
MACHINES = (DEV, TEST, ODD)


# --- names ----------------------------------------------------------------------------------------


def test_formats_have_the_names_that_they_are_asked_for_by() -> None:
    assert [variant_of(name) for name in ("qcow2", "ova", "vmdk", "iso")] == [
        "qemu",
        "virtualbox",
        "vmware",
        "iso",
    ]
    assert known_as("virtualBoxOVA") == known_as("virtualbox") == known_as("OVA") == "ova"
    assert variant_of("proxmox") == "proxmox"  # nixpkgs has more
    assert offered(["proxmox", "vmware", "qemu", "azure"]) == ["qcow2", "vmdk", "azure", "proxmox"]


def test_a_machine_s_name_with_a_format_is_a_machine() -> None:
    found = find(MACHINES, "dev-vm@virtualbox")
    assert found is not None
    assert (found.name, found.attribute, found.image) == (
        "dev-vm@virtualbox",
        DEV.attribute,
        "ova",
    )
    assert find(MACHINES, "me@home") is ODD
    assert find(MACHINES, "nobody@qcow2") is None
    assert find((found,), "dev-vm@virtualbox") is found
    with pytest.raises(
        FlakeError, match=r"'qcow'.* Did you mean qcow2.*There are: qcow2, raw, iso"
    ):
        find(MACHINES, "dev-vm@qcow")


def test_globs_select_images() -> None:
    def names(glob: str) -> list[str]:
        return [each.name for each in matching(MACHINES, glob)]

    assert names("*-vm@qcow2") == ["dev-vm@qcow2", "test-vm@qcow2"]
    assert names("dev-vm@*efi") == ["dev-vm@qcow2-efi", "dev-vm@raw-efi"]
    assert names("me@home") == ["me@home"]
    assert names("*") == [each.name for each in MACHINES]
    assert names("web@qcow2") == []
    with pytest.raises(FlakeError, match="'floppy'"):
        names("dev-vm@floppy")


# --- the start script -----------------------------------------------------------------------------


def guest(image: Path, **more: object) -> Guest:
    options: dict[str, object] = {
        "name": "dev-vm",
        "image": image,
        "format": "qcow2",
        "disk_format": "qcow2",
        "bus": "virtio",
        "card": "virtio-net-pci",
        "memory": 2048,
        "cores": 2,
        "disk_size": 64,
        "graphics": False,
        "firmware": None,
    }
    return Guest(**(options | more))  # type: ignore[arg-type]


class Bench:
    """Runs start scripts: qemu-img is the real one, QEMU says what it was given."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.disk = directory / "run" / "disk.qcow2"
        self.variables = directory / "run" / "vars.fd"
        programs = directory / "bin"
        programs.mkdir()
        self.disk.parent.mkdir()
        self.qemu = programs / "qemu-system-x86_64"
        self.qemu.write_text('#!/bin/sh\nfor each in "$@"; do printf "%s\\n" "$each"; done\n')
        self.qemu.chmod(0o755)
        (programs / "qemu-img").symlink_to(shutil.which("qemu-img") or "/nonexistent")

    def start(self, script: str, *words: str) -> list[str]:
        path = self.directory / "start"
        path.write_text(script)
        done = subprocess.run(
            ["sh", path, *words],
            env={
                "PATH": "/usr/bin:/bin:/run/current-system/sw/bin",
                "NIX_DISK_IMAGE": str(self.disk),
                "NIX_EFI_VARS": str(self.variables),
                "TMPDIR": str(self.disk.parent),
                "USE_TMPDIR": "1",
                "QEMU_OPTS": "-opts here",
                "QEMU_NET_OPTS": "restrict=on",
            },
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [str(self.qemu), *done.stdout.splitlines()]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    return Bench(tmp_path)


def image(path: Path, form: str, content: bytes = b"") -> Path:
    raw = path.with_suffix(".content")
    raw.write_bytes(content.ljust(1 << 20, b"\0"))
    convert = ("qemu-img", "convert", "-f", "raw", "-O", form)
    more = ("-o", "subformat=streamOptimized") if form == "vmdk" else ()
    subprocess.run([*convert, *more, raw, path], check=True)
    return path


def content(disk: Path, begin: int = 16) -> bytes:
    out = disk.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", disk, out], check=True)
    return out.read_bytes()[:begin].rstrip(b"\0")


def test_the_disk_is_an_overlay_over_the_image(bench: Bench) -> None:
    file = image(bench.directory / "an image.qcow2", "qcow2", b"installed")
    script = image_script.make(guest(file), bench.qemu)
    argv = bench.start(script, "-last", "a word")
    assert content(bench.disk) == b"installed"
    assert [(each.path, each.readonly) for each in drives(argv)] == [(str(bench.disk), False)]
    assert argv[-4:] == ["-opts", "here", "-last", "a word"]
    assert "user,id=user.0,restrict=on" in argv
    assert "-nographic" in argv
    # What is there is used again.
    written = bench.disk.stat().st_mtime_ns
    bench.start(script)
    assert bench.disk.stat().st_mtime_ns == written


def test_an_ova_s_disks_are_read_where_they_are(bench: Bench) -> None:
    archive = bench.directory / "machine.ova"
    with tarfile.open(archive, "w") as tar:
        tar.add(image(bench.directory / "a.vmdk", "vmdk", b"first"), "machine.ovf")
        tar.add(image(bench.directory / "a.vmdk", "vmdk", b"first"), "machine-disk001.vmdk")
        tar.add(image(bench.directory / "b.vmdk", "vmdk", b"second"), "machine-disk002.vmdk")
    ova = guest(archive, format="ova", disk_format="vmdk", bus="sata")
    argv = bench.start(image_script.make(ova, bench.qemu))
    assert content(bench.disk) == b"first"
    assert content(Path(f"{bench.disk}-1")) == b"second"
    assert backing_file(bench.disk) == archive  # what `nixvm run` looks for
    assert sum(argument.startswith("ide-hd,") for argument in argv) == 2
    with_copy = guest(archive, format="ova", disk_format="vmdk", bus="sata", copied=True)
    bench.disk.unlink()
    bench.start(image_script.make(with_copy, bench.qemu))
    assert content(bench.disk) == b"first"
    info = subprocess.run(["qemu-img", "info", bench.disk], capture_output=True, check=True)
    assert b"backing file" not in info.stdout


@pytest.mark.parametrize("broken", [b"", b"no archive at all" * 100])
def test_an_ova_without_a_disk_is_said(tmp_path: Path, broken: bytes) -> None:
    archive = tmp_path / "machine.ova"
    archive.write_bytes(broken)
    with pytest.raises(FlakeError, match=r"machine\.ova"):
        image_script.make(guest(archive, format="ova"), Path("/usr/bin/qemu-system-x86_64"))


def test_a_medium_is_only_read_and_has_a_disk_beside_it(bench: Bench) -> None:
    medium = image(bench.directory / "nixos.iso", "raw")
    script = image_script.make(guest(medium, format="iso", disk_format="raw"), bench.qemu)
    found = {each.path: each.readonly for each in drives(bench.start(script))}
    assert found == {str(medium): True, str(bench.disk): False}


def test_efi_variables_are_the_machine_s_own(bench: Bench) -> None:
    chips = Firmware(bench.directory / "CODE.fd", bench.directory / "VARS.fd")
    chips.code.write_text("code")
    chips.variables.write_text("empty")
    chips.variables.chmod(0o444)
    file = image(bench.directory / "disk.raw", "raw")
    efi = guest(file, format="raw-efi", disk_format="raw", firmware=chips)
    argv = bench.start(image_script.make(efi, bench.qemu))
    found = {each.path: each.readonly for each in drives(argv)}
    assert found == {
        str(chips.code): True,
        str(bench.variables): False,
        str(bench.disk): False,
    }
    assert bench.variables.read_text() == "empty"
    bench.variables.write_text("boot entries")
    bench.start(image_script.make(efi, bench.qemu))
    assert bench.variables.read_text() == "boot entries"


def test_the_launcher_finds_in_the_script_what_it_looks_for(bench: Bench) -> None:
    file = image(bench.directory / "disk.qcow2", "qcow2")
    path = bench.directory / "run-dev-vm-vm"
    path.write_text(image_script.make(guest(file), bench.qemu))
    assert find_qemu(path) == bench.qemu
    assert configured_memory(path.read_text()) == 2048


# --- the firmware ---------------------------------------------------------------------------------


def describe(directory: Path, name: str, *features: str, architecture: str = "x86_64") -> Path:
    code, variables = directory / f"{name}.code", directory / f"{name}.vars"
    code.write_text("")
    variables.write_text("")
    description = {
        "interface-types": ["uefi"],
        "mapping": {
            "device": "flash",
            "executable": {"filename": str(code), "format": "raw"},
            "nvram-template": {"filename": str(variables), "format": "raw"},
        },
        "targets": [{"architecture": architecture, "machines": ["pc-i440fx-*", "pc-q35-*"]}],
        "features": list(features),
        "tags": [],
    }
    (directory / f"{name}.json").write_text(json.dumps(description))
    return code


@pytest.fixture
def described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "firmware"
    directory.mkdir()
    monkeypatch.setattr(firmware, "_PLACES", (directory,))
    return directory


def test_firmware_that_boots_what_nobody_has_signed_is_taken(described: Path) -> None:
    describe(described, "40-enrolled", "enrolled-keys", "secure-boot", "requires-smm")
    describe(described, "50-arm", architecture="aarch64")
    (described / "55-broken.json").write_text('{"mapping": 5}')
    plain = describe(described, "60-plain", "acpi-s3")
    qemu = described / "bin" / "qemu-system-x86_64"
    assert find_firmware(qemu, "dev-vm@vmdk").code == plain


def test_qemu_s_own_firmware_comes_first(described: Path, tmp_path: Path) -> None:
    describe(described, "60-plain")
    share = tmp_path / "package" / "share" / "qemu"
    (share / "firmware").mkdir(parents=True)
    qemu = tmp_path / "package" / "bin" / "qemu-system-x86_64"
    qemu.parent.mkdir()
    qemu.write_text("")
    own = describe(share / "firmware", "60-edk2")
    assert find_firmware(qemu, "dev-vm@vmdk").code == own


def test_an_empty_description_hides_one_that_is_installed(
    described: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe(described, "60-edk2")
    mine = tmp_path / "etc"
    mine.mkdir()
    monkeypatch.setattr(firmware, "_PLACES", (mine, described))
    qemu = tmp_path / "bin" / "qemu-system-x86_64"
    assert find_firmware(qemu, "dev-vm@vmdk")
    (mine / "60-edk2.json").touch()
    with pytest.raises(MissingProgramError):
        find_firmware(qemu, "dev-vm@vmdk")


def test_no_firmware_is_one_message(described: Path) -> None:
    with pytest.raises(MissingProgramError) as raised:
        find_firmware(described / "bin" / "qemu-system-x86_64", "dev-vm@vmdk")
    text = str(raised.value)
    assert text.startswith("dev-vm@vmdk boots with EFI")
    assert "Debian and Ubuntu: ovmf" in text
