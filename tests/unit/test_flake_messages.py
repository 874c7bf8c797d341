"""What nix of various versions says, and what we make of it. No nix needed.

The messages of newer versions are from the sources and functional tests of nix:
tests/functional/flakes/source-paths.sh and src/libstore/build/derivation-building-goal.cc.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from _flake import git, write_flake

from pytest_nixvm.flake.explain import build_failed, evaluation_failed
from pytest_nixvm.flake.inputs import dependencies
from pytest_nixvm.flake.messages import Log, plain, store_name
from pytest_nixvm.flake.nix import NixFailure
from pytest_nixvm.flake.subject import Subject, Tree

DRV = "/nix/store/lw50q1nzliamyd7f1cjjng10bh905i99-linux-6.1.drv"
TOP = "/nix/store/g2dm5qclpdg9qswxaz6myx0hss3q298w-nixos-vm.drv"


def event(**fields: object) -> str:
    return "@nix " + json.dumps(fields)


def error(raw: str, full: str | None = None, **place: object) -> str:
    text = "\x1b[31;1merror:\x1b[0m " + (full or raw)
    return event(action="msg", level=0, msg=text, raw_msg=raw, **place)


def log_of(*lines: str) -> Log:
    log = Log()
    for line in lines:
        log.feed(line)
    return log


def test_terminal_sequences_are_removed() -> None:
    assert plain("\x1b[31;1merror:\x1b[0m a\x1b]8;;x\x07b\r\n") == "error: ab\n"
    assert plain("\x1b[1;38;5;9mred\x1b[m") == "red"


def test_progress_counts_builds_and_downloads() -> None:
    seen: list[tuple[str, int | None, int | None]] = []
    log = Log(lambda detail, done=None, total=None: seen.append((detail, done, total)))
    url = "https://cache.example.org/nar/abc.nar.xz"
    path = "/nix/store/lw50q1nzliamyd7f1cjjng10bh905i99-glibc-2.40"
    for line in (
        event(action="start", id=1, type=104, level=0, text=""),
        event(action="start", id=2, type=103, level=0, text=""),
        event(action="result", id=1, type=105, fields=[0, 2, 0, 0]),
        event(action="result", id=2, type=105, fields=[0, 3, 0, 0]),
        event(action="start", id=3, type=108, level=3, text="", fields=[path, "https://c"]),
        event(action="start", id=4, type=101, level=4, text="", fields=[url]),
        event(action="result", id=9, type=106, fields=[101, 4 * 2**20]),
        event(action="result", id=4, type=105, fields=[2**20, 4 * 2**20, 0, 0]),
        event(action="result", id=2, type=105, fields=[1, 3, 0, 0]),
        event(action="stop", id=4),
        event(action="start", id=5, type=105, level=3, text="", fields=[DRV, "", 1, 1]),
        event(action="result", id=1, type=105, fields=[1, 2, 1, 0]),
    ):
        log.feed(line)
    assert ("fetching glibc-2.40", 0, 5) in seen
    assert (f"downloading {url} (1.0 of 4.0 MiB)", 0, 5) in seen
    assert seen[-1] == ("building linux-6.1", 2, 5)


@pytest.mark.parametrize(
    "line", ["@nix {", "@nix []", "@nix null", "@nix {}", "@nix 1", "\0", event(action="new")]
)
def test_an_unknown_line_does_no_harm(line: str) -> None:
    log_of(line, event(action="result", id=1, type=999, fields=["x"]), event(action="stop"))


def test_the_last_error_counts() -> None:
    log = log_of(
        error("first"),
        "error: plain text, from before the logger was there",
        event(action="msg", level=1, msg="\x1b[35;1mwarning:\x1b[0m error: no such thing"),
        error("raw", "full\n  … while\n  error: raw", file="/x", line=3, column=4),
    )
    assert [found.text for found in log.errors] == [
        "first",
        "plain text, from before the logger was there",
        "raw",
    ]
    assert (log.error.file, log.error.line, log.error.column) == ("/x", 3, 4)
    assert log.warnings == ["error: no such thing"]


def test_without_an_error_message_what_was_printed_is_shown() -> None:
    assert log_of("terminate called", "Aborted").error.text == "terminate called\nAborted"
    assert "without saying why" in log_of().error.text


def test_names_in_the_store_are_made_readable() -> None:
    assert store_name(DRV) == "linux-6.1"
    assert store_name("anything") == "anything"


SUBJECT = Subject("nixosConfigurations.vm of /home/me/config", "github:me/config", [])


@pytest.mark.parametrize(
    "messages",
    [
        [  # 2.8
            f"builder for '{DRV}' failed with exit code 2",
            f"1 dependencies of derivation '{TOP}' failed to build",
        ],
        [  # 2.18 to 2.30
            f"builder for '{DRV}' failed with exit code 2;\nlast 10 log lines:\n> a\n",
            f"1 dependencies of derivation '{TOP}' failed to build",
        ],
        [  # 2.31 and later
            f"Cannot build '{DRV}'.\nReason: builder failed with exit code 2.\nOutput paths:\n  /x",
            f"Cannot build '{TOP}'.\nReason: 1 dependency failed.\nOutput paths:\n  /x",
        ],
    ],
)
def test_the_derivation_that_failed_is_named(messages: list[str], tmp_path: Path) -> None:
    log = log_of(
        event(action="start", id=5, type=105, level=3, text="", fields=[DRV, "", 1, 1]),
        event(action="result", id=5, type=101, fields=["\x1b[1mgcc: no such flag\x1b[0m"]),
        *map(error, messages),
    )
    text = str(build_failed(NixFailure(log), SUBJECT, tmp_path / "build.log"))
    assert text.startswith(f"Building {SUBJECT.what} failed: linux-6.1 failed with exit code 2.\n")
    assert "\n    gcc: no such flag\n" in text
    assert text.endswith(f"The whole log: {tmp_path / 'build.log'}")


@pytest.mark.parametrize(
    "message",
    [
        "getting status of '{store}/machines/vm.nix': No such file or directory",
        "path '{store}/machines/vm.nix' does not exist",
        "Path 'machines/vm.nix' does not exist in Git repository \"{root}\".",
        "Path 'machines/vm.nix' in the repository \"{root}\" is not tracked by Git.\n\nTo make it "
        'visible to Nix, run:\n\ngit -C "{root}" add "machines/vm.nix"',
        "path '«git+file://{root}»/machines/vm.nix' does not exist",
        "opening file '{store}/machines/vm.nix': No such file or directory",
    ],
)
def test_an_untracked_file_is_recognised_in_every_wording(tmp_path: Path, message: str) -> None:
    root = write_flake(tmp_path.resolve() / "config", "")
    (root / "machines").mkdir()
    (root / "machines/vm.nix").write_text("")
    store = f"/nix/store/{'0' * 32}-source"
    subject = Subject("vm", f"git+file://{root}", [Tree(root, root, True)])
    failure = NixFailure(log_of(error(message.format(store=store, root=root))))
    assert str(evaluation_failed(failure, subject)).endswith(
        f"Make it known with: git -C {root} add -N machines/vm.nix"
    )
    git(root, "add", "machines/vm.nix")
    assert "add -N" not in str(evaluation_failed(failure, subject))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("unable to download 'https://x.org/a': Couldn't resolve host name (6)", "no network"),
        ("unable to download 'https://x.org/a': Could not resolve hostname (6)", "no network"),
        ("unable to download 'https://x.org/a': HTTP error 404", "nothing at this address"),
        ("unable to download 'https://x.org/a': HTTP error 403", "access is denied"),
        ("unable to download 'https://x.org/a': Timeout was reached (28)", "does not answer"),
        ("unable to download 'https://x.org/a': Could not connect to server (7)", "be reached"),
        ("creating directory '/nix/store/.x': No space left on device", "The disk is full"),
        ("opening lock file '/nix/var/nix/db/big-lock': Permission denied", "can't use its store"),
        (
            "cannot connect to socket at '/nix/var/nix/daemon-socket/socket': Connection refused",
            "can't use its store",
        ),
        (
            "could not set permissions on '/nix/var/nix/profiles/per-user' to 755: Operation not "
            "permitted",
            "can't use its store",
        ),
        ("something that nobody has seen", "    something that nobody has seen"),
    ],
)
def test_what_can_be_done_is_said(message: str, expected: str) -> None:
    assert expected in str(evaluation_failed(NixFailure(log_of(error(message))), SUBJECT))


def test_git_says_itself_why_it_failed() -> None:
    log = log_of("fatal: couldn't find remote ref refs/heads/master", error("program 'git' failed"))
    text = str(evaluation_failed(NixFailure(log), SUBJECT))
    assert "can't be fetched: couldn't find remote ref refs/heads/master" in text


def test_of_a_trace_only_the_error_and_its_place_remain() -> None:
    """Newer versions print a trace even without --show-trace; the error itself comes last."""
    full = (
        "\n       … while calling the 'head' builtin\n         at /a.nix:1:1:\n"
        "            1| first\n             | ^\n\n       error: undefined variable 'foo'\n"
        "       at /b.nix:6:7:\n"
        "            5|\n            6|   foo\n             |   ^\n            7| }"
    )
    line = error("undefined variable 'foo'", full, file="/b.nix", line=6, column=7)
    text = str(evaluation_failed(NixFailure(log_of(line)), SUBJECT))
    assert text == (
        "Nix can't evaluate nixosConfigurations.vm of /home/me/config:\n"
        "    undefined variable 'foo'\n    at /b.nix:6:7:\n"
        "        5|\n        6|   foo\n         |   ^\n        7| }"
    )


class TestInputs:
    """Whether an evaluation may be remembered, from the graph of inputs."""

    def node(self, url: str, **inputs: str) -> dict[str, object]:
        attributes = {"type": "github", "owner": "o", "repo": url}
        return {
            "original": attributes,
            "locked": {**attributes, "rev": "1", "narHash": f"sha256-{url}"},
            "inputs": inputs,
        }

    def graph(self, **nodes: dict[str, object]) -> dict[str, object]:
        wrapper = {"inputs": {"target": "target"}}
        return {"root": "wrapper", "nodes": {"wrapper": wrapper, **nodes}}

    def lock(self, path: Path, **nodes: dict[str, object]) -> Path:
        (path / "flake.lock").write_text(json.dumps({"root": "root", "nodes": nodes}))
        return path / "flake.lock"

    def test_what_the_lock_file_names_is_settled(self, tmp_path: Path) -> None:
        inner, outer = self.node("inner"), self.node("outer", inner="inner")
        graph = self.graph(target={"inputs": {"outer": "outer"}}, outer=outer, inner=inner)
        lock = self.lock(tmp_path, root={"inputs": {"outer": "outer"}}, outer=outer, inner=inner)
        found = dependencies(graph, lock, {})
        assert (found.local, found.unsettled) == (set(), [])

    def test_without_a_lock_file_nothing_is(self, tmp_path: Path) -> None:
        inner, outer = self.node("inner"), self.node("outer", inner="inner")
        graph = self.graph(target={"inputs": {"outer": "outer"}}, outer=outer, inner=inner)
        found = dependencies(graph, tmp_path / "flake.lock", {})
        assert found.unsettled == ["outer", "outer/inner"]

    def test_a_lock_file_for_another_reference_does_not_count(self, tmp_path: Path) -> None:
        graph = self.graph(target={"inputs": {"a": "a"}}, a=self.node("new"))
        lock = self.lock(tmp_path, root={"inputs": {"a": "a"}}, a=self.node("old"))
        assert dependencies(graph, lock, {}).unsettled == ["a"]

    def test_the_same_content_under_another_name_does_not_count(self, tmp_path: Path) -> None:
        node = self.node("a")
        graph = self.graph(target={"inputs": {"a": "a", "b": "b"}}, a=node, b=node)
        lock = self.lock(tmp_path, root={"inputs": {"b": "b"}}, b=node)
        assert dependencies(graph, lock, {}).unsettled == ["a"]

    def test_an_override_settles_an_input_if_it_can_be_watched(self, tmp_path: Path) -> None:
        graph = self.graph(target={"inputs": {"a": "a"}}, a=self.node("a"))
        none = tmp_path / "flake.lock"
        local = dependencies(graph, none, {("a",): f"path:{tmp_path}"})
        assert (local.local, local.unsettled) == ({f"path:{tmp_path}"}, [])
        fixed = dependencies(graph, none, {("a",): f"github:o/a/{'1' * 40}"})
        assert (fixed.local, fixed.unsettled) == (set(), [])
        moving = dependencies(graph, none, {("a",): "github:o/a/main"})
        assert moving.unsettled == ["a"]

    def test_what_follows_another_input_is_that_input(self, tmp_path: Path) -> None:
        a = self.node("a")
        b = {**self.node("b"), "inputs": {"a": ["target", "a"]}}
        graph = self.graph(target={"inputs": {"a": "a", "b": "b"}}, a=a, b=b)
        lock_b = {**b, "inputs": {"a": ["a"]}}
        lock = self.lock(tmp_path, root={"inputs": {"a": "a", "b": "b"}}, a=a, b=lock_b)
        assert dependencies(graph, lock, {}).unsettled == []
