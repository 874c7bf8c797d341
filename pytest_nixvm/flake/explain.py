"""Nix's messages, turned into one that says what, where, and what to do.

What is recognised here was collected from nix 2.8 to 2.34. Where a message is not known it is
shown as it is, without trace, with the paths of the user's own files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_nixvm.errors import BuildError, EvaluationError, FlakeError, tail
from pytest_nixvm.flake.fingerprint import tracked_problem
from pytest_nixvm.flake.messages import Log, NixError, store_name
from pytest_nixvm.flake.nix import NixFailure
from pytest_nixvm.flake.remember import MODULES

# A flake's files as nix names them: a copy in the store or, in newer versions, not copied.
_SOURCE = re.compile(r"(?P<root>/nix/store/[0-9a-z]{32}-source)(?P<inner>/[^\s'\"»:,;)]*)?")
_LAZY = re.compile(r"«(?:git\+file|path):(?://)?(?P<root>/[^»?]*)[^»]*»(?P<inner>/[^\s'\"»:,;)]*)?")

_MISSING_FILE = (
    # nix up to 2.18 or so, then its successors
    re.compile(r"getting status of '(?P<path>[^']+)': No such file or directory"),
    re.compile(r"(?:opening file|reading directory|cannot read) '(?P<path>[^']+)'"),
    re.compile(r"[Pp]ath '(?P<path>[^']+)' in the repository .* is not tracked by Git"),
    re.compile(r"source tree referenced by '.*' does not contain (?:a )?'(?P<path>[^']+)'"),
    re.compile(r"'(?P<path>[^']+)' does not exist"),
)

_NETWORK = re.compile(
    r"unable to download|[Cc]ould ?n[o']t resolve host|unable to access '|Connection timed out|"
    r"[Cc]onnection refused|Network is unreachable|Failed to connect|"
    r"program 'git' failed|Failed to fetch git repository|failed to fetch|does not have Internet",
)
_URL = re.compile(r"(?:https?|git|ssh)://[^\s'\"»]+")

_BUILDER_FAILED = (
    re.compile(r"builder for '(?P<drv>[^']+)' failed (?P<how>[^;\n]*)"),
    re.compile(r"Cannot build '(?P<drv>[^']+)'\.\s+Reason: (?P<how>[^\n.]*)"),  # from 2.31 on
    re.compile(r"build of '(?P<drv>[^']+)'(?: on '[^']+')? failed(?P<how>[^\n]*)"),
)

_NOT_A_FLAKE = re.compile(
    r"lacks attribute 'outputs'|flake\.nix'? must be an attribute set|"
    r"expected a set but got|has an unsupported attribute|is not a flake|not part of a flake"
)

_NO_STORE = re.compile(
    r"(?:/nix/(?:store|var)|daemon)[^\n]*(?:Permission denied|Operation not permitted|"
    r"Read-only file system|readonly database|Connection refused)|"
    r"cannot connect to socket at|cannot open connection to remote store"
)

_NO_SPACE = re.compile(
    r"No space left on device|Disk quota exceeded|"
    r"diskSize might be too small"  # nixpkgs' make-disk-image.nix
)

_LONGEST = 60  # lines of a message


@dataclass(frozen=True)
class Tree:
    """A source tree on this machine that nix reads."""

    root: Path  # its top
    folder: Path  # where its flake.nix is
    git: bool  # whether git says what is in it


@dataclass(frozen=True)
class Subject:
    """What the failed call was about."""

    what: str  # "nixosConfigurations.dev-vm of /home/me/config"
    url: str  # the flake's reference
    trees: Sequence[Tree]  # the flake's first, then those of local overrides


def evaluation_failed(failure: NixFailure, subject: Subject) -> FlakeError:
    """Build the error for an evaluation that failed."""
    if failure.timeout is not None:
        return EvaluationError(
            f"Evaluating {subject.what} did not end within {failure.timeout:g} s"
            f"{_last(failure.log)}. Either it recurses without end, or it needs more time."
        )
    error = failure.log.error
    known = (
        _disk_full(error, failure.log)
        or _broken_lock(error, subject)
        or _missing_file(error, subject)
        or _store(error)
        or _unreachable(error, failure.log, subject)
        or _awkward_name(error, subject)
        or _no_flake(error, subject)
    )
    if known is not None:
        return known
    derivation, how = _culprit(failure.log)
    if derivation:  # import from derivation
        name = store_name(derivation)
        text = f"Evaluating {subject.what} takes a build that fails: {name} {_failed(how)}."
        return EvaluationError(text + _end_of_log(failure.log, derivation))
    return EvaluationError(f"Nix can't evaluate {subject.what}:\n{_render(error, subject)}")


def build_failed(failure: NixFailure, subject: Subject, log_file: Path | None) -> FlakeError:
    """Build the error for a build that failed, with the tail of the log that tells why."""
    log = failure.log
    if failure.timeout is not None:
        return BuildError(
            f"Building {subject.what} did not end within {failure.timeout:g} s{_last(log)}."
        )
    known = _disk_full(log.error, log) or _store(log.error)
    if known is not None:
        return known
    derivation, how = _culprit(log)
    if not derivation:
        text = f"Nix can't build {subject.what}:\n{_render(log.error, subject)}"
    else:
        text = f"Building {subject.what} failed: {store_name(derivation)} {_failed(how)}."
        text += _end_of_log(log, derivation)
    if log_file is not None:
        text += f"\nThe whole log: {log_file}"
    return BuildError(text)


def _culprit(log: Log) -> tuple[str, str]:
    """Return the derivation that could not be built, "" if it is not that, and how it ended."""
    for error in log.errors:  # the first is the cause, the others depend on it
        for pattern in _BUILDER_FAILED:
            found = pattern.search(error.text)
            if found and "dependenc" not in found["how"]:
                return found["drv"], found["how"].strip()
    return "", ""


def _end_of_log(log: Log, derivation: str) -> str:
    lines = log.logs.get(derivation, ())
    text = "\nIts log ends so:\n" + _indent(tail("\n".join(lines), 25)) if lines else ""
    if any(map(_NO_SPACE.search, lines)):
        text += (
            "\nEither the disk here is full (`df -h` tells; `nix-collect-garbage` frees what nix "
            "no longer needs), or a disk image was built that is too small for what goes into it "
            "(virtualisation.diskSize)."
        )
    return f"{text}\nThe derivation: {derivation} (nix log {derivation})"


def shorten(text: str, lines: int = _LONGEST) -> str:
    """Cut a long message in the middle: its beginning and its end say most."""
    every = text.strip("\n").splitlines()
    if len(every) <= lines:
        return "\n".join(every)
    half = lines // 2
    return "\n".join([*every[:half], f"[{len(every) - lines} lines]", *every[-half:]])


def _disk_full(error: NixError, log: Log) -> FlakeError | None:
    if _culprit(log)[0]:
        return None  # a builder says so, maybe of a disk that it makes: see `_end_of_log`
    for text in (error.full, *log.other):
        if _NO_SPACE.search(text):
            line = next(line for line in text.splitlines() if _NO_SPACE.search(line))
            return FlakeError(
                f"The disk is full: {line.removeprefix('error:').strip()}\n"
                "Make room (`nix-collect-garbage` frees what nix no longer needs) and try again."
            )
    return None


def _broken_lock(error: NixError, subject: Subject) -> FlakeError | None:
    """A flake.lock that is no JSON, often after a merge; nix says no file's name."""
    if not re.search(r"json|lock file", error.text):
        return None
    for tree in subject.trees:
        file = tree.folder / "flake.lock"
        try:
            text = file.read_text(errors="replace")
        except OSError:
            continue
        try:
            json.loads(text)
        except ValueError as problem:
            why = f"it is no JSON: {problem}"
            if re.search(r"^<{7}", text, re.MULTILINE):
                why = "a merge has left its conflict in it"
            restore = f"git -C {tree.folder} checkout HEAD flake.lock"
            way_out = f"Restore it ({restore}), or remove it" if tree.git else "Remove it"
            return FlakeError(
                f"{file} can't be read: {why}.\n{way_out}: `nix flake lock` makes a new one."
            )
    return None


