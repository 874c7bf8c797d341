"""Why a machine can't be frozen; where QEMU has a say in it, it is asked."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import cast

import pytest
from _qemu import QEMU, Asked, Refused, needs_qemu

from pytest_nixvm.qemu.blockers import DEVICE, SHARES, Blocker, explain, found, ram_only
from pytest_nixvm.qemu.replay import ram_arguments

S = Path("/s")
NIXOS = (
    "qemu-system-x86_64", "-machine", "accel=tcg", "-m", "1024", "-device", "virtio-rng-pci",
    "-net", "nic,netdev=user.0,model=virtio", "-netdev", "user,id=user.0,hostfwd=tcp::22-:22",
    "-virtfs", "local,path=/nix/store,security_model=none,mount_tag=nix-store",
    "-drive", "cache=writeback,file=/s/root.qcow2,id=drive1,if=none,index=1,werror=report",
    "-drive", "file=/nix/store/abc.erofs,format=raw,id=drive2,if=none,index=2,readonly=on",
    "-drive", "if=pflash,format=raw,unit=1,file=/s/efi-vars.fd", "-hdb", "empty0.qcow2",
    "-cdrom", "/nix/store/abc.iso", "-display", "none", "-vga", "std",
    "-device", "virtio-blk-pci,bootindex=1,drive=drive1", "-device", "pvpanic",
    "-chardev", "socket,id=c,path=/run/x/console,server=on,wait=off",
    *ram_arguments(1024, Path("/tpl/ram")),
)  # fmt: skip


def whats(*arguments: str) -> list[str]:
    return [each.what for each in found(("qemu", *arguments), S)]


def test_a_machine_of_nixos_has_nothing_in_the_way() -> None:
    # Its 9p share is, if the guest has it mounted: that is QEMU's to say.
    assert found(NIXOS, S) == ()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("-device", "vhost-user-fs-pci,chardev=c,tag=nix-store"),
         "the virtiofs share 'nix-store'"),
        (("-device", '{"driver":"vhost-user-fs-pci","tag":"x"}'), "the virtiofs share 'x'"),
        (("--device", "vfio-pci,host=0000:01:00.0"),
         "the passed-through device vfio-pci (0000:01:00.0)"),
        (("-device", "usb-host,id=stick"), "the passed-through device usb-host (stick)"),
        (("-usbdevice", "host:1.2"), "the passed-through device usb-host (1.2)"),
        (("-device", "nvme,drive=x"), "the nvme disk"),
        (("-device", "vhost-user-blk-pci"),
         "the device vhost-user-blk-pci, a part of which is not in QEMU"),
        (("-device", "vhost-vsock-pci,guest-cid=5"), "the device vhost-vsock-pci: two clones "
         "can't both have the number 5 on the host"),
        (("-device", "virtio-vga-gl"),
         "the graphics card virtio-vga-gl, a part of which is in the host's"),
        (("-device", "ivshmem-plain,memdev=m"), "the device ivshmem-plain"),
        (("-tpmdev", "emulator,id=tpm0,chardev=t"),
         "the TPM tpm0, whose state is outside of QEMU"),
        (("-numa", "node,memdev=m0"), "NUMA memory (memdev=m0), in the place of the plugin's"),
        (("-object", "memory-backend-memfd,id=m0,size=1G,share=on"),
         "memory of the start script's own (memory-backend-memfd 'm0')"),
        (("-object", "sev-guest,id=s"), "encrypted memory (sev-guest)"),
        (("-vnc", ":0"), "-vnc :0: two clones can't both listen on one port"),
        (("-display", "vnc=:1,password=on"), "-vnc :1: two clones can't both listen on one port"),
        (("-spice", "port=5900,disable-ticketing=on"),
         "-spice with port 5900: two clones can't both listen on it"),
        (("-gdb", "tcp::1234"), "-gdb tcp::1234: two clones can't both listen on one port"),
        (("-s",), "-gdb tcp::1234: two clones can't both listen on one port"),
        (("-netdev", "tap,id=t,ifname=tap0"),
         "the network tap 't': two clones can't both have tap0"),
        (("-nic", "tap,fd=3"), "the network tap, which has a descriptor from the start script"),
        (("-netdev", "socket,id=n,listen=:1"),
         "the network socket 'n': two clones can't both listen on :1"),
        (("-netdev", "stream,id=n,server=on,addr.type=inet,addr.host=h,addr.port=1"),
         "the network stream 'n': two clones can't both listen on 1"),
        (("-mem-path", "/dev/shm"), "-mem-path /dev/shm, in the place of the plugin's"),
        (("-hda", "/home/u/disk.qcow2"),
         "the drive /home/u/disk.qcow2, which is written to and not the machine's own"),
        (("-loadvm", "ready"), "the machine loads a state itself (ready)"),
        (("-incoming", "tcp::1"), "the machine loads a state itself (tcp::1)"),
        (("-hda", "../disk"), "the drive ../disk, which is written to and not the machine's own"),
        (("-hda", "/scratch/disk"),
         "the drive /scratch/disk, which is written to and not the machine's own"),
        (("-drive", "file=nbd://h/x"), "the drive nbd://h/x, which is written to and is no file"),
        (("-drive", "file=/nix/x,snapshot=on"),
         "the drive /nix/x: what is written goes into a file that ends with QEMU"),
        (("-drive", "file=/nix/x,format=vmdk,readonly=on"),
         "the drive /nix/x: QEMU can't freeze the format vmdk"),
    ],
)  # fmt: skip
def test_what_the_command_line_shows(arguments: tuple[str, ...], what: str) -> None:
    assert whats(*arguments) == [what]


@pytest.mark.parametrize(
    "arguments",
    [
        ("-vnc", "none"),
        ("-vnc", ":0,to=99"),
        ("-vnc", "unix:/s/vnc"),
        ("-spice", "unix=on,addr=/s/spice"),
        ("-gdb", "none"),
        ("-tpmdev", "help"),
        ("-drive", "file=nbd://h/x,readonly=on"),
        ("-netdev", "vde,id=v,sock=/s/vde"),
        ("-append", "-gdb tcp::1234"),
        ("-incoming", "defer"),
        ("-object", "rng-random,id=r,filename=/dev/urandom"),
    ],
)
def test_what_is_not_in_the_way(arguments: tuple[str, ...]) -> None:
    assert whats(*arguments) == []


def test_a_new_qemu_is_asked_about_nvme() -> None:
    argv = ("qemu", "-device", "nvme,drive=x")
    assert found(argv, S, (10, 2, 0)) != ()
    assert found(argv, S, (11, 0, 0)) == ()


def test_a_disk_whose_links_were_resolved_is_the_machines_own(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    for path in (real / "disk", link / "disk"):
        assert found(("qemu", "-hda", str(path)), link) == ()


def test_what_only_the_file_with_the_memory_is_refused_for() -> None:
    for argv, expected in (
        (("-numa", "node,memdev=m"), True),
        (("-mem-path", "/x"), True),
        (("-object", "memory-backend-memfd,id=m,share=on"), True),
        (("-object", "memory-backend-file,id=m,mem-path=/x,share=on"), False),
        (("-device", "nvme"), False),
    ):
        assert [each.ram_only for each in found(("qemu", *argv), S)] == [expected]


def test_each_is_said_once_and_in_one_line() -> None:
    twice = found(("qemu", "-device", "nvme,drive=a", "-device", "nvme,drive=b"), S)
    assert len(twice) == 1
    (share,) = found(("qemu", "-device", "vhost-user-fs-pci,tag=x"), S)
    assert str(share) == f"the virtiofs share 'x' (to lift that: {SHARES})"
    assert str(Blocker("a\nb")) == "a b"


# --- what QEMU says ---


@pytest.mark.parametrize(
    ("reason", "what"),
    [
        ("Migration is disabled when VirtFS export path '/nix/store' is mounted in the guest using "
         "mount_tag 'nix-store'", "the 9p share 'nix-store' (/nix/store)"),
        ("State blocked by non-migratable device '0000:00:02.0/nvme'", "the device nvme at "
         "0000:00:02.0"),
        ("non-migratable device: 0000:00:01.2/1/usb-serial",
         "the device usb-serial at 0000:00:01.2/1"),
        ("State blocked by non-migratable CPU device (invtsc flag)",
         "the CPU's invtsc flag: its clock can't be frozen"),
        ("Nested VMX virtualization does not support live migration yet",
         "virtualisation in the guest (nested)"),
        ("Block format 'qcow' used by device 'x' does not support feature 'live migration'",
         "the drive 'x': QEMU can't freeze the format qcow"),
        ("Migration disabled: vhost lacks VHOST_F_LOG_ALL feature.",
         "a vhost device of the host's kernel"),
        ("Migration disabled: TPM emulator does not support migration",
         "the TPM, whose state is outside of QEMU"),
        ("0000:01:00.0: VFIO migration is not supported in kernel",
         "a passed-through device (VFIO)"),
        ("virgl is not yet migratable", "the graphics card, a part of which is in the host's"),
        ("SEV: Migration is not implemented", "encrypted memory"),
    ],
)  # fmt: skip
def test_what_qemu_says(reason: str, what: str) -> None:
    blocker = explain(reason, ("qemu",))
    assert blocker.what == what
    assert blocker.remedy
    assert not blocker.ram_only


def test_a_share_is_named_from_the_command_line() -> None:
    one = ("qemu", "-device", "vhost-user-fs-pci,chardev=c,tag=nix-store")
    two = (*one, "-device", "vhost-user-fs-pci,chardev=d,tag=xchg")
    for reason in (
        "State blocked by non-migratable device '0000:00:07.0/vhost-user-fs'",
        "Migration disabled: vhost-user backend lacks VHOST_USER_PROTOCOL_F_LOG_SHMFD feature.",
    ):
        assert explain(reason, one) == Blocker("the virtiofs share 'nix-store'", SHARES)
        assert explain(reason, two) == Blocker("the virtiofs shares", SHARES)


def test_unknown_words_stay() -> None:
    assert explain("Something new\n", ("qemu",)) == Blocker("Something new", "")


def test_the_second_choice_is_known_from_the_words() -> None:
    for text in (
        "Parameter 'capability' does not accept value 'x-ignore-shared'",
        "can't open backing store /tpl/ram for guest RAM: No space left on device",
        "'-mem-path' can't be used together with'-machine memory-backend'",
        "Machine memory size does not match the size of the memory backend",
    ):
        assert ram_only(text)
        assert explain(text, ("qemu",)).ram_only
    assert not ram_only("State blocked by non-migratable device '0000:00:02.0/nvme'")


# --- asked ---


def refusals(log: Path, *arguments: str) -> list[str]:
    """What QEMU gives as reasons when it is to save its state."""
    assert QEMU is not None
    qemu = Asked(
        (QEMU, "-nodefaults", "-display", "none", "-S", "-m", "32", "-qmp", "stdio", *arguments),
        log,
    )
    try:
        blocked = cast("dict[str, list[str]]", qemu.execute("query-migrate"))
        try:
            qemu.migrate("migrate", "exec:cat >/dev/null")
        except Refused as error:
            return [str(error), *blocked.get("blocked-reasons", [])]
        return blocked.get("blocked-reasons", [])
    finally:
        qemu.process.kill()
        qemu.process.communicate()


@needs_qemu
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("-drive", "file={0},if=none,id=x,format=raw", "-device", "nvme,drive=x,serial=1"),
         {"the nvme disk"}),
        (("-usb", "-chardev", "null,id=n", "-device", "usb-serial,chardev=n"),
         {"the device usb-serial at 0000:00:01.2/1"}),
        (("-drive", "file={1},if=none,id=x,format=vmdk"),
         {"the drive {1}: QEMU can't freeze the format vmdk"}),
        (("-blockdev", "driver=vmdk,node-name=nn,file.driver=file,file.filename={1}"),
         {"the drive {1}: QEMU can't freeze the format vmdk"}),
        (("-object", "memory-backend-ram,id=i,size=1M,share=on",
          "-device", "ivshmem-plain,memdev=i"), {"the device ivshmem"}),
        (("-drive", "file={0},if=virtio,format=raw"), set()),
    ],
)  # fmt: skip
def test_qemus_own_words_are_understood(
    tmp_path: Path, arguments: tuple[str, ...], expected: set[str]
) -> None:
    images = [str(tmp_path / name) for name in ("raw", "vmdk")]
    for image in images:
        subprocess.run(["qemu-img", "create", "-qf", Path(image).name, image, "1M"], check=True)
    argv = [each.format(*images) for each in arguments]
    reasons = refusals(tmp_path / "log", *argv)
    if not reasons and "nvme" in arguments[-1]:
        pytest.skip("this QEMU can freeze an nvme disk")
    blockers = [explain(reason, ("qemu", *argv)) for reason in reasons]
    assert {each.what for each in blockers} == {each.format(*images) for each in expected}
    assert all(each.remedy for each in blockers)
    # And what QEMU refuses was known before, as far as it is certain.
    if "ivshmem" in str(argv) or "vmdk" in str(argv) or "nvme" in str(argv):
        assert found(("qemu", *argv), tmp_path)


def test_devices_of_the_start_script_are_its_options() -> None:
    (blocker,) = found(("qemu", "-gdb", "tcp::1"), S)
    assert blocker.remedy == DEVICE
