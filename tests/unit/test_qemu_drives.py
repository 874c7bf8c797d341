"""The drives on a command line, and the same line with another file; QEMU itself is the judge."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from _qemu import QEMU, needs_qemu

from pytest_nixvm.qemu.drives import Drive, drives, keyval, settings, unkeyval, with_file

# What a start script of NixOS makes of its settings (nixos/modules/virtualisation/qemu-vm.nix).
NIXOS = (
    "/nix/store/abc-qemu/bin/qemu-system-x86_64", "-machine", "accel=kvm:tcg", "-cpu", "max",
    "-name", "dev", "-m", "4096", "-smp", "1", "-device", "virtio-rng-pci",
    "-net", "nic,netdev=user.0,model=virtio", "-netdev", "user,id=user.0,restrict=on",
    "-virtfs", "local,path=/nix/store,security_model=none,mount_tag=nix-store",
    "-drive", "cache=writeback,file=/s/root.qcow2,id=drive1,if=none,index=1,werror=report",
    "-device", "virtio-blk-pci,bootindex=1,drive=drive1,serial=root",
    "-drive", "file=/nix/store/abc.erofs,format=raw,id=drive2,if=none,index=2,readonly=on",
    "-drive", "cache=writeback,file=/s/store.img,format=raw,id=drive3,if=none,index=3",
    "-drive", "if=pflash,format=raw,unit=0,readonly=on,file=/nix/store/ovmf/OVMF_CODE.fd",
    "-drive", "if=pflash,format=raw,unit=1,file=/s/efi-vars.fd",
    "-append", "-drive root=/dev/vda", "-nographic", "-usb", "-m", "1024",
)  # fmt: skip


def found(*arguments: str) -> list[tuple[str, str | None, bool]]:
    return [(d.path, d.format, d.readonly) for d in drives(("qemu", *arguments))]


def moved(*arguments: str, to: str = "/t/disk") -> tuple[str, ...]:
    """The command line with `to` in the place of its only drive."""
    argv = ("qemu", *arguments)
    (drive,) = drives(argv)
    return with_file(argv, drive, to, "qcow2")[1:]


def test_the_drives_of_a_machine_of_nixos() -> None:
    assert found(*NIXOS[1:]) == [
        ("/s/root.qcow2", None, False),
        ("/nix/store/abc.erofs", "raw", True),
        ("/s/store.img", "raw", False),
        ("/nix/store/ovmf/OVMF_CODE.fd", "raw", True),
        ("/s/efi-vars.fd", "raw", False),
    ]
    assert all(NIXOS[drive.at - 1] == "-drive" for drive in drives(NIXOS))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--drive", "file=/a,,b.img"), ("/a,b.img", None, False)),
        (("-drive", "file=/a,driver=qcow2,readonly"), ("/a", "qcow2", True)),
        (("-drive", "file=/a,readonly=on,noreadonly"), ("/a", None, False)),
        (("-drive", "file=/a,file=/b"), ("/b", None, False)),
        (("-drive", "file.filename=/a,read-only=on"), ("/a", None, True)),
        (("-drive", "file=/a,media=cdrom"), ("/a", None, True)),
        (("-drive", "file=file:/a"), ("/a", None, False)),
        (("-drive", "file=/a,readonly=on,snapshot=on"), ("/a", None, False)),
        (("-snapshot", "-cdrom", "/a"), ("/a", None, False)),
        (("-hdb", "/a,b"), ("/a,b", None, False)),
        (("-cdrom", "/a.iso"), ("/a.iso", None, True)),
        (("-pflash", "/a.fd"), ("/a.fd", None, False)),
        (("-nographic", "/a"), ("/a", None, False)),
        (("-drive", "file=nbd://h/x,if=virtio"), ("nbd://h/x", None, False)),
        (("-drive", 'file=json:{"driver":"nbd"}'), ('json:{"driver":"nbd"}', None, False)),
        (("-drive", "file.driver=nbd,file.host=h,file.port=1"), ("nbd:h", None, False)),
        (("-blockdev", "qcow2,node-name=a,file.driver=file,file.filename=/a"),
         ("/a", "qcow2", False)),
        (("-blockdev", "driver=file,filename=/a,node-name=a,read-only=on"), ("/a", "raw", True)),
        (("-blockdev", '{"driver":"raw","read-only":true,"file":{"driver":"file",'
          '"filename":"/a,b"},"node-name":"a"}'), ("/a,b", "raw", True)),
        (("-blockdev", "driver=file,filename=/a,node-name=f",
          "-blockdev", "driver=qcow2,file=f,node-name=q,read-only=on"), ("/a", "qcow2", True)),
        (("-blockdev", "driver=file,node-name=f,filename=a:b"), ("./a:b", "raw", False)),
    ],
)  # fmt: skip
def test_each_spelling(arguments: tuple[str, ...], expected: tuple[str, str | None, bool]) -> None:
    assert found(*arguments) == [expected]


def test_what_has_no_file_is_none() -> None:
    assert found("-drive", "if=ide,index=2,media=cdrom,file=", "-drive", "media=cdrom") == []
    assert found("-blockdev", "driver=null-co,node-name=n", "-append", "-hda /x") == []


def test_a_temporary_overlay_is_told() -> None:
    assert [d.snapshot for d in drives(("q", "-drive", "file=/a,snapshot=on", "-hda", "/b"))] == [
        True,
        False,
    ]
    every = drives(("q", "-drive", "file=/a,snapshot=off", "-hda", "/b", "-snapshot"))
    assert [d.snapshot for d in every] == [False, True]


def test_urls_are_told_from_paths() -> None:
    for url in ("nbd://h/x", "fd:3", "json:{}", "fat:rw:/dir"):
        assert Drive(2, url, None, False).is_url
    for path in ("/a:b", "./a:b", "a/b:c"):
        assert not Drive(2, path, None, False).is_url


# --- another file ---


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("-drive", "file=/a,format=raw,if=none,id=x"),
         ("-drive", "file=/t/disk,if=none,id=x,format=qcow2")),
        (("--drive", "id=x,driver=raw,file.filename=/a,file.locking=off"),
         ("--drive", "id=x,file.filename=/t/disk,file.locking=off,format=qcow2")),
        (("-drive", "file.driver=nbd,file.host=h,file.port=1,id=x"),
         ("-drive", "file=/t/disk,id=x,format=qcow2")),
        (("-hdb", "/a", "-S"),
         ("-drive", "index=1,media=disk,file=/t/disk,format=qcow2", "-S")),
        (("-S", "/a", "-usb"),
         ("-S", "-drive", "index=0,media=disk,file=/t/disk,format=qcow2", "-usb")),
        (("-blockdev", "qcow2,node-name=a,file.driver=file,file.filename=/a,file.aio=native"),
         ("-blockdev",
          "driver=qcow2,node-name=a,file.driver=file,file.filename=/t/disk,file.aio=native")),
        (("-blockdev", "driver=file,filename=/a,node-name=f",
          "-blockdev", "driver=raw,file=f,node-name=q"),
         ("-blockdev", "driver=file,filename=/t/disk,node-name=f",
          "-blockdev", "driver=qcow2,file=f,node-name=q")),
    ],
)  # fmt: skip
def test_the_line_with_another_file(before: tuple[str, ...], after: tuple[str, ...]) -> None:
    assert moved(*before) == after


def test_a_bare_node_gets_its_format_around_it() -> None:
    bare = '{"driver": "file", "filename": "/a", "node-name": "n"}'
    _, text = moved("-blockdev", bare, to="/t,x")
    assert json.loads(text) == {
        "driver": "qcow2",
        "node-name": "n",
        "file": {"driver": "file", "filename": "/t,x"},
    }


def test_commas_are_escaped() -> None:
    argv = moved("-drive", "file=/a,,b,id=x", to="/t,/disk")
    assert argv == ("-drive", "file=/t,,/disk,id=x,format=qcow2")
    assert found(*argv) == [("/t,/disk", "qcow2", False)]


def test_a_drive_of_another_line_is_refused() -> None:
    with pytest.raises(ValueError, match="no drive with the file /x"):
        with_file(NIXOS, Drive(4, "/x", None, False), "/t", "qcow2")


@pytest.mark.parametrize(
    "text", ["a=b", "user,id=u,hostfwd=tcp::1-:2,hostfwd=tcp::3-:4", "f=/a,,,b=c", "x,a=1==2", ""]
)
def test_a_value_taken_apart_and_put_together(text: str) -> None:
    assert unkeyval(keyval(text)) == text


def test_what_a_value_sets() -> None:
    assert settings("virtio-blk-pci,drive=a,drive=b", "driver") == {
        "driver": "virtio-blk-pci",
        "drive": "b",
    }
    assert settings('{"driver":"x","romfile":"","a":{"b":true}}') == {
        "driver": "x",
        "romfile": "",
        "a.b": "on",
    }


# --- what QEMU makes of it ---


def opened(*arguments: str) -> list[tuple[str, str, bool]]:
    """What QEMU has opened: file, format, read-only; empty drives are left out."""
    commands = ({"execute": each} for each in ("qmp_capabilities", "query-block", "quit"))
    ended = subprocess.run(
        [str(QEMU), "-nodefaults", "-display", "none", "-S", "-qmp", "stdio", *arguments],
        input="\n".join(map(json.dumps, commands)),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert ended.returncode == 0, ended.stderr
    answers = [json.loads(line) for line in ended.stdout.splitlines()]
    rows = next(a["return"] for a in answers if isinstance(a.get("return"), list))
    inserted = [row["inserted"] for row in rows if "inserted" in row]
    return [(each["file"], each["drv"], each["ro"]) for each in inserted]


@needs_qemu
@pytest.mark.parametrize(
    "spelling",
    [
        ("-drive", "file={},if=virtio,format=raw"),
        ("--drive", "file.filename={},if=virtio,driver=raw,file.locking=off"),
        ("-drive", "file=file:{},if=none,id=x,format=raw,readonly=on"),
        ("-drive", "file={},if=ide,media=cdrom,format=raw"),
        ("-blockdev", "raw,node-name=n,file.driver=file,file.filename={}",
         "-device", "virtio-blk-pci,drive=n"),
        ("-blockdev", "driver=file,node-name=n,filename={}", "-device", "virtio-blk-pci,drive=n"),
        ("-blockdev", "driver=file,node-name=f,filename={}",
         "-blockdev", "driver=raw,node-name=n,file=f", "-device", "virtio-blk-pci,drive=n"),
    ],
)  # fmt: skip
def test_qemu_opens_what_was_found_and_what_it_was_changed_to(
    tmp_path: Path, spelling: tuple[str, ...]
) -> None:
    first, second = tmp_path / "a,1.img", tmp_path / "b,2.qcow2"
    first.write_bytes(bytes(1 << 20))
    subprocess.run(["qemu-img", "create", "-qf", "qcow2", second, "1M"], check=True)
    argv = tuple(each.replace("{}", str(first).replace(",", ",,")) for each in spelling)
    ((path, format_, readonly),) = found(*argv)
    # QEMU has no format where a node is a bare file.
    assert opened(*argv) in ([(path, format_, readonly)], [(path, "file", readonly)])
    assert path == str(first)
    changed = moved(*argv, to=str(second))
    assert opened(*changed) == [(str(second), "qcow2", readonly)]


@needs_qemu
def test_qemu_opens_a_short_spelling_as_its_long_one(tmp_path: Path) -> None:
    image = tmp_path / "b.qcow2"
    subprocess.run(["qemu-img", "create", "-qf", "qcow2", image, "1M"], check=True)
    for short in (("-hda", "/a"), ("-hdc", "/a"), ("-cdrom", "/a"), ("-S", "/a")):
        argv = moved(*short, to=str(image))
        assert opened(*argv) == [(str(image), "qcow2", short[0] == "-cdrom")]