def _missing_file(error: NixError, subject: Subject) -> FlakeError | None:
    """A file nix can't find: mostly one that git was not told of, the commonest mistake."""
    found = next(filter(None, (pattern.search(error.text) for pattern in _MISSING_FILE)), None)
    if found is None:
        return None
    place = _place(found["path"], subject)
    if place is None:
        return None
    trees, name = place
    for tree in trees:
        if not tree.git:
            continue
        # A directory that git does not know may hold a lot; its flake.nix is what matters then.
        for wanted in (str((tree.folder / "flake.nix").relative_to(tree.root)), name):
            problem = tracked_problem(tree.root, wanted)
            if problem is not None:
                return _add(tree.root, *problem)
    if len(trees) != 1 or os.path.lexists(trees[0].root / name):
        return None
    return EvaluationError(
        f"Nix can't evaluate {subject.what}: there is no {trees[0].root / name}, "
        "which the flake refers to."
    )


def _place(path: str, subject: Subject) -> tuple[list[Tree], str] | None:
    """Return the trees a path in a message may be of, and its name in them."""
    copy = _SOURCE.fullmatch(path) or _LAZY.fullmatch(path)
    if copy is not None:
        tree = _tree_of(copy, subject)
        name = (copy["inner"] or "").strip("/")
        trees = [tree] if tree else list(subject.trees)
        return (trees, name) if name else None
    for tree in subject.trees:
        if Path(path).is_relative_to(tree.root):
            return [tree], str(Path(path).relative_to(tree.root))
    if path.startswith("/") or not subject.trees:
        return None
    return list(subject.trees), path


