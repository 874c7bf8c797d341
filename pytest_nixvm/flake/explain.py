"""Nix's messages, turned into one that says what, where, and what to do.

What is recognised here was collected from nix 2.8 to 2.34. Where a message is not known it is
shown as it is, without trace, with the paths of the user's own files.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from pytest_nixvm.errors import BuildError, EvaluationError, FlakeError, tail
from pytest_nixvm.flake.fingerprint import tracked_problem
from pytest_nixvm.flake.messages import Log, NixError, first_line, store_name
from pytest_nixvm.flake.nix import NixFailure
from pytest_nixvm.flake.subject import Subject, is_ours
from pytest_nixvm.flake.unreachable import unreachable

_MISSING_FILE = (
    # nix up to 2.18 or so, then its successors
    re.compile(r"getting status of '(?P<path>[^']+)': No such file or directory"),
    re.compile(r"(?:opening file|reading directory|cannot read) '(?P<path>[^']+)'"),
    re.compile(r"[Pp]ath '(?P<path>[^']+)' in the repository .* is not tracked by Git"),
    re.compile(r"source tree referenced by '.*' does not contain (?:a )?'(?P<path>[^']+)'"),
    re.compile(r"'(?P<path>[^']+)' does not exist"),
)

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
        or unreachable(error, failure.log, subject)
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
    place = subject.place(found["path"])
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


def _store(error: NixError) -> FlakeError | None:
    if not _NO_STORE.search(error.text):
        return None
    return FlakeError(
        f"Nix can't use its store: {first_line(error.text)}\n"
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
    text = subject.local(first_line(error.text))
    if "lacks attribute 'outputs'" in text:
        text = "its flake.nix has no `outputs`"
    elif "must be an attribute set" in text or "expected a set" in text:
        text = "its flake.nix is not an attribute set `{ outputs = …; }`"
    return FlakeError(f"{subject.where} is no flake: {text}.")


def _render(error: NixError, subject: Subject) -> str:
    """Nix's own message, its place in the user's file, and the lines around it."""
    text = subject.local(error.text)
    if error.file and not is_ours(error.file):
        place = subject.local(error.file)
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


def _last(log: Log) -> str:
    return f" (the last that was seen: {log.now})" if log.now else ""


def _failed(how: str) -> str:
    """Return what became of a builder, from the various ways nix says it."""
    how = re.sub(r"^(?:builder )?(?:failed )?", "", how.strip(" .:"))
    return f"failed {how}" if how else "failed"


def _dedent(lines: list[str]) -> list[str]:
    margin = min(len(line) - len(line.lstrip()) for line in lines)
    return ["    " + line[margin:] for line in lines]


def _indent(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())
