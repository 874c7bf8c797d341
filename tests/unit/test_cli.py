"""The `nixvm` command: what is kept, and how to be rid of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from _store import COMPONENTS, KEY, MIB, Process, make

from pytest_nixvm import cli
from pytest_nixvm.cli import main
from pytest_nixvm.cli.texts import in_words_of_ours, table
from pytest_nixvm.store import Store

ROOT = Path(cli.__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "templates")


@pytest.fixture
def run(tmp_path, capsys):
    """Return a function that runs `nixvm cache` on the store: status, lines, errors."""

    def run(*arguments: str) -> tuple[int, list[str], str]:
        status = main(["cache", *arguments, "--cache", str(tmp_path)])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    return run


def test_help_says_what_it_is_first(capsys):
    for arguments in (["--help"], []):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        first, empty, *rest = out.splitlines()
        assert first == "nixvm builds, runs and deploys the machines of a NixOS flake."
        assert empty == ""
        assert any("cache" in line for line in rest)


def test_list_shows_what_is_kept(store, run):
    make(store)
    (store.directory / KEY / "ram").chmod(0o600)
    with (store.directory / KEY / "ram").open("r+b") as ram:
        ram.write(b"x" * 3 * MIB)
    other = make(store, {**COMPONENTS, "machine": "[bold]web[/bold] with quite a long name " * 3})

    status, [header, first, second, total], err = run("list")
    assert (status, err) == (0, "")
    assert header.split("  ")[0].strip() == "key"
    assert first.startswith(other[:12])
    assert "[bold]web[/bold] with quite a long name " * 3 in first
    assert second.split()[:4] == [KEY[:12], "dev-vm", "3", "MiB"]
    assert second.split()[-1] == "ready"
    assert total == f"2 templates in {store.directory}, 3 MiB."


def test_list_says_who_is_busy(store, run):
    other = make(store, {**COMPONENTS, "machine": "web"})
    with Process(store.directory) as process:
        process.ask("b = store.begin(KEY, COMPONENTS, 5); say('begun')")
        process.ask(f"e = store.open({other!r}, COMPONENTS | {{'machine': 'web'}}); say('opened')")
        assert states(run("list")[1]) == {other[:12]: "in use", KEY[:12]: "being made"}
    assert states(run("list")[1]) == {other[:12]: "ready", KEY[:12]: "unfinished"}


def states(lines: list[str]) -> dict[str, str]:
    return {line.split()[0]: line.rstrip().rpartition("  ")[2] for line in lines[1:-1]}


def test_a_cache_without_templates(run, store):
    assert run("list")[1] == [f"0 templates in {store.directory}, 0 KiB."]
    assert run("clear") == (0, ["Removed 0 templates, 0 KiB."], "")
    assert not store.directory.exists()


def test_clear_removes_all_but_what_is_in_use(store, run):
    make(store)
    used = {**COMPONENTS, "machine": "web"}
    key = make(store, used)
    entry = store.open(key, used)
    assert entry is not None
    status, [removed, kept], _ = run("clear")

    assert status == 0
    assert removed.startswith("Removed 1 template, ")
    assert kept == f"web ({key[:12]}) is in use: it stays."
    entry.close()
    assert run("clear")[1][0].startswith("Removed 1 template, ")
    assert store.entries() == []


def test_clear_takes_machines_and_the_beginnings_of_keys(store, run):
    keys = [
        make(store, {**COMPONENTS, "machine": machine, "number": number})
        for number, machine in enumerate(["web", "web", "mail", "dev-vm"])
    ]
    assert run("clear", "web", keys[2][:12])[1][0].startswith("Removed 3 templates, ")
    assert [info.key for info in store.entries()] == keys[3:]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["clear", "nobody"], "No template is called 'nobody': see nixvm cache list."),
        (["clear", ""], "No template is called ''"),
        (["list", "more"], "Got unexpected extra argument (more). See nixvm cache list --help."),
        (["lst"], "No such command 'lst'."),
    ],
)
def test_a_mistake_is_one_line_and_2(store, run, arguments, says):
    make(store)
    status, out, err = run(*arguments)

    assert (status, out) == (2, [])
    assert err.startswith(f"nixvm: {says}")
    assert err.count("\n") == 1
    assert len(store.entries()) == 1


def test_a_cache_that_is_not_there_is_a_mistake(tmp_path, capsys):
    assert main(["cache", "list", "--cache", str(tmp_path / "typo")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "typo' does not exist" in err
    assert err.count("\n") == 1


def test_the_command_is_light_and_ends_with_its_reader(store, tmp_path):
    make(store)
    program = (
        "import sys; from pytest_nixvm.cli import main\n"
        f"status = main(['cache', 'list', '--cache', {str(tmp_path)!r}])\n"
        "heavy = {'paramiko', 'qemu', 'pexpect', 'pytest', 'asyncssh'} & set(sys.modules)\n"
        "sys.exit(f'{heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "dev-vm" in done.stdout

    command = f"{sys.executable} -m pytest_nixvm.cli cache list --cache {tmp_path} | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


def test_errors_name_the_options_as_the_command_has_them(tmp_path, capsys):
    (tmp_path / "flake.nix").write_text("{ outputs = { self }: { }; }")
    (tmp_path / "sub").mkdir()
    assert main(["list", "--flake", str(tmp_path / "sub")]) == 2
    assert f"did you mean --flake={tmp_path}?" in capsys.readouterr().err
    untested = "Test it: pytest --nixvm-flake=. --nixvm-machine=web"
    unwritable = "Can't write to x. --nixvm-cache and --nixvm-output name other places."
    assert in_words_of_ours(unwritable) == "Can't write to x. --cache names another."
    slow = "dev-vm was not ready after 9 s: before it. --nixvm-boot-timeout sets that time.\nSeen:"
    assert in_words_of_ours(slow) == "dev-vm was not ready after 9 s: before it.\nSeen:"
    assert in_words_of_ours(f"Or --nixvm-cache=DIR.\n{untested}") == f"Or --cache=DIR.\n{untested}"


def shell(command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell in which `nixvm` is the command."""
    return subprocess.run(
        ["sh", "-c", f'nixvm() {{ "{sys.executable}" -m pytest_nixvm.cli "$@"; }}; {command}'],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_an_output_that_is_closed_or_full_is_no_traceback(tmp_path):
    closed = shell("nixvm cache list >&-", tmp_path)
    assert (closed.returncode, closed.stderr) == (0, "")
    full = shell("nixvm cache list >/dev/full", tmp_path)
    assert full.returncode == 1
    assert full.stderr.startswith("nixvm: A disk is full: that of the output, or of the cache")
    assert full.stderr.count("\n") == 1


@pytest.mark.parametrize("words", ["list", "init", "ssh x", "run x --share ."])
def test_a_directory_that_was_removed_is_one_line(tmp_path, words):
    gone = tmp_path / "gone"
    gone.mkdir()
    done = shell(f"rmdir '{gone}'; nixvm {words}", gone)
    assert done.returncode == 1
    assert done.stderr.startswith("nixvm: The directory that this is in can't be used")
    assert done.stderr.count("\n") == 1


def test_what_nobody_has_foreseen_is_one_line(capsys, monkeypatch):
    for error, status, said in (
        (RuntimeError("could not determine the home directory for '~/.cache'"), 2, "set HOME"),
        (PermissionError(13, "Permission denied", "/root/x"), 1, "/root/x: Permission denied."),
        (OSError(36, "File name too long", "a" * 5000), 1, "aaa…: File name too long."),
    ):
        monkeypatch.setattr("platformdirs.user_cache_path", lambda *_, error=error: raised(error))
        monkeypatch.delenv("NIXVM_CACHE", raising=False)
        assert main(["cache", "list"]) == status
        err = capsys.readouterr().err
        assert said in err
        assert len(err) < 300


def raised(error: Exception) -> None:
    raise error


def test_the_cache_is_the_one_of_the_other_commands(store, tmp_path, capsys, monkeypatch):
    make(store)
    monkeypatch.setenv("NIXVM_CACHE", str(tmp_path))
    assert main(["cache", "list"]) == 0
    assert f"1 template in {store.directory}" in capsys.readouterr().out


@pytest.mark.parametrize("width", [12, 20, 40])
def test_a_narrow_terminal_shows_what_a_row_is_about(width, capsys, monkeypatch):
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setenv("COLUMNS", str(width))
    table(("machine", "kind", "system"), [("storage-vm", "physical", "x86_64-linux" * 3)])
    assert "storage-vm" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_who_wants_no_colours_gets_none(name, value, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    said = {}
    monkeypatch.setattr(cli.nixvm, "main", lambda **options: said.update(options), raising=True)
    main([])
    assert said["color"] is None
    monkeypatch.setenv(name, value)
    main([])
    assert said["color"] is False