def _tree_of(copy: re.Match[str], subject: Subject) -> Tree | None:
    """Return the tree that a copy in the store is of: the one with the same flake.nix."""
    for tree in subject.trees:
        mine = tree.folder / "flake.nix"
        if copy.re is _LAZY:
            if Path(copy["root"]) == tree.root:
                return tree
        elif _equal(mine, Path(copy["root"]) / mine.relative_to(tree.root)):
            return tree
    return None


def _add(root: Path, files: list[str], ignored: bool) -> FlakeError:
    shown = [str(root / name) for name in files[:5]]
    more = f" and {len(files) - 5} more" if len(files) > 5 else ""
    subject = "files that git does not track are" if len(files) > 1 else "git does not track it:"
    command = f"git -C {root} add -N {'-f ' if ignored else ''}{' '.join(files[:5])}"
    why = " (and .gitignore names it)" if ignored else ""
    if len(files) > 1:
        text = f"Nix can't see {', '.join(shown)}{more}: {subject} no part of the flake{why}."
    else:
        text = f"Nix can't see {shown[0]}: {subject} it is no part of the flake{why}."
    return EvaluationError(f"{text}\nMake it known with: {command}")


def _unreachable(error: NixError, log: Log, subject: Subject) -> FlakeError | None:
    if subject.url.startswith("flake:") and "registr" in error.text:
        name = subject.url.removeprefix("flake:")
        why = (
            "has none" if "cannot find" in error.text else f"can't be asked: {_reason(error.text)}"
        )
        return FlakeError(
            f"There is no directory {name}, and nix's registry, where a flake of that name could "
            f"be, {why}."
        )
    if "cannot find flake" in error.text and "registr" in error.text:
        return FlakeError(
            f"{subject.what} has an input that is not in nix's registry: {_first(error.text)}\n"
            "Say what to use in its place with --nixvm-override-input NAME REF."
        )
    text = "\n".join([error.text, *log.other])
    if not _NETWORK.search(error.text):
        return None
    url = _URL.search(text)
    where = url[0].rstrip(".,") if url else ""
    if not where and not subject.url.startswith(("path:", "git+file:")):
        where = subject.url
    if not where and "git" in error.text:
        return None  # a local repository git can't read: its own words say more
    reason = _reason(text)
    remote = not subject.url.startswith(("path:", "git+file:"))
    if remote and _mentions(where, subject.url):
        lead = f"The flake {subject.url} can't be fetched"
        way_out = "Check the name and the network, or give a local copy: --nixvm-flake=/path/to/it."
    else:
        name = _input_for(where, subject) or ""
        lead = f"An input of {subject.what} can't be fetched"
        way_out = (
            "With a local copy, or another reference: "
            f"--nixvm-override-input {name or 'NAME'} /path/to/it."
        )
        if name:
            lead = f"The input {name} of {subject.what} can't be fetched"
    return FlakeError(f"{lead}: {reason}" + (f" ({where})" if where else "") + f".\n{way_out}")


def _reason(text: str) -> str:
    for pattern, reason in (
        (r"[Cc]ould ?n[o']t resolve host", "no network, or no such host"),
        (r"[Tt]imed? ?out|Timeout", "the server does not answer"),
        (r"refused|Failed to connect|not connect|unreachable", "the server can't be reached"),
        (r"HTTP error 404|not found", "there is nothing at this address"),
        (r"HTTP error 40[13]|[Aa]uthentication|terminal prompts disabled", "access is denied"),
    ):
        if re.search(pattern, text):
            return reason
    fatal = re.findall(r"^fatal: (.*)", text, re.MULTILINE)  # git's own words
    return fatal[-1] if fatal else _first(text)


def _mentions(address: str, reference: str) -> bool:
    """Whether an address that was asked for belongs to a flake reference."""
    body = re.sub(r"^[a-z+]+:(//)?", "", reference).partition("?")[0].rstrip("/")
    owner_repo = "/".join(body.split("/")[:2])
    return bool(body) and (body in address or owner_repo in address or "registry" in address)


