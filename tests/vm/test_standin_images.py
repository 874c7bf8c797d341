"""The stand-in's images boot with nothing but themselves.

On real nixpkgs these would test nixpkgs. That machines boot from such images is tested elsewhere,
with virtio disks; here it is the hardware that VirtualBox has.
"""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

BOOT_TIMEOUT = 180.0  # seconds; it takes 25 where nothing else runs


@pytest.fixture(scope="session")
def nix(arguments: list[str], flake_copy: Callable[[str], Path]) -> Callable[..., str]:
    """`nix("build", "qemu", …)`: ask nix about an image of the flake beside this file."""
    flake = flake_copy("standin_images")
    options: list[str] = ["--no-write-lock-file"]
    for at in range(0, len(arguments), 3):
        options += [arguments[at].replace("nixvm-nix-", "").replace("nixvm-", "")]
        options += arguments[at + 1 : at + 3]
    config = "experimental-features = nix-command flakes\n" + os.environ.get("NIX_CONFIG", "")
    if os.geteuid() == 0 and not Path("/nix/var/nix/daemon-socket/socket").exists():
        config += "\nbuild-users-group =\n"

    def ask(command: str, image: str, *more: str) -> str:
        attribute = f"{flake}#nixosConfigurations.small.config.system.build.images.{image}"
        return subprocess.run(
            ["nix", command, attribute, *options, *more],
            env={**os.environ, "NIX_CONFIG": config},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout

    return ask


@pytest.fixture(scope="session")
def image(nix: Callable[..., str]) -> Callable[[str], Path]:
    """Build an image; its file is where nixpkgs' interface says."""

    def build(variant: str) -> Path:
        (built,) = json.loads(nix("build", variant, "--no-link", "--json"))
        return Path(built["outputs"]["out"]) / nix("eval", f"{variant}.passthru.filePath", "--raw")

    return build


def info(file: Path) -> dict[str, object]:
    done = subprocess.run(
        ["qemu-img", "info", "--output=json", file], capture_output=True, check=True
    )
    return json.loads(done.stdout)


def test_a_disk_is_as_large_as_the_configuration_says(image: Callable[[str], Path]) -> None:
    found = info(image("qemu"))
    assert (found["format"], found["virtual-size"]) == ("qcow2", 2048 << 20)


def test_an_ova_boots_on_sata(image: Callable[[str], Path], tmp_path: Path) -> None:
    file = image("virtualbox")
    assert file.suffix == ".ova"
    with tarfile.open(file) as archive:
        description, *_, disk = archive.getmembers()
        assert description.name.endswith(".ovf")
        reader = archive.extractfile(disk)
        assert reader is not None
        (tmp_path / "disk.vmdk").write_bytes(reader.read())
    assert info(tmp_path / "disk.vmdk")["format"] == "vmdk"

    text = console(
        tmp_path / "console.log",
        *("-machine", "q35,accel=tcg", "-nic", "user,restrict=on,model=e1000"),
        *("-drive", f"file={tmp_path}/disk.vmdk,if=none,id=disk,snapshot=on"),
        *("-device", "ide-hd,drive=disk,bus=ide.0"),
    )
    assert "Hello, world!" in text  # a package, from the store on the disk
    assert "/dev/sda1" in text
    assert "10.0.2.15/24" in text


def console(log: Path, *hardware: str) -> str:
    """What a machine has written to its serial port when it has started."""
    machine = subprocess.Popen(
        [
            *("qemu-system-x86_64", "-display", "none", "-monitor", "none", "-no-reboot"),
            *("-cpu", "max", "-m", "1024", "-smp", "2", "-serial", f"file:{log}", *hardware),
        ]
    )
    deadline = time.monotonic() + BOOT_TIMEOUT
    text = ""
    try:
        while time.monotonic() < deadline and machine.poll() is None:
            text = log.read_text(errors="replace") if log.exists() else ""
            if "reported" in text and "small login:" in text:
                return text
            time.sleep(0.2)
    finally:
        machine.kill()
        machine.wait()
    pytest.fail(f"no log-in prompt; the console ends with:\n{text[-2000:]}")
