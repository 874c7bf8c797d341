"""The layout that `nixvm init` writes: what is in it, how a list in flake.nix is edited, git."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path, PurePath

import pytest
from _flake import needs_nix

from pytest_nixvm import layout
from pytest_nixvm.errors import SettingsError, UserError
from pytest_nixvm.layout import SOURCE, Person, add_vm, track, write_layout

KEY = (
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl carol@laptop"
)
CAROL = Person("carol", 'Carol "C" ${x}', (KEY,))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    place = tmp_path / "config"
    write_layout(place, layout.layout(CAROL, ["dev-vm", "web-vm"], time_zone="Asia/Tokyo"))
    return place


def texts(place: Path) -> dict[str, str]:
    return {
        str(path.relative_to(place)): path.read_text()
        for path in place.rglob("*")
        if path.is_file() and {".git", "__pycache__", ".pytest_cache"}.isdisjoint(path.parts)
    }


def test_it_has_the_machines_that_were_asked_for(written: Path) -> None:
    found = texts(written)
    assert {name for name in found if name.startswith("machines/")} == {
        "machines/vms/TEMPLATE/configuration.nix",
        "machines/vms/TEMPLATE/home.nix",
        "machines/vms/dev-vm/configuration.nix",
        "machines/vms/dev-vm/home.nix",
        "machines/vms/web-vm/configuration.nix",
    }
    assert 'networking.hostName = "web-vm";' in found["machines/vms/web-vm/configuration.nix"]
    assert "TEMPLATE" not in found["machines/vms/web-vm/configuration.nix"]
    assert {"AGENTS.md", "CLAUDE.md", ".gitignore", "pytest.ini", "tests/test_machines.py"} < {
        *found
    }


def test_nothing_of_the_example_s_people_is_left(written: Path) -> None:
    everything = "\n".join(texts(written).values())
    for word in ("alice", "bob", "opensesame", "$6$", "thinkpad", "dell", "berlin"):
        assert word not in everything.lower(), word
    assert "hashedPassword = null;" in everything
    assert KEY in everything
    assert '"Asia/Tokyo"' in everything


def test_it_is_the_example_but_for_people_and_machines(tmp_path: Path) -> None:
    files = layout.layout(CAROL, layout.NEW_VMS)
    changed = {PurePath("lib/users.nix"), PurePath("modules/nixos/basic-system.nix")}
    for name in files.keys() - changed - {PurePath("flake.nix")}:
        assert files[name] == (SOURCE / name).read_bytes()


@needs_nix
def test_nix_reads_it(written: Path) -> None:
    subprocess.run(
        ["nix-instantiate", "--parse", *written.rglob("*.nix")],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    users = written / "lib" / "users.nix"
    user = subprocess.run(
        ["nix-instantiate", "--eval", "--json", "--strict", users, "-A", "vmUser"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert '"description":"Carol \\"C\\" ${x}"' in user


def test_what_is_no_project_is_left_out(tmp_path: Path, monkeypatch) -> None:
    source = tmp_path / "layout"
    write_layout(source, layout.layout(CAROL, layout.NEW_VMS))
    for junk in ("tests/__pycache__/a.pyc", ".pytest_cache/CACHEDIR.TAG", "flake.lock"):
        (source / junk).parent.mkdir(exist_ok=True)
        (source / junk).write_text("")
    monkeypatch.setattr(layout, "SOURCE", source)
    names = {str(name) for name in layout.layout(CAROL, layout.NEW_VMS)}
    assert names == set(texts(SOURCE)) - {name for name in texts(SOURCE) if _physical(name)}


def _physical(name: str) -> bool:
    return name.startswith("machines/") and not name.startswith("machines/vms/")


@pytest.mark.parametrize("name", ["", "a b", "-a", "a" * 64, "web.vm", "../x", "TEMPLATE", "ä"])
def test_names_that_no_machine_has(name: str) -> None:
    with pytest.raises(SettingsError):
        layout.layout(CAROL, [name])


@pytest.mark.parametrize("name", ["root", "Carol", "a b", "1a", "", "a" * 32])
def test_names_that_no_person_has(name: str) -> None:
    with pytest.raises(SettingsError, match="user name"):
        layout.layout(Person(name), ["dev-vm"])


def test_a_machine_is_named_once() -> None:
    with pytest.raises(SettingsError, match="web-vm is named twice"):
        layout.layout(CAROL, ["web-vm", "web-vm"])


# --- where it is written -----------------------------------------------------------------------


@pytest.mark.parametrize("there", [[], [".git"], ["README.md", "LICENSE", ".git"]])
def test_a_directory_that_counts_as_empty(tmp_path: Path, there: list[str]) -> None:
    for name in there:
        (tmp_path / name).mkdir()
    written = write_layout(tmp_path, layout.layout(CAROL, ["a-vm"]))
    assert tmp_path / "flake.nix" in written


@pytest.mark.parametrize(("there", "said"), [("notes.txt", "not empty"), ("flake.nix", "a flake")])
def test_nothing_is_written_over(tmp_path: Path, there: str, said: str) -> None:
    (tmp_path / there).write_text("mine")
    with pytest.raises(UserError, match=said):
        write_layout(tmp_path, layout.layout(CAROL, ["a-vm"]))
    assert texts(tmp_path) == {there: "mine"}


def test_all_or_nothing(tmp_path: Path, monkeypatch) -> None:
    files = layout.layout(CAROL, ["a-vm"])
    # A name that is too long for any file system, behind others that are not.
    files[PurePath("tests", "x" * 300)] = b""
    with pytest.raises(UserError, match="File name too long"):
        write_layout(tmp_path / "config", files)
    assert not (tmp_path / "config").exists()
    with pytest.raises(UserError, match="File name too long"):
        write_layout(tmp_path / "deep" / "config", files)
    assert not (tmp_path / "deep").exists()


# --- a VM more ---------------------------------------------------------------------------------


def test_a_vm_is_added_from_the_flake_s_own_template(written: Path) -> None:
    template = written / "machines/vms/TEMPLATE/configuration.nix"
    template.write_text(template.read_text() + "# ours: TEMPLATE\n")
    (template.parent / "disks").mkdir()
    (template.parent / "disks" / "extra.nix").write_text("{ }\n")

    added = add_vm(written, "db-vm")

    assert added.listed
    assert [str(path.relative_to(written)) for path in added.files] == [
        "machines/vms/db-vm/configuration.nix",
        "machines/vms/db-vm/disks/extra.nix",
    ]
    assert added.files[0].read_text().endswith("# ours: db-vm\n")
    assert '        "web-vm"\n        "db-vm"\n      ];' in (written / "flake.nix").read_text()


def test_with_a_home(written: Path) -> None:
    (written / "machines/vms/TEMPLATE/home.nix").unlink()
    added = add_vm(written, "db-vm", home=True)
    assert [path.name for path in added.files] == ["configuration.nix", "home.nix"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("vmMachines = [ ];", 'vmMachines = [ "x-vm" ];'),
        ('vmMachines = [ "a" "b" ];', 'vmMachines = [ "a" "b" "x-vm" ];'),
        ('vmMachines = ["a"];', 'vmMachines = ["a" "x-vm" ];'),
        (
            '  vmMachines = [\n    "a" # one\n  ];',
            '  vmMachines = [\n    "a" # one\n    "x-vm"\n  ];',
        ),
        ('vmMachines=[\n\t"a"\n];', 'vmMachines=[\n\t"a"\n\t"x-vm"\n];'),
        ("  vmMachines = [\n  ];", '  vmMachines = [\n    "x-vm"\n  ];'),
        ('# vmMachines = [ ];\nvmMachines = [ "a" ];', None),
        ('vmMachines = [\n  # "c"\n];', 'vmMachines = [\n  # "c"\n  "x-vm"\n];'),
    ],
)
def test_the_list_keeps_its_form(written: Path, before: str, after: str | None) -> None:
    (written / "flake.nix").write_text(f"{{ {before} }}")
    assert add_vm(written, "x-vm").listed
    wanted = after or before.replace('"a" ]', '"a" "x-vm" ]')
    assert (written / "flake.nix").read_text() == f"{{ {wanted} }}"


@pytest.mark.parametrize(
    "text",
    [
        "{ }",
        "vmMachines = builtins.attrNames (builtins.readDir ./machines/vms);",
        'vmMachines = [ "a" ] ++ more; vmMachines = [ ];',
        'vmMachines = [ (import ./x) "a" ];',
    ],
)
def test_what_is_no_plain_list_is_left_alone(written: Path, text: str) -> None:
    (written / "flake.nix").write_text(text)
    added = add_vm(written, "x-vm")
    assert not added.listed
    assert added.files
    assert (written / "flake.nix").read_text() == text


def test_a_name_that_is_listed_already_is_not_listed_twice(written: Path) -> None:
    text = (written / "flake.nix").read_text().replace('"web-vm"', '"web-vm" "x-vm"')
    (written / "flake.nix").write_text(text)
    assert add_vm(written, "x-vm").listed
    assert (written / "flake.nix").read_text() == text


@pytest.mark.parametrize("place", ["machines/vms/x-vm", "machines/x-vm"])
def test_a_machine_that_is_there_is_not_touched(written: Path, place: str) -> None:
    (written / place).mkdir()
    before = texts(written)
    with pytest.raises(UserError, match=re.escape(place)):
        add_vm(written, "x-vm")
    assert texts(written) == before


def test_control_c_leaves_nothing_half_done(written: Path, monkeypatch) -> None:
    def interrupted(file: Path, text: str) -> None:
        raise KeyboardInterrupt

    before = texts(written)
    monkeypatch.setattr(layout, "_replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        add_vm(written, "x-vm")
    assert texts(written) == before


def test_line_ends_are_left_as_they_are(written: Path) -> None:
    text = (written / "flake.nix").read_text().replace("\n", "\r\n")
    (written / "flake.nix").write_bytes(text.encode())
    assert add_vm(written, "x-vm").listed
    changed = (written / "flake.nix").read_bytes().decode()
    assert changed.count("\r\n") >= text.count("\r\n") - 1
    assert '"x-vm"' in changed


def test_the_flake_around_a_directory_is_named(written: Path) -> None:
    inside = written / "machines" / "vms"
    with pytest.raises(UserError, match=f"--flake {re.escape(str(written))}[?]"):
        add_vm(inside, "x-vm")


def test_a_flake_of_another_layout(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no flake"):
        add_vm(tmp_path, "x-vm")
    (tmp_path / "flake.nix").write_text("{ }")
    with pytest.raises(UserError, match="machines/vms"):
        add_vm(tmp_path, "x-vm")


def test_the_flake_keeps_its_mode_and_a_link_stays_one(written: Path) -> None:
    real = written / "real.nix"
    (written / "flake.nix").rename(real)
    real.chmod(0o640)
    (written / "flake.nix").symlink_to("real.nix")
    add_vm(written, "x-vm")
    assert (written / "flake.nix").is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert '"x-vm"' in real.read_text()


# --- git ---------------------------------------------------------------------------------------


def tracked(place: Path) -> set[str]:
    done = subprocess.run(
        ["git", "-C", place, "ls-files"], check=True, capture_output=True, text=True
    )
    return set(done.stdout.split())


def test_git_knows_of_what_is_new_and_of_nothing_else(written: Path) -> None:
    files = [path for path in written.rglob("*") if path.is_file()]
    assert track(written, files) == ""  # no repository, none wanted
    assert track(written, files, begin=True) == "git init and git add were done."
    (written / "mine.txt").write_text("")
    assert track(written, add_vm(written, "x-vm").files) == "git add was done."
    assert "machines/vms/x-vm/configuration.nix" in tracked(written)
    assert "mine.txt" not in tracked(written)


def test_a_repository_around_it_is_used(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    files = write_layout(tmp_path / "nixos", layout.layout(CAROL, ["a-vm"]))
    assert track(tmp_path / "nixos", files, begin=True) == "git add was done."
    assert "nixos/flake.nix" in tracked(tmp_path)
    assert not (tmp_path / "nixos" / ".git").exists()


def test_what_git_refuses_is_told(tmp_path: Path, monkeypatch) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text("nixos\n")
    files = write_layout(tmp_path / "nixos", layout.layout(CAROL, ["a-vm"]))
    said = track(tmp_path / "nixos", files, begin=True)
    assert said.startswith("git add failed, and Nix sees")
    assert said.endswith("ignored by one of your .gitignore files: nixos")
    monkeypatch.setenv("PATH", "/nowhere")
    assert track(tmp_path / "nixos", files).startswith("git is not installed, and Nix sees")
