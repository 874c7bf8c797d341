"""pytest's side, on real nix and tiny flakes: selection, mistakes, and runs without VMs."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from _flake import FLAKE, OPTIONS, machine, needs_nix, write_flake

pytestmark = needs_nix

TESTS = """
import pytest

def test_any(vm): pass

@pytest.mark.nixvm("web")
@pytest.mark.smoke
def test_web(vm): pass

@pytest.mark.nixvm("web", "db")
def test_both(machines): pass

def test_plain(): pass
"""


class Project:
    """A directory with a flake of four machines and tests, and pytest run there."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.directory = pytester.path
        body = machine("web", "web-host") + machine("db", "db-host")
        body += 'nixosConfigurations.pi = nixosSystem { modules = [ ]; system = "aarch64-linux"; };'
        body += "darwinConfigurations.mac = { };"
        self.flake = write_flake(self.directory / "flake", body)
        (self.directory / "pytest.ini").write_text(
            "[pytest]\naddopts = --strict-markers\nmarkers = smoke: first\n"
        )
        self.write(TESTS)

    def write(self, text: str, name: str = "test_it.py") -> None:
        (self.directory / name).write_text(text)

    def run(
        self, *words: str, flake: str | None = "flake", apart: bool = False
    ) -> pytest.RunResult:
        """Run pytest; `apart` is a process of its own, which xdist and clean imports need."""
        command = ["-p", "no:cacheprovider", "--nixvm-cache=cache", "--nixvm-accel=tcg"]
        if flake is not None:
            command.append(f"--nixvm-flake={flake}")
        for name, value in OPTIONS:
            command += ["--nixvm-nix-option", name, value]
        if apart:
            return self.pytester.runpytest_subprocess(*command, *words, timeout=60)
        return self.pytester.runpytest_inprocess(*command, *words)

    def collected(self, *words: str) -> list[str]:
        done = self.run("--collect-only", "-q", *words)
        assert done.ret in (0, 5), done.outlines + done.errlines
        return [line.partition("::")[2] for line in done.outlines if "::" in line]

    def mistake(self, *words: str, **options: object) -> str:
        """Run, expect a usage error of one message, and return that."""
        done = self.run(*words, **options)  # type: ignore[arg-type]
        output = str(done.stdout) + str(done.stderr)
        assert done.ret == pytest.ExitCode.USAGE_ERROR, output
        assert "Traceback" not in output
        assert "passed" not in output
        assert not list(self.directory.glob("**/flake.lock"))
        return output[output.index("ERROR: ") :]


@pytest.fixture
def project(pytester: pytest.Pytester) -> Project:
    return Project(pytester)


# --- which test runs on which machine -----------------------------------------------------------


def test_unmarked_tests_run_for_each_machine_marked_ones_for_theirs(project):
    assert set(project.collected()) == {
        "test_any[web]",
        "test_any[db]",
        "test_any[pi]",
        "test_any[mac]",
        "test_web[web]",
        "test_both",
        "test_plain",
    }


def test_a_machine_glob_leaves_out_the_tests_of_others(project):
    assert sorted(project.collected("--nixvm-machine=d*")) == ["test_any[db]", "test_plain"]
    assert "test_both" in project.collected("--nixvm-machine=d*", "--nixvm-machine=web")


def test_an_attribute_is_the_only_machine(project):
    collected = project.run("--collect-only", "-q", "-k", "any", flake="flake#web").stdout.str()
    assert "test_any[web]" in collected
    assert "db" not in collected


def test_markers_and_keywords_select_as_ever(project):
    assert project.collected("-m", "smoke") == ["test_web[web]"]
    assert project.collected("-k", "db") == ["test_any[db]"]
    assert project.collected("-m", "nixvm and not smoke") == ["test_both"]


def test_machines_that_can_t_run_here_are_skipped_with_their_reason(project):
    done = project.run("-rs", "-k", "pi or mac")

    assert done.ret == 0
    assert "pi: it is for aarch64-linux, this machine is x86_64-linux" in done.stdout.str()
    assert "mac: it is a Darwin (macOS) host" in done.stdout.str()
    assert "2 skipped" in done.stdout.str()
    assert "Building" not in done.stdout.str()


