"""Flake references as the user writes them, made absolute.

The forms are those of `nix flake --help` (man nix3-flake, "Flake references"), with what nix does
on the command line: a directory inside a git tree is read through git, which sees tracked files
only, any other directory as a whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode

from pytest_nixvm.errors import FlakeError

# What nix takes unescaped in the path of a URL (src/libutil/url-parts.hh).
_SAFE = "/-._~!$&'()*+,;=:@"

_REGISTRY_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*(/[A-Za-z0-9._-]+){0,2}")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_'-]*")


@dataclass(frozen=True)
class FlakeReference:
    """A flake, and maybe one attribute in it.

    FlakeReference.parse("./nix#dev-vm", Path.cwd())
    """

    url: str  # what nix is given, absolute: git+file:///abs?dir=sub, path:/abs, github:owner/repo
    attribute: str | None  # the text after '#'
    local: Path | None  # the directory that holds flake.nix, if nix reads it from there

    @classmethod
    def parse(cls, text: str, cwd: Path) -> FlakeReference:
        """Understand `text`; relative paths are taken from `cwd`.

        Raises:
            FlakeError: there is no such directory, or no flake.nix in it, or nobody may look.
        """
        url, _, fragment = text.strip().partition("#")
        absolute, local = locate(url or ".", cwd)
        if local is not None:
            _check_directory(local)
        return cls(absolute, unquote(fragment) or None, local)

    def __str__(self) -> str:
        where = str(self.local) if self.local is not None else self.url
        return f"{where}#{self.attribute}" if self.attribute else where


def locate(text: str, cwd: Path) -> tuple[str, Path | None]:
    """Return the absolute URL for a reference without fragment, and its directory if local.

    Raises:
        FlakeError: it looks like a path, and nothing is there, or nobody may look.
    """
    try:
        absolute, local = _located(text, cwd)
        if local is not None:
            (local / "flake.nix").exists()
    except OSError as error:
        raise FlakeError(f"{text} can't be looked at: {error.strerror}.") from None
    return absolute, local


def _located(text: str, cwd: Path) -> tuple[str, Path | None]:
    scheme = _SCHEME.match(text)
    if scheme is None:
        try:
            text = str(Path(text).expanduser()) if text.startswith("~") else text
        except RuntimeError as error:
            raise FlakeError(f"{text}: {error}") from None
        path = (cwd / text).absolute()
        looks_like_path = text.startswith((".", "/", "~")) or path.exists()
        if not looks_like_path and _REGISTRY_NAME.fullmatch(text):
            return f"flake:{text}", None
        # `nix` takes DIR?dir=sub as well.
        name, _, query = text.partition("?")
        if query and not path.exists():
            path = (cwd / name).absolute()
        else:
            query = ""
        return _directory(path, query, text)
    name, _, query = text[scheme.end() :].partition("?")
    kind = scheme[0]
    if kind not in ("path:", "git+file:"):
        return text, None
    if name.startswith("//"):
        name = name[2:]
    path = cwd / name
    if not path.exists():
        path = cwd / unquote(name)
    path = path.resolve()
    if not path.exists():
        raise FlakeError(f"{text}: there is no directory {path}.")
    parameters = dict(parse_qsl(query))
    url = f"{kind}//{_quoted(path)}" if kind == "git+file:" else f"{kind}{_quoted(path)}"
    pinned = {"rev", "ref", "narHash"} & parameters.keys()
    local = None if pinned or (path / "HEAD").is_file() else path / parameters.get("dir", "")
    return url + (f"?{query}" if query else ""), local


def attribute_path(text: str) -> list[str]:
    """Split an attribute path: `packages.x86_64-linux."a.b"` has three parts.

    Raises:
        FlakeError: a quote is not closed, or a part is empty.
    """
    parts = re.findall(r'"((?:[^"\\]|\\.)*)"|([^."]+)|(\.)|(")', text)
    names: list[str] = []
    expect_name = True
    for quoted, bare, dot, stray in parts:
        if stray or bool(dot) == expect_name:
            raise FlakeError(f"#{text} is no attribute path: look at its quotes and dots.")
        if not dot:
            names.append(re.sub(r"\\(.)", r"\1", quoted) if quoted else bare)
        expect_name = bool(dot)
    if expect_name:
        raise FlakeError(f"#{text} is no attribute path: a name is missing.")
    return names


def attribute_text(names: list[str]) -> str:
    """Join an attribute path, with quotes where Nix needs them."""
    return ".".join(
        name if _IDENTIFIER.fullmatch(name) else '"' + re.sub(r'(["\\])', r"\\\1", name) + '"'
        for name in names
    )


def git_root(path: Path) -> Path | None:
    """Return the top of the git tree that holds `path`, found as nix finds it, without git."""
    for folder in (path, *path.parents):
        if (folder / ".git").exists():
            return folder
    return None


def _directory(path: Path, query: str, text: str) -> tuple[str, Path]:
    if not path.exists():
        raise FlakeError(f"There is no {path}" + (f" ({text})." if text != str(path) else "."))
    path = path.resolve()
    if path.is_file() and path.name == "flake.nix":
        path = path.parent
    root = git_root(path)
    if root is None:
        return f"path:{_quoted(path)}" + (f"?{query}" if query else ""), path / (
            dict(parse_qsl(query)).get("dir", "")
        )
    parameters = dict(parse_qsl(query))
    folder = path / parameters.pop("dir", "")
    if folder != root:
        parameters["dir"] = str(folder.relative_to(root))
    if (root / ".git/shallow").exists():  # as nix does it: it refuses such a repository otherwise
        parameters["shallow"] = "1"
    suffix = f"?{urlencode(parameters, quote_via=quote, safe=_SAFE)}" if parameters else ""
    return f"git+file://{_quoted(root)}{suffix}", folder


def _check_directory(folder: Path) -> None:
    if not folder.exists():
        raise FlakeError(f"There is no directory {folder}.")
    if not folder.is_dir():
        raise FlakeError(f"{folder} is no directory; a flake is a directory with a flake.nix.")
    if (folder / "flake.nix").exists():
        return
    message = f"{folder} is no flake: there is no flake.nix in it."
    for parent in folder.parents:
        if (parent / "flake.nix").is_file():
            raise FlakeError(
                f"{message} But {parent} has one: did you mean --nixvm-flake={parent}?"
            )
    raise FlakeError(f"{message} (`nixvm init` writes one into an empty directory.)")


def _quoted(path: Path) -> str:
    return quote(str(path), safe=_SAFE)
