"""What nix could not fetch: the flake itself, or an input of it."""

from __future__ import annotations

import re

from pytest_nixvm.errors import FlakeError
from pytest_nixvm.flake.messages import Log, NixError, first_line
from pytest_nixvm.flake.subject import Subject

_NETWORK = re.compile(
    r"unable to download|[Cc]ould ?n[o']t resolve host|unable to access '|Connection timed out|"
    r"[Cc]onnection refused|Network is unreachable|Failed to connect|"
    r"program 'git' failed|Failed to fetch git repository|failed to fetch|does not have Internet",
)
_URL = re.compile(r"(?:https?|git|ssh)://[^\s'\"»]+")


def unreachable(error: NixError, log: Log, subject: Subject) -> FlakeError | None:
    """Return the error for what could not be fetched, None if it is none of that."""
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
            f"{subject.what} has an input that is not in nix's registry: {first_line(error.text)}\n"
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
    return fatal[-1] if fatal else first_line(text)


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
