"""A template's command line becomes a clone's."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from _qemu import QEMU, Asked, needs_qemu

from pytest_nixvm.qemu.replay import clone_argv, memory_of, ram_arguments

RAM = ram_arguments(1024, Path("/tpl/ram"))
NIXOS = (
    "/nix/store/abc-qemu/bin/qemu-system-x86_64", "-machine", "accel=kvm:tcg", "-cpu", "max",
    "-m", "4096", "-netdev", "user,id=user.0,hostfwd=tcp::2222-:22,restrict=on",
    "-virtfs", "local,path=/s/shared,security_model=none,mount_tag=shared",
    "-virtfs", "local,path=/s/xchg,security_model=none,mount_tag=xchg",
    "-drive", "cache=writeback,file=/s/root.qcow2,id=drive1,if=none,index=1,werror=report",
    "-drive", "file=/nix/store/abc.erofs,format=raw,id=drive2,if=none,index=2,readonly=on",
    "-drive", "if=pflash,format=raw,unit=1,file=/s/efi-vars.fd",
    "-append", "init=/s/init console=ttyS0", "-pidfile", "/s/pid", "-m", "1024",
    "-chardev", "socket,id=c,path=/run/x/console,server=on,wait=off,logfile=/log/console.log",
    "-qmp", "unix:/run/x/qmp,server=on,wait=off", *RAM,
)  # fmt: skip


def clone(
    *arguments: str,
    moved: Mapping[str, str] | None = None,
    disks: Mapping[str, tuple[str, str]] | None = None,
    version: tuple[int, int, int] = (7, 2, 0),
    ram: str = "/tpl/ram",
    share: bool = False,
) -> tuple[str, ...]:
    """What has become of `arguments`: without the memory's, and without the end."""
    argv = clone_argv(
        ("qemu", *arguments, *RAM),
        moved=moved or {},
        disks=disks or {},
        ram=Path(ram),
        qemu_version=version,
        share=share,
    )
    assert argv[-2:] == ("-incoming", "defer")
    return argv[1:-6]


# --- memory ---


@pytest.mark.parametrize(
    ("arguments", "memory"),
    [
        ((), 128),
        (("-m", "4096", "-m", "1024"), 1024),
        (("--m", "4G"), 4096),
        (("-m", "512M"), 512),
        (("-m", "1.5g"), 1536),
        (("-m", "size=2G,slots=2,maxmem=8G"), 2048),
        (("-m", "2048,maxmem=8G", "-m", "slots=4"), 2048),
        (("-m", "1048577K"), 1025),
        (("-append", "-m 7"), 128),
    ],
)
def test_memory(arguments: tuple[str, ...], memory: int) -> None:
    assert memory_of(("qemu", *arguments)) == memory


def test_a_size_that_is_none() -> None:
    with pytest.raises(ValueError, match="-m much"):
        memory_of(("qemu", "-m", "much"))


def test_memory_in_a_file() -> None:
    assert ram_arguments(512, Path("/a,b/ram")) == (
        "-object",
        "memory-backend-file,id=nixvm-ram,size=512M,mem-path=/a,,b/ram,share=on",
        "-machine",
        "memory-backend=nixvm-ram",
    )


# --- the whole ---


def test_a_machine_of_nixos() -> None:
    argv = clone_argv(
        NIXOS,
        moved={"/s": "/c", "/run/x": "/run/y", "/log/console.log": "/c/console.log"},
        disks={
            "/s/root.qcow2": ("/c/root.qcow2", "qcow2"),
            "/s/efi-vars.fd": ("/c/efi.qcow2", "qcow2"),
        },
        ram=Path("/tpl/ram"),
        qemu_version=(10, 0, 2),
    )
    assert argv == (
        "/nix/store/abc-qemu/bin/qemu-system-x86_64", "-machine", "accel=kvm:tcg", "-cpu", "max",
        "-m", "4096", "-netdev", "user,id=user.0,hostfwd=tcp:127.0.0.1:0-:22,restrict=on",
        "-virtfs", "local,path=/c/shared,security_model=none,mount_tag=shared",
        "-virtfs", "local,path=/c/xchg,security_model=none,mount_tag=xchg",
        "-drive", "cache=writeback,file=/c/root.qcow2,id=drive1,if=none,index=1,werror=report,"
        "format=qcow2",
        "-drive", "file=/nix/store/abc.erofs,format=raw,id=drive2,if=none,index=2,readonly=on",
        "-drive", "if=pflash,unit=1,file=/c/efi.qcow2,format=qcow2",
        "-append", "init=/s/init console=ttyS0", "-pidfile", "/c/pid", "-m", "1024",
        "-chardev", "socket,id=c,path=/run/y/console,server=on,wait=off,logfile=/c/console.log",
        "-qmp", "unix:/run/y/qmp,server=on,wait=off",
        "-object", "memory-backend-file,id=nixvm-ram,size=1024M,mem-path=/tpl/ram,share=off,"
        "readonly=on,rom=off",
        "-machine", "memory-backend=nixvm-ram", "-incoming", "defer",
    )  # fmt: skip