def test_a_closer_marker_wins(project):
    project.write(
        "import pytest\npytestmark = pytest.mark.nixvm('web')\n"
        "@pytest.mark.nixvm('db')\ndef test_it(vm): pass\n"
        "@pytest.mark.nixvm(memory=512)\ndef test_other(vm): pass\n"
    )
    assert sorted(project.collected()) == ["test_it[db]", "test_other[web]"]


# --- a run that needs no VM -----------------------------------------------------------------------


def test_without_a_flake_other_tests_run(project):
    done = project.run("-k", "plain", flake=None)
    # test_any asks for a machine, and is collected before -k is applied
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    project.write("def test_plain(): pass\n")
    assert project.run(flake=None).ret == 0


def test_nothing_of_the_flake_is_evaluated_for_tests_that_need_none(project):
    project.write("def test_plain(): pass\n")
    done = project.run(flake="nowhere")

    assert done.ret == 0
    assert not (project.directory / "cache" / "evaluations").exists()


def test_without_the_plugin_pytest_is_itself(project):
    project.write("def test_plain(): pass\n")
    done = project.pytester.runpytest_subprocess("-p", "no:nixvm", "test_it.py")
    assert done.ret == 0
    assert "nixvm" not in done.stdout.str()


def test_the_plugin_loads_without_ssh_and_qmp(project):
    """A run that boots nothing does not pay for what only VMs need."""
    project.write(
        "import sys\ndef test_plain():\n"
        "    assert not {'paramiko', 'qemu.qmp', 'pexpect', 'rich'} & set(sys.modules)\n"
    )
    assert project.run(flake=None, apart=True).ret == 0


# --- mistakes: one message, exit status 4, nothing built -----------------------------------------


def test_no_flake(project):
    assert "No flake to test: give --nixvm-flake=REF" in project.mistake(flake=None)


def test_a_flake_that_is_not_there(project):
    assert "nowhere" in project.mistake(flake="./nowhere")


def test_a_directory_that_is_no_flake(project):
    (project.directory / "empty").mkdir()
    assert "flake.nix" in project.mistake(flake="empty")


def test_an_attribute_that_is_not_there_with_its_near_match(project):
    message = project.mistake(flake="flake#wep")
    assert "Did you mean web?" in message


def test_a_glob_that_matches_nothing(project):
    message = project.mistake("--nixvm-machine=mail*")
    assert "--nixvm-machine 'mail*' matches no machine" in message
    assert "web, db" in message or "db" in message


def test_a_marker_with_an_unknown_machine(project):
    project.write(
        "import pytest\n@pytest.mark.nixvm('wep', 'db')\n"
        "@pytest.mark.parametrize('n', [1, 2])\ndef test_it(vm, n): pass\n"
    )
    message = project.mistake()
    assert "test_it.py::test_it: the nixvm marker names 'wep'" in message
    assert "Did you mean 'web'?" in message
    assert message.count("wep") == 1


def test_a_marker_with_a_wrong_argument(project):
    project.write("import pytest\n@pytest.mark.nixvm(memory='4G')\ndef test_it(vm): pass\n")
    assert "test_it.py::test_it" in project.mistake("-k", "web")


def test_an_option_s_wrong_value(project):
    assert "--nixvm-accel: 'xen' is not one of auto, kvm, tcg" in project.mistake(
        "--nixvm-accel=xen"
    )
    assert "--nixvm-isolation: 'tests' is not one of test, " in project.mistake(
        "--nixvm-isolation=tests"
    )


def test_a_build_that_fails_ends_the_run_before_the_first_test(project):
    body = machine("web", "web-host") + machine(
        "db", "db-host", '{ test.build = "echo out of flour; exit 3"; }'
    )
    (project.flake / "flake.nix").write_text(FLAKE.format(body=body))
    message = project.mistake("-k", "any or plain")
    assert "out of flour" in message


