"""The deployed generation as the user names it: HEAD~1, a branch, a tag, a whole reference."""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode

from pytest_nixvm.errors import ChangeError, FlakeError, MissingProgramError
from pytest_nixvm.flake.process import environment
from pytest_nixvm.flake.reference import FlakeReference, git_root, locate
from pytest_nixvm.flake.words import listed

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SAFE = "/-._~!$&'()*+,;=:@"  # what nix takes unescaped in a URL

# What pins a reference to one content: another revision has its own.
_PINS = {"rev", "ref", "narHash", "lastModified", "revCount"}

# github:owner/repo[/revision], and a name in the flake registry.
_HOSTED = re.compile(r"(?P<flake>(?:github|gitlab|sourcehut):[^/?]+/[^/?]+|flake:[^/?]+)(/[^?]*)?")

_RELATIVE = re.compile(r"[~^@{]|^HEAD$")

_TIMEOUT = 60  # seconds, for one git command


def base_reference(text: str, candidate: FlakeReference, cwd: Path) -> FlakeReference:
    """Understand which flake `text` means beside `candidate`, the flake under test.

    base_reference("HEAD~1", candidate, Path.cwd())

    A revision (of any form that git knows) is the candidate's flake at that revision. What has a
    scheme, begins with `.`, `/` or `~`, or is a directory with a flake.nix, is a reference of its
    own; `git+file:.?ref=NAME` takes any name that git takes. A `#NAME` at the end is the machine
    there; without one a machine is looked for by its name.

    Raises:
        ChangeError: there is no such revision, no git repository, or no flake.nix at that revision.
        FlakeError: there is no such directory, or no flake in it.
        MissingProgramError: git is needed and not installed.
    """
    name, _, fragment = text.strip().partition("#")
    if _is_reference(name, cwd):
        url, local = locate(name, cwd)
        if url.startswith("git+file:") and local is None:
            return FlakeReference(_pinned(url, text), unquote(fragment) or None, None)
        return FlakeReference.parse(text, cwd)
    if not name or name.startswith("-"):
        raise ChangeError(
            f"{text!r} is no revision: name one (HEAD~1, a branch, a tag, a commit), or a flake."
        )
    attribute = unquote(fragment) or _kept(candidate.attribute)
    return FlakeReference(_at(name, candidate), attribute, None)


def _is_reference(name: str, cwd: Path) -> bool:
    if name.startswith((".", "/", "~")) or _SCHEME.match(name):
        return True
    # A directory may well be called as a branch is; one without a flake can't be meant.
    return bool(name) and (cwd / name.partition("?")[0] / "flake.nix").is_file()


def _kept(attribute: str | None) -> str | None:
    """A machine is found by its name in every revision; what is elsewhere only by its path."""
    if attribute is None or "." not in attribute or attribute.startswith("nixosConfigurations."):
        return None
    return attribute


def _at(revision: str, candidate: FlakeReference) -> str:
    """Return the URL of the candidate's flake at another revision."""
    base, _, query = candidate.url.partition("?")
    parameters = {key: value for key, value in parse_qsl(query) if key not in _PINS}
    if base.startswith("git+file:"):
        root = Path(unquote(base.removeprefix("git+file:").removeprefix("//")))
        return _revision_of(root, parameters, revision)
    if candidate.local is not None:
        found = git_root(candidate.local)
        if found is None:
            raise ChangeError(
                f"{revision} can't be looked up: {candidate.local} is not in a git repository, so "
                "it has no other revisions. Name a flake instead: a directory with the deployed "
                "configuration, or github:OWNER/REPOSITORY/REVISION."
            )
        folder = candidate.local.relative_to(found)
        return _revision_of(found, {} if folder == Path() else {"dir": str(folder)}, revision)
    hosted = _HOSTED.fullmatch(base)
    if hosted or base.startswith("git+"):
        if _RELATIVE.search(revision):
            raise ChangeError(
                f"{revision} can't be looked up in {candidate.url}, which is not here: name a "
                "branch, a tag or a commit."
            )
        if hosted:
            return f"{hosted['flake']}/{quote(revision, safe=_SAFE)}{_query(parameters)}"
        pin = "rev" if _COMMIT.fullmatch(revision) else "ref"
        return base + _query({**parameters, pin: revision})
    raise ChangeError(
        f"{revision} can't be looked up: {candidate.url} has no revisions. Name a whole flake "
        "instead."
    )


