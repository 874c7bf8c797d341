"""A system that is copied to a host: by a nix that says what it was asked, if there is room."""

import shutil
from types import SimpleNamespace

import pytest

from pytest_nixvm.deploy.host import DeployError, Facts, Host, Target
from pytest_nixvm.deploy.system import check_room, copy
from pytest_nixvm.flake.nix import Nix
from pytest_nixvm.progress import Silent

pytestmark = pytest.mark.shell

TOPLEVEL = "/nix/store/x-nixos-system"
BASH = shutil.which("bash")


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Return what copies with these arguments, and says what nix was asked, and with what."""
    program = tmp_path / "nix"
    monkeypatch.setattr("pytest_nixvm.deploy.host.shutil.which", lambda _: "/bin/ssh")

    def asked(to, options=(), *, substitutes=False, ends="exit 0"):
        program.write_text(
            f"#!{BASH}\nprintf '%s\\n' \"$@\" > {tmp_path}/argv\n"
            f'printf %s "$NIX_SSHOPTS" > {tmp_path}/options\n{ends}\n'
        )
        program.chmod(0o755)
        host = Host(Target.parse(to), options)
        copy(Nix(program, "2.18"), host, TOPLEVEL, Silent(), substitutes=substitutes)
        return (tmp_path / "argv").read_text().split("\n"), (tmp_path / "options").read_text()

    return asked


def test_system_is_copied_with_the_options_that_ssh_gets(asked, monkeypatch):
    monkeypatch.delenv("NIX_SSHOPTS", raising=False)
    argv, options = asked("ssh://me@host:2222", ["IdentityFile=/key"])
    at = argv.index("copy")
    assert argv[at : at + 4] == ["copy", "--to", "ssh://me@host", TOPLEVEL]
    assert "--no-check-sigs" in argv
    assert "--substitute-on-destination" not in argv
    assert options == (
        "-o BatchMode=yes -o IdentityFile=/key -o ConnectTimeout=10 -p 2222"  # no port in the URL
    )


def test_host_fetches_what_its_caches_have_where_that_is_wanted(asked):
    argv, _ = asked("ssh://host", substitutes=True)
    assert "--substitute-on-destination" in argv


def test_options_for_ssh_that_nix_has_already_go_before_ours(asked, monkeypatch):
    monkeypatch.setenv("NIX_SSHOPTS", "-o User=me")
    _, options = asked("ssh://host", ["ProxyCommand=nc %h 22"])
    assert options.startswith("-o User=me -o BatchMode=yes -o 'ProxyCommand=nc %h 22' ")


def test_copy_that_fails_is_told_in_the_words_of_nix(asked):
    with pytest.raises(DeployError, match=r"(?s)nothing was changed there\.\n.*no room"):
        asked("ssh://host", ends="echo 'error: no room' >&2; exit 1")


MIB = 1 << 20
HOST = SimpleNamespace(target=Target.parse("ssh://host"))
LACKING = {"/nix/store/a": 5000 * MIB, "/nix/store/b": 100 * MIB - 1}


def facts(mebibytes, filesystem):
    return Facts({"space": str(mebibytes << 10), "filesystem": filesystem}, ())


@pytest.mark.parametrize(
    ("free", "filesystem", "lacking"),
    [
        (5356, "ext2/ext3", LACKING),
        (256, "ext2/ext3", {}),
        (300, "btrfs", LACKING),  # nobody can say
        (300, "UNKNOWN (0xca451a4e)", LACKING),
    ],
)
def test_host_with_room_for_what_it_lacks_is_copied_to(free, filesystem, lacking):
    check_room(HOST, facts(free, filesystem), lacking)


@pytest.mark.parametrize(
    ("free", "filesystem", "lacking", "said"),
    [
        (
            5355,
            "xfs",
            LACKING,
            r"5355 MiB free.* it lacks of the system \(2 store paths\) takes 5100 MiB: ",
        ),
        (255, "xfs", {}, r"255 MiB free in /nix/store: make room first \(nix-collect-garbage\)"),
        (255, "zfs", LACKING, r"255 MiB free in /nix/store: .* 256 MiB are left\."),
    ],
)
def test_copy_does_not_fill_the_host(free, filesystem, lacking, said):
    with pytest.raises(DeployError, match=rf"^ssh://root@host has {said}"):
        check_room(HOST, facts(free, filesystem), lacking)