def _input_for(address: str, subject: Subject) -> str | None:
    """Find the input whose reference an address comes from, in the flake's own text."""
    found = re.search(r"[/:]([\w.-]+/[\w.-]+?)(?:\.git)?(?:[/?]|$)", re.sub(
        r"^\w+://(?:[^/]*github[^/]*/(?:repos/)?|[^/]+/)", "/", address
    ))  # fmt: skip
    if not found or not subject.trees:
        return None
    folder = subject.trees[0].root
    query = re.search(r"[?&]dir=([^&]+)", subject.url)
    try:
        text = (folder / (query[1] if query else "") / "flake.nix").read_text(errors="replace")
    except OSError:
        return None
    repository = re.escape(found[1])
    pattern = rf"([\w-]+)(?:\.url\s*=\s*|\s*=\s*\{{[^}}]*?\burl\s*=\s*)\"[^\"]*{repository}"
    name = re.search(pattern, text)
    return name[1] if name else None


def _store(error: NixError) -> FlakeError | None:
    if not _NO_STORE.search(error.text):
        return None
    return FlakeError(
        f"Nix can't use its store: {_first(error.text)}\n"
        "Start the nix-daemon, or run as the store's owner (`ls -ld /nix/store` tells)."
    )


def _awkward_name(error: NixError, subject: Subject) -> FlakeError | None:
    """Nix 2.8 takes no directory whose name has to be escaped in a URL."""
    path = subject.url.partition("?")[0].partition(":")[2].removeprefix("//")
    local = subject.url.startswith(("path:", "git+file:"))
    if not local or "%" not in path:
        return None
    if path not in error.text and "'git' failed" not in error.text:
        return None
    return FlakeError(
        f"This nix can't read a flake in {subject.trees[0].root if subject.trees else path}: it "
        "does not understand the characters in that name. Use a directory without spaces and "
        "special characters, or a newer nix."
    )


def _no_flake(error: NixError, subject: Subject) -> FlakeError | None:
    if not _NOT_A_FLAKE.search(error.text):
        return None
    text = _local_paths(_first(error.text), subject)
    if "lacks attribute 'outputs'" in text:
        text = "its flake.nix has no `outputs`"
    elif "must be an attribute set" in text or "expected a set" in text:
        text = "its flake.nix is not an attribute set `{ outputs = …; }`"
    return FlakeError(f"{_of(subject)} is no flake: {text}.")


def _of(subject: Subject) -> str:
    return str(subject.trees[0].root) if subject.trees else subject.url


def _render(error: NixError, subject: Subject) -> str:
    """Nix's own message, its place in the user's file, and the lines around it."""
    text = _local_paths(error.text, subject)
    if error.file and not _is_ours(error.file):
        place = _local_paths(error.file, subject)
        text += f"\nat {place}:{error.line}:{error.column}:"
        excerpt = re.findall(r"^\s*\d*\|.*$", error.full, re.MULTILINE)
        if excerpt:
            # In a trace every step has an excerpt; the error's own comes last.
            text += "\n" + "\n".join(_dedent(excerpt[-4:]))
    hint = re.findall(r"Did you mean .*", error.full)
    if hint and hint[-1] not in text:
        text += f"\n{hint[-1]}"
    if "--impure" in text:
        text = text.replace(" (use '--impure' to override)", "")
        text += "\nFlakes are evaluated purely; `--nixvm-nix-option pure-eval false` allows it."
    if "infinite recursion" in text:
        text += "\nSome value is defined by itself; `nix eval --show-trace` shows the way round."
    return _indent(shorten(text))


def _is_ours(file: str) -> bool:
    """Whether it is the copy of a file of flake/modules: no place where a user could mend it."""
    copy = _SOURCE.fullmatch(file)
    return copy is not None and _equal(MODULES / (copy["inner"] or "").strip("/"), Path(file))


def _local_paths(text: str, subject: Subject) -> str:
    """Put the user's own files in the place of the copies in the store that nix speaks of."""

    def replace(match: re.Match[str]) -> str:
        inner = (match["inner"] or "").lstrip("/")
        tree = _tree_of(match, subject)
        if tree is not None:
            return str(tree.root / inner)
        for tree in subject.trees:
            if inner and _equal(tree.root / inner, Path(match["root"]) / inner):
                return str(tree.root / inner)
        return match[0]

    return _LAZY.sub(replace, _SOURCE.sub(replace, text))


def _equal(one: Path, other: Path) -> bool:
    try:
        return one.read_bytes() == other.read_bytes()
    except OSError:
        return False


def _last(log: Log) -> str:
    return f" (the last that was seen: {log.now})" if log.now else ""


def _failed(how: str) -> str:
    """Return what became of a builder, from the various ways nix says it."""
    how = re.sub(r"^(?:builder )?(?:failed )?", "", how.strip(" .:"))
    return f"failed {how}" if how else "failed"


def _first(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "").rstrip(".")


def _dedent(lines: list[str]) -> list[str]:
    margin = min(len(line) - len(line.lstrip()) for line in lines)
    return ["    " + line[margin:] for line in lines]


def _indent(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())
