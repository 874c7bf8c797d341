"""Which trees an evaluation depends on, from nix' own graph of locked inputs.

An input's content is settled if the flake's own flake.lock names it, or if its reference holds a
revision or hash. One that is a directory here is settled as long as that directory is unchanged.
Anything else nix would look up afresh next time, so nothing that depends on it is remembered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode

from pytest_nixvm.flake.fingerprint import is_fixed


@dataclass
class Dependencies:
    """What an evaluation depends on beside the flake itself."""

    local: set[str] = field(default_factory=set)  # references of local trees
    unsettled: list[str] = field(default_factory=list)  # input names: foo, foo/bar


@dataclass(frozen=True)
class _Lock:
    """A flake.lock, or what an input has instead: nothing."""

    nodes: Mapping[str, Any]
    root: str

    @classmethod
    def read(cls, path: Path) -> _Lock | None:
        try:
            data = json.loads(path.read_text())
            return cls(data["nodes"], data["root"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


def dependencies(
    graph: Mapping[str, Any], lock_file: Path, overrides: Mapping[tuple[str, ...], str]
) -> Dependencies:
    """Compare the graph with the lock file the flake brings.

    `graph` is the value of `locks` in `nix flake metadata --json` of the wrapper, `lock_file`
    the flake.lock nix read (maybe absent), `overrides` maps the path of an input to a reference.
    """
    walk = _Walk(graph["nodes"], overrides)
    top = graph["nodes"][graph["root"]]["inputs"]["target"]
    lock = _Lock.read(lock_file)
    walk.visit(top, lock, lock.root if lock else None, ())
    return walk.result


def input_names(graph: Mapping[str, Any]) -> list[str]:
    """Return the names of the flake's own inputs."""
    top = graph["nodes"][graph["root"]]["inputs"]["target"]
    return sorted(graph["nodes"][top].get("inputs", {}))


class _Walk:
    def __init__(self, nodes: Mapping[str, Any], overrides: Mapping[tuple[str, ...], str]) -> None:
        self.nodes = nodes
        self.overrides = overrides
        self.result = Dependencies()
        self._seen: set[tuple[str, int, str | None]] = set()

    def visit(
        self, key: str, lock: _Lock | None, lock_key: str | None, path: tuple[str, ...]
    ) -> None:
        place = (key, id(lock), lock_key)
        if place in self._seen:
            return
        self._seen.add(place)
        locked_inputs: Mapping[str, Any] = {}
        if lock is not None and lock_key is not None:
            locked_inputs = lock.nodes.get(lock_key, {}).get("inputs", {})
        for name, child in self.nodes[key].get("inputs", {}).items():
            if not isinstance(child, str):  # follows another input, which is visited itself
                continue
            where = (*path, name)
            entry = locked_inputs.get(name)
            if where in self.overrides:
                self._resolved(child, self.overrides[where], where)
            elif (
                lock is not None
                and isinstance(entry, str)
                and _same(lock.nodes.get(entry, {}), self.nodes[child])
            ):
                self.visit(child, lock, entry, where)
            else:
                self._resolved(child, _reference(self.nodes[child]), where)

    def _resolved(self, key: str, url: str | None, where: tuple[str, ...]) -> None:
        """Nix found this input by its reference just now."""
        lock = None
        if url is None:
            pass  # relative to the flake that names it: part of its tree
        elif url.startswith(("path:", "git+file:")):
            self.result.local.add(url)
            lock = _Lock.read(_folder(url) / "flake.lock")
        elif not is_fixed(url):
            self.result.unsettled.append("/".join(where))
        self.visit(key, lock, lock.root if lock else None, where)


def _same(locked: Mapping[str, Any], used: Mapping[str, Any]) -> bool:
    def facts(node: Mapping[str, Any], name: str) -> dict[str, Any]:
        attributes = node.get(name) or {}
        return {key: value for key, value in attributes.items() if not key.startswith("__")}

    return all(facts(locked, name) == facts(used, name) for name in ("original", "locked"))


def _reference(node: Mapping[str, Any]) -> str | None:
    """Return an input's own reference as URL, None if it is relative to its parent's tree."""
    original = dict(node.get("original") or {})
    kind = original.pop("type", "")
    if kind == "path":
        path = str(original.pop("path", ""))
        return f"path:{quote(path)}" if path.startswith("/") else None
    if kind == "git":
        url = str(original.pop("url", ""))
        base, _, query = url.partition("?")
        parameters = {**dict(parse_qsl(query)), **{k: str(v) for k, v in original.items()}}
        return f"git+{base}" + (f"?{urlencode(parameters)}" if parameters else "")
    if kind in ("github", "gitlab", "sourcehut") and "rev" in original:
        return f"{kind}:{original.get('owner')}/{original.get('repo')}/{original['rev']}"
    if "narHash" in original:
        return f"{kind}:?narHash={quote(str(original['narHash']))}"
    return f"{kind}:"


def _folder(url: str) -> Path:
    base, _, query = url.partition("?")
    text = base.removeprefix("git+file:").removeprefix("path:").removeprefix("//")
    path = Path(text) if Path(text).exists() else Path(unquote(text))
    return path / dict(parse_qsl(query)).get("dir", "")