def test_an_evaluation_error_is_nix_s_own_word(project):
    body = machine("web", "web-host", '{ test.build = throw "no such thing as a free lunch"; }')
    (project.flake / "flake.nix").write_text(FLAKE.format(body=body))
    message = project.mistake("-k", "any")
    assert "no such thing as a free lunch" in message


def test_no_nix(project, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "nix" in project.mistake()


def test_no_qemu(project, tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    for program in ("nix", "nix-store", "git", "sh"):
        if found := shutil.which(program):
            (programs / program).symlink_to(found)
    monkeypatch.setenv("PATH", str(programs))
    message = project.mistake("-k", "any")
    assert "qemu-system-x86_64 is not on PATH" in message
    assert "Install QEMU" in message


def test_an_unwritable_cache(project):
    (project.directory / "cache").write_text("not a directory")
    message = project.mistake()
    assert "cache" in message
    assert "--nixvm-cache" in message


def test_a_socket_path_that_would_be_too_long(project, monkeypatch):
    deep = project.directory / ("d" * 100)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    message = project.mistake()
    assert "107" in message
    assert "TMPDIR" in message


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk(project):
    cache = project.directory / "cache"
    cache.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", cache], check=True)
    try:
        message = project.mistake("-k", "any")
    finally:
        subprocess.run(["umount", "-l", cache], check=True)
    assert "full" in message
    assert "--nixvm-cache" in message


# --- xdist ---------------------------------------------------------------------------------------


def test_the_controller_finds_mistakes_for_its_workers(project):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    assert "nowhere" in project.mistake("-n", "2", flake="./nowhere", apart=True)
    assert "matches no machine" in project.mistake("-n", "2", "--nixvm-machine=mail*", apart=True)


def test_a_build_that_fails_with_workers(project):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    body = machine("web", "web-host", '{ test.build = "echo out of flour; exit 3"; }')
    (project.flake / "flake.nix").write_text(FLAKE.format(body=body))
    project.write("def test_any(vm): pass\n")
    assert "out of flour" in project.mistake("-n", "2", apart=True)


def test_a_marker_s_mistake_with_workers(project):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    project.write("import pytest\n@pytest.mark.nixvm('wep')\ndef test_it(vm): pass\n")
    assert "Did you mean 'web'?" in project.mistake("-n", "2", apart=True)


# --- boot loader, generations: what a test asks of its machine -----------------------------------


def test_a_marker_s_boot_loader_must_be_a_truth(project):
    project.write("import pytest\n@pytest.mark.nixvm(boot_loader='grub')\ndef test_it(vm): pass\n")
    message = project.mistake("-k", "web")
    assert "test_it.py::test_it[web]: the nixvm marker's boot_loader must be True" in message


def test_what_a_test_asks_of_its_machine(project):
    project.write(
        "import pytest\n"
        "from pytest_nixvm.run import RUN\n"
        "@pytest.fixture\n"
        "def asked(request): return request.config.stash[RUN].request(request.node)\n"
        "def test_plain(asked): assert asked.boot_loader is False\n"
        "@pytest.mark.nixvm(boot_loader=True, memory=512)\n"
        "def test_marked(asked): assert (asked.boot_loader, asked.memory) == (True, 512)\n"
        "@pytest.mark.nixvm(boot_loader=True)\n"
        "class TestAll:\n"
        "    @pytest.mark.nixvm(boot_loader=False)\n"
        "    def test_closer(self, asked): assert asked.boot_loader is False\n"
    )
    assert project.run().parseoutcomes() == {"passed": 3}


def test_every_option_is_explained(project):
    done = project.pytester.runpytest_inprocess("--help")
    text = " ".join(done.stdout.str().split())
    for option in ("from=REF", "changed=REF", "check ", "check-off=", "fidelity", "boot-loader"):
        assert f"--nixvm-{option}" in text
    assert "nixvm_check_off (linelist)" in text
    assert done.ret == 0


def test_the_header_names_the_deployed_generation(project):
    project.write("def test_plain(): pass\n")
    done = project.run("--nixvm-from=HEAD~1")
    assert "nixvm: deployed generation HEAD~1" in done.stdout.str()
    assert done.ret == 0