def _pinned(url: str, text: str) -> str:
    """Resolve a reference into a local repository: nix knows branches and full names only."""
    base, _, query = url.partition("?")
    parameters = dict(parse_qsl(query))
    root = Path(unquote(base.removeprefix("git+file:").removeprefix("//")))
    revision = parameters.get("rev") or parameters.get("ref") or "HEAD"
    if "narHash" in parameters:
        return url
    kept = {key: value for key, value in parameters.items() if key not in _PINS}
    try:
        return _revision_of(root, kept, revision)
    except ChangeError as error:
        raise ChangeError(f"{text}: {error}") from None


def _revision_of(root: Path, parameters: dict[str, str], revision: str) -> str:
    git = _Git(root)
    commit = git.commit(revision)
    folder = parameters.get("dir", "").strip("/")
    file = f"{folder}/flake.nix" if folder else "flake.nix"
    if not git.has(commit, file):
        raise ChangeError(
            f"{git.described(commit, revision)} has no {file}: the flake was not there yet, or "
            f"somewhere else. Name a later revision, or the place: git+file://{root}?"
            f"{'dir=FOLDER&' if folder else ''}rev={commit}{'' if folder else '&dir=FOLDER'}."
        )
    shallow = {"shallow": "1"} if git.is_shallow else {}  # or nix refuses it
    return f"git+file://{quote(str(root), safe=_SAFE)}" + _query(
        {**parameters, **shallow, "rev": commit}
    )


def _query(parameters: dict[str, str]) -> str:
    return f"?{urlencode(parameters, quote_via=quote, safe=_SAFE)}" if parameters else ""


class _Git:
    """Read-only questions to one repository."""

    def __init__(self, root: Path) -> None:
        program = shutil.which("git")
        if program is None:
            raise MissingProgramError(
                "git was not found in PATH; it is needed to look up a revision. Install it."
            )
        self._root = root
        self._program = program
        done = self._ask("rev-parse", "--is-shallow-repository")
        if done is None:
            raise ChangeError(f"{root} is not a git repository that git can read: {self._error}.")
        self.is_shallow = done == "true"

    def commit(self, revision: str) -> str:
        """Return the full name of a commit.

        Raises:
            ChangeError: there is none.
        """
        # As nix does it for a name: a branch first.
        for name in (f"refs/heads/{revision}", revision):
            found = self._ask(
                "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"
            )
            if found:
                return found.splitlines()[-1]
        raise ChangeError(self._unknown(revision))

    def has(self, commit: str, file: str) -> bool:
        return self._ask("cat-file", "-e", f"{commit}:{file}") is not None

    def described(self, commit: str, revision: str) -> str:
        """Return a commit as a person knows it: HEAD~1 (0123abc "its subject")."""
        subject = self._ask("log", "-1", "--format=%h %s", commit) or commit[:10]
        short, _, title = subject.partition(" ")
        return f'{revision} ({short} "{title}")'

    def _unknown(self, revision: str) -> str:
        last = self._ask("log", "--oneline", "--no-decorate", "-3")
        if last is None:
            return (
                f"{revision}: {self._root} has no commits yet, so nothing can be deployed from it."
            )
        if self.is_shallow:
            count = self._ask("rev-list", "--count", "HEAD") or "few"
            return (
                f"{revision} is not in {self._root}, which is a shallow clone with {count} of its "
                "commits. Get the rest: `git fetch --unshallow`; in a CI job, check out with its "
                "whole history (fetch-depth: 0 with actions/checkout, GIT_DEPTH: 0 with GitLab)."
            )
        formats = ("refs/heads", "refs/tags", "refs/remotes")
        names = (self._ask("for-each-ref", "--format=%(refname:short)", *formats) or "").split()
        guesses = [name for name in names if name.rpartition("/")[2] == revision]
        guesses += difflib.get_close_matches(revision, names, 3, 0.6)
        text = f"{self._root} has no revision {revision}."
        if guesses:
            text += f" Did you mean {' or '.join(dict.fromkeys(guesses))}?"
        elif names:
            text += f" Its branches and tags: {listed(names, 8)}."
        # A registry's name, or a directory that is not there, looks the same.
        text += " (A flake is named with its scheme: flake:NAME, github:…, or as ./DIRECTORY.)"
        return f"{text}\nIts last commits:\n" + "\n".join(
            f"    {line}" for line in last.split("\n")
        )

    def _ask(self, *arguments: str) -> str | None:
        """Run git; None if that fails, then `_error` says why."""
        try:
            done = subprocess.run(
                [self._program, "-C", str(self._root), "--no-optional-locks", *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_TIMEOUT,
                env=environment(),
                check=False,
            )
        except (subprocess.TimeoutExpired, OSError) as error:
            raise FlakeError(f"git can't be asked about {self._root}: {error}") from None
        self._error = done.stderr.decode(errors="replace").strip().removeprefix("fatal: ")
        return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None