def test_a_clone_that_is_to_be_frozen_again() -> None:
    first = clone_argv(
        NIXOS, moved={"/s": "/c"}, disks={}, ram=Path("/t/a"), qemu_version=(9, 0, 0)
    )
    second = clone_argv(
        first, moved={"/c": "/d"}, disks={}, ram=Path("/t/b,c"), qemu_version=(9, 0, 0), share=True
    )
    assert second.count("-incoming") == 1
    assert second[-2:] == ("-incoming", "defer")
    (ram,) = (each for each in second if each.startswith("memory-backend-file"))
    assert ram == "memory-backend-file,id=nixvm-ram,size=1024M,mem-path=/t/b,,c,share=on"


def test_a_state_that_has_the_memory_in_it() -> None:
    argv = clone_argv(("q", *RAM), moved={}, disks={}, ram=None, qemu_version=(9, 0, 0))
    assert argv[2:4] == ("memory-backend-ram,id=nixvm-ram,size=1024M", "-machine")
    argv = clone_argv(("q",), moved={}, disks={}, ram=None, qemu_version=(9, 0, 0))
    assert argv == ("q", "-incoming", "defer")


def test_the_memorys_file_is_writable_before_8_2_only() -> None:
    for version, more in (((8, 1, 5), ""), ((8, 2, 0), ",readonly=on,rom=off")):
        argv = clone_argv(("q", *RAM), moved={}, disks={}, ram=Path("/r"), qemu_version=version)
        assert argv[2] == f"memory-backend-file,id=nixvm-ram,size=1024M,mem-path=/r,share=off{more}"


# --- paths ---


@pytest.mark.parametrize(
    ("option", "before", "after"),
    [
        ("-virtfs", "local,path=/a/b,mount_tag=x", "local,path=/new,mount_tag=x"),
        ("-virtfs", "local,path=/a/bc", "local,path=/a/bc"),
        ("-virtfs", "local,path=/a/b,,c", "local,path=/a/b,,c"),
        ("-virtfs", "local,path=/x/a/b", "local,path=/x/a/b"),
        ("-virtfs", "local,path=/x,,/a/b", "local,path=/x,,/a/b"),
        ("-virtfs", "local,path=/a/b/c/d", "local,path=/longer/d"),
        ("-virtfs", "local,path=/p,,q/x", "local,path=/r,,s/x"),
        ("-qmp", "unix:/a/b/qmp,server=on", "unix:/new/qmp,server=on"),
        ("--chardev", "file,id=f,path=/a/b/log", "file,id=f,path=/new/log"),
        ("-serial", "file:/p,q/log", "file:/r,s/log"),
        ("-kernel", "/p,q/kernel", "/r,s/kernel"),
        ("-kernel", "/a/b,c/kernel", "/a/b,c/kernel"),
        ("-object", "rng-random,filename=/a/b/x,id=r", "rng-random,filename=/new/x,id=r"),
        ("-fw_cfg", "name=opt/x,file=/a/b/x", "name=opt/x,file=/new/x"),
        ("-object", '{"qom-type":"x","path":"/p,q/x","n":1}',
         '{"qom-type": "x", "path": "/r,s/x", "n": 1}'),
        ("-drive", "file=/a/b/x,readonly=on,if=none", "file=/new/x,readonly=on,if=none"),
        ("-virtfs", "local,path=/new", "local,path=/newer"),
        ("-append", "init=/a/b/init", "init=/a/b/init"),
    ],
)  # fmt: skip
def test_places_that_are_others(option: str, before: str, after: str) -> None:
    moved = {"/a/b": "/new", "/a/b/c": "/longer/", "/p,q": "/r,s", "/new": "/newer"}
    assert clone(option, before, moved=moved) == (option, after)


def test_nothing_moves_where_nothing_is_given() -> None:
    arguments = ("-name", "x", "-S", "-kernel", "/k", "-qmp", "unix:/a,server=on")
    assert clone(*arguments) == arguments


# --- ports ---


@pytest.mark.parametrize(
    ("option", "before", "after"),
    [
        ("-netdev", "user,id=u,hostfwd=tcp::2222-:22,hostfwd=udp:0.0.0.0:53-10.0.2.15:53",
         "user,id=u,hostfwd=tcp:127.0.0.1:0-:22,hostfwd=udp:127.0.0.1:0-10.0.2.15:53"),
        ("-net", "user,hostfwd=::80-:8080", "user,hostfwd=tcp:127.0.0.1:0-:8080"),
        ("-nic", "user,model=virtio,hostfwd=tcp:127.0.0.1:1-:2",
         "user,model=virtio,hostfwd=tcp:127.0.0.1:0-:2"),
        ("-netdev", "user,id=u,guestfwd=tcp:10.0.2.100:80-tcp:127.0.0.1:8080",
         "user,id=u,guestfwd=tcp:10.0.2.100:80-tcp:127.0.0.1:8080"),
        ("-netdev", '{"type":"user","id":"u","hostfwd":[{"str":"tcp::22-:22"}]}',
         '{"type": "user", "id": "u", "hostfwd": [{"str": "tcp:127.0.0.1:0-:22"}]}'),
        ("-chardev", "socket,id=c,host=localhost,port=4444,server=on,wait=off",
         "socket,id=c,host=localhost,port=0,server=on,wait=off"),
        ("-chardev", "socket,id=c,host=h,port=4444", "socket,id=c,host=h,port=4444"),
        ("-serial", "tcp:127.0.0.1:4444,server,nowait", "tcp:127.0.0.1:0,server,nowait"),
        ("-monitor", "telnet::4444,server=on", "telnet::0,server=on"),
        ("-serial", "tcp:h:4444", "tcp:h:4444"),
        ("-serial", "tcp:h:4444,server=off", "tcp:h:4444,server=off"),
    ],
)  # fmt: skip
def test_ports_are_picked_anew(option: str, before: str, after: str) -> None:
    assert clone(option, before) == (option, after)


