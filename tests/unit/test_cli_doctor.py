"""`nixvm doctor`: what it sees of a computer, and that each finding says how to mend it."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from _documented import documented
from _flake import OPTIONS, machine, needs_nix, write_flake

from pytest_nixvm import doctor, doctor_nix
from pytest_nixvm.cli import main
from pytest_nixvm.qemu.accelerator import Accelerator

ORDINARY = {"substituters": "", "sandbox": "true"}


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Return a function that runs `nixvm doctor --json` in a directory: status, findings."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*words: str) -> tuple[int, dict[str, dict[str, object]]]:
        more = [word for option in OPTIONS for word in ("--nix-option", *option)]
        status = main(["doctor", "--json", "--cache", str(tmp_path / "cache"), *more, *words])
        return status, {each["subject"]: each for each in json.loads(capsys.readouterr().out)}

    return run


@needs_nix
def test_every_trouble_says_what_it_means_and_how_it_is_mended(run):
    _, found = run()
    assert {"system", "QEMU", "KVM", "git", "memory", "cache", "nix", "flake"} <= found.keys()
    for name, finding in found.items():
        assert finding.keys() == documented("`nixvm doctor`")
        assert finding["seen"], name
        if finding["state"] != "ok":
            assert finding["meaning"], name
            assert finding["mend"] or name == "flake", name
    assert found["flake"]["state"] == "ok"
    assert "nixvm init" in found["flake"]["mend"][0]["do"]


@needs_nix
def test_the_flake_is_looked_at(run, tmp_path):
    write_flake(tmp_path / "work", machine("web", "web"))
    _, found = run()
    assert found["flake"]["state"] == "ok"
    assert found["flake"]["seen"].endswith("1 machines, 1 can be tested here")

    (tmp_path / "work" / "flake.nix").write_text("{ outputs = _: { nixosConfigurations = ; }; }")
    status, found = run()
    assert status == 1
    assert found["flake"]["state"] == "fail"
    assert "syntax error" in found["flake"]["seen"]


@needs_nix
def test_a_flake_that_was_named_has_to_be_there(run, tmp_path):
    status, found = run("--flake", str(tmp_path / "nowhere"))
    assert status == 1
    assert "nowhere" in found["flake"]["seen"]
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "flake.nix").write_text("{ outputs = _: { }; }")
    _, found = run("--flake", str(tmp_path / "none"))
    assert "Name what to test: --flake=REF#ATTRIBUTE" in found["flake"]["seen"]


def test_without_nix_and_qemu(tmp_path, capsys, monkeypatch):
    empty = tmp_path / "bin"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.setattr("pytest_nixvm.flake.nix._PROFILES", ())
    monkeypatch.chdir(tmp_path)
    status = main(["doctor", "--cache", str(tmp_path / "cache")])
    out = capsys.readouterr().out

    assert status == 1
    assert "nix was not found" in out
    assert "apt-get install nix-bin" in out
    assert "is not on PATH" in out
    assert "apt-get install qemu-system" in out
    assert "pkgs.openssh" in out
    assert "pkgs.git" in out
    assert "Traceback" not in out


def test_an_old_qemu_and_one_that_does_not_run(tmp_path):
    program = tmp_path / "qemu-system-x86_64"
    for text, state, seen in (
        ("echo QEMU emulator version 6.2.0", "warn", "6.2.0"),
        ("echo error while loading shared libraries >&2; exit 127", "fail", "shared libraries"),
    ):
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        found = doctor.qemu(program, program.name)
        assert (found.state, seen in found.seen) == (state, True), found
        assert found.mend


def test_kvm_is_tried_with_the_qemu_that_tests_have_used(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "KVM_DEVICE", tmp_path / "kvm")
    assert doctor.kvm(None, tmp_path).seen == f"there is no {tmp_path}/kvm"
    (tmp_path / "kvm").touch()
    assert doctor.kvm(None, tmp_path).state == "ok"

    tried = []

    def choose(qemu: Path, *_: object) -> Accelerator:
        tried.append(qemu)
        return Accelerator("tcg", "/dev/kvm can't be opened: Permission denied")

    monkeypatch.setattr(doctor, "choose", choose)
    (tmp_path / "accelerator.json").write_text(json.dumps({"/gone": {}, sys.executable: {}}))
    found = doctor.kvm(None, tmp_path)
    assert tried == [Path(sys.executable)]
    assert found.state == "warn"
    assert any("kvm" in what and where == "NixOS" for where, what in found.mend)


def test_a_full_disk(tmp_path):
    much = 2**60
    assert doctor.disk("cache", tmp_path / "not/yet", much, much, "mend").state == "fail"
    assert doctor.disk("cache", tmp_path, 1, much, "mend").state == "warn"
    assert doctor.disk("cache", tmp_path, 1, 1, "mend").state == "ok"


def test_a_temporary_directory_with_a_long_name(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", "/" + "x" * 100)
    found = doctor.temporary_directory()
    assert found.state == "warn"
    assert "TMPDIR" in found.mend[0][1]


def test_low_limits():
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "from pytest_nixvm.doctor import limits; print(limits().state, limits().seen)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "warn open files: 256 (ulimit -n)\n", done.stderr


def test_leftovers_are_orphans_of_ours_only(tmp_path):
    uid = os.getuid()
    for pid, words, parent, owner in (
        (11, ["/usr/bin/qemu-system-x86_64", "file=/tmp/nixvm-abc/disk"], 1, uid),
        (12, ["/usr/bin/qemu-system-x86_64", "file=/tmp/nixvm-abc/disk"], 16, uid),
        (13, ["/usr/bin/qemu-system-x86_64", "file=/home/me/disk"], 1, uid),
        (14, ["vi", "/tmp/nixvm-abc/log"], 1, uid),
        (15, ["/usr/bin/qemu-system-x86_64", "file=/tmp/nixvm-abc/disk"], 1, uid + 1),
        (16, ["python3", "-I", "-S", "/lib/pytest_nixvm/qemu/_supervise.py", "abc"], 1, uid),
        (17, ["/lib/systemd/systemd", "--user"], 1, uid),
        (18, ["/usr/bin/qemu-system-x86_64", "file=/tmp/nixvm-abc/disk"], 17, uid),
    ):
        entry = tmp_path / str(pid)
        entry.mkdir()
        (entry / "cmdline").write_text("\0".join(words) + "\0")
        (entry / "status").write_text(f"Name:\tx\nPPid:\t{parent}\nUid:\t{owner}\t{owner}\n")
    found = doctor.leftovers(tmp_path)
    assert (found.state, found.mend) == ("warn", (("", "kill 11 18"),))


class _Cache(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/good/nix-cache-info" else 503)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_binary_caches_are_asked():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Cache) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"127.0.0.1:{server.server_port}"
        urls = f"http://{base}/good http://me:secret@{base}/bad http://127.0.0.1:1 file:///x"
        found = doctor_nix.substituters({"substituters": urls}, offline=False)
        server.shutdown()
    assert [each.state for each in found] == ["ok", "warn", "warn", "ok"]
    assert "it answers 503" in found[1].seen
    assert "secret" not in found[1].seen
    assert "Connection refused" in found[2].seen

    assert "file:///x is not asked" in found[3].seen

    [unsaid] = doctor_nix.substituters({}, offline=False)
    assert (unsaid.state, "not asked" in unsaid.seen) == ("ok", True)
    [store] = doctor_nix.substituters({"substituters": "s3://mine?region=eu"}, offline=False)
    assert (store.state, "s3://mine is not asked" in store.seen) == ("ok", True)
    [none] = doctor_nix.substituters({"substituters": ""}, offline=False)
    assert none.state == "warn"
    [offline] = doctor_nix.substituters({"substituters": urls}, offline=True)
    assert offline.state == "ok"


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everything
    found = doctor.cache_directory(Path(tmp_path / "cache"))
    assert found.state == "fail"
    assert "--nixvm-cache" in found.mend[0][1]
    assert "chown" not in found.mend[0][1]  # what is above it is not to be given away
    (tmp_path / "cache").mkdir()
    assert (
        f"chown -R $USER {tmp_path}/cache, or"
        in doctor.cache_directory(tmp_path / "cache").mend[0][1]
    )


@pytest.mark.parametrize(
    ("reason", "flags", "loaded", "mend"),
    [
        ("there is no /dev/kvm", "fpu vmx", False, 'boot.kernelModules = [ "kvm-intel" ];'),
        ("there is no /dev/kvm", "fpu svm", False, "sudo modprobe kvm_amd"),
        ("there is no /dev/kvm", "fpu svm", True, "in a container, pass the device"),
        ("there is no /dev/kvm", "fpu hypervisor", False, "turn on nested virtualisation"),
        ("can't be opened: No such device", "fpu", False, "computer's firmware set-up"),
        ("can't be opened: No such device", "fpu vmx", False, "sudo modprobe kvm_intel"),
        ("can't be opened: Permission denied (…)", "fpu vmx", True, "usermod -aG kvm"),
        ("can't be opened: Device or resource busy", "fpu vmx", True, "use another host"),
    ],
)
def test_kvm_is_mended_by_what_is_wrong_with_it(tmp_path, monkeypatch, reason, flags, loaded, mend):
    (tmp_path / "kvm").touch()
    device = tmp_path / ("none" if "there is no" in reason else "kvm")
    monkeypatch.setattr(doctor, "KVM_DEVICE", device)
    monkeypatch.setattr(doctor, "_read", lambda _: f"processor: 0\nflags : {flags}\n")
    monkeypatch.setattr(doctor, "_SYS_MODULES", tmp_path)
    if loaded:
        (tmp_path / "kvm_amd").mkdir()
    assert any(mend in what for _, what in doctor._mend_kvm(reason))


@needs_nix
def test_a_store_that_can_not_be_had_is_no_missing_feature(tmp_path, monkeypatch):
    monkeypatch.setenv("NIX_STATE_DIR", "/proc/none")  # which nobody can make
    monkeypatch.setenv("NIX_DAEMON_SOCKET_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("NIX_CONFIG", "experimental-features = nix-command flakes")
    nix = SimpleNamespace(program="nix")
    assert doctor_nix.features(nix).state == "ok"
    assert doctor_nix.store(nix).state == "fail"
    monkeypatch.setenv("NIX_CONFIG", "experimental-features = nix-command")
    assert doctor_nix.features(nix).seen == "flakes not on"


def test_a_daemon_that_may_not_be_asked_and_one_that_is_none():
    [(where, what)] = doctor_nix._mend_daemon(PermissionError(13, "Permission denied"))
    assert (where, "usermod -aG nix-users" in what) == ("Debian", True)
    mends = doctor_nix._mend_daemon(FileNotFoundError(2, "No such file or directory"))
    assert "nix-setup-systemd" in mends[0][1]
    assert "enable --now nix-daemon.socket" in mends[-1][1]
    assert all("enable" not in what for where, what in mends if where == "NixOS")  # /etc is fixed