def test_a_network_card_of_the_old_kind_stays() -> None:
    arguments = ("-net", "nic", "-net", "user,hostfwd=tcp::2222-:22")
    assert clone(*arguments) == ("-net", "nic", "-net", "user,hostfwd=tcp:127.0.0.1:0-:22")


# --- disks ---


def test_disks_of_every_kind() -> None:
    arguments = ("/s/a", "-hdb", "/s/b", "-drive", "file=/s/c,,1,if=virtio", "-S")
    disks = {path: (f"/c/{name}", "qcow2") for path, name in
             (("/s/a", "1"), ("/s/b", "2"), ("/s/c,1", "3"))}  # fmt: skip
    assert clone(*arguments, disks=disks, moved={"/s": "/wrong", "/c": "/wrong"}) == (
        "-drive", "index=0,media=disk,file=/c/1,format=qcow2",
        "-drive", "index=1,media=disk,file=/c/2,format=qcow2",
        "-drive", "file=/c/3,if=virtio,format=qcow2", "-S",
    )  # fmt: skip


def test_what_can_not_become_a_clone() -> None:
    for arguments, message in (
        (("-incoming", "tcp:0:1"), "-incoming tcp:0:1: the machine loads a state already"),
        (("-loadvm", "x"), "-loadvm: the machine loads a state already"),
        (("-hda", "/s/disk"), "the drive /s/disk is written to and has no file of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            clone(*arguments)
    with pytest.raises(ValueError, match="no drive has the file /s/x"):
        clone("-hda", "/s/a", disks={"/s/x": ("/c", "qcow2"), "/s/a": ("/d", "qcow2")})
    with pytest.raises(ValueError, match="no -object has id=nixvm-ram"):
        clone_argv(("q",), moved={}, disks={}, ram=Path("/r"), qemu_version=(7, 2, 0))


# --- QEMU's opinion ---


def version() -> tuple[int, int, int]:
    said = subprocess.run([str(QEMU), "--version"], capture_output=True, text=True, check=True)
    match = re.search(r"version (\d+)\.(\d+)\.(\d+)", said.stdout)
    assert match is not None
    return (int(match[1]), int(match[2]), int(match[3]))


@needs_qemu
@pytest.mark.parametrize("in_file", [True, False], ids=["memory in a file", "in the state"])
def test_qemu_loads_a_frozen_state_into_two_clones_at_once(tmp_path: Path, in_file: bool) -> None:
    image, ram, state = (tmp_path / name for name in ("disk.img", "ram", "state"))
    image.write_bytes(bytes(1 << 20))
    argv = (
        str(QEMU), "-nodefaults", "-display", "none", "-S", "-m", "32", "-hda", str(image),
        "-netdev", "user,id=u,hostfwd=tcp::0-:22,hostfwd=udp::0-:53", "-device", "e1000,netdev=u",
        "-qmp", "stdio", "-serial", "tcp:127.0.0.1:0,server=on,wait=off",
        "-chardev", f"file,id=f,path={tmp_path}/log", *ram_arguments(32, ram),
    )  # fmt: skip
    capability = ("x-ignore-shared",) if in_file else ()
    running: list[Asked] = []
    try:
        running.append(Asked(argv, tmp_path / "err"))
        running[0].migrate("migrate", f"exec:cat >{state}", *capability)
        running[0].process.kill()
        running[0].process.wait()
        before = (ram.read_bytes(), state.read_bytes())
        ram.chmod(0o444)
        for name in ("one", "t,wo"):
            place = tmp_path / name
            place.mkdir()
            disk = place / "disk.qcow2"
            subprocess.run(["qemu-img", "create", "-qf", "qcow2", "-F", "raw", "-b", image, disk],
                           check=True)  # fmt: skip
            clone = clone_argv(
                argv,
                moved={str(tmp_path): str(place)},
                disks={str(image): (str(disk), "qcow2")},
                ram=ram if in_file else None,
                qemu_version=version(),
            )
            running.append(Asked(clone, place / "err"))
            running[-1].migrate("migrate-incoming", f"exec:cat {state}", *capability)
            running[-1].execute("cont")
            assert (place / "log").exists()
        assert (ram.read_bytes(), state.read_bytes()) == before
    finally:
        for each in running:
            each.process.kill()
            each.process.communicate()
