"""How a machine is to be built, in the forms that nix, the memory and the cache's roots need."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from pytest_nixvm.errors import NotAVirtualMachineError
from pytest_nixvm.flake.build import Override, Secret
from pytest_nixvm.flake.places import Cache
from pytest_nixvm.flake.reference import attribute_text
from pytest_nixvm.flake.words import nix_list, nix_string, nix_value

# Results that differ in a revision or in what they carry are rooted side by side, or sessions that
# run at the same time would let each other's go. So many of them stay, for each machine.
_KEEP = 8

_REVISION = re.compile(r"/[0-9a-f]{40}(?=$|\?)")


@dataclass(frozen=True)
class Variant:
    """What is asked of a machine's build; the default is the usual VM."""

    freezable: bool = False
    boot_loader: bool = False
    carries: tuple[Path, ...] = ()
    secrets: tuple[Secret, ...] = ()
    switching: bool = False

    @property
    def words(self) -> list[str]:
        """What tells it from the usual one, for names of logs and questions."""
        return [
            *(["freezable"] if self.freezable else []),
            *(["boot-loader"] if self.boot_loader else []),
            *(["carrying"] if self.carries else []),
            *(["switching"] if self.switching else []),
            *(["secrets"] if self.secrets else []),
        ]

    def question(self, attribute: str) -> str:
        """Return the name under which its plan is remembered."""
        details = [
            *map(str, self.carries),
            *(json.dumps(_secret(secret), sort_keys=True) for secret in self.secrets),
        ]
        return " ".join([*self.words, "plan", attribute, *details])

    def expression(self, attribute: Sequence[str]) -> str:
        """Return the question as modules/target.nix takes it."""
        secrets = nix_string(as_json(self.secrets))
        return (
            f"this.plan {{ freezable = {nix_value(self.freezable)}; "
            f"bootLoader = {nix_value(self.boot_loader)}; "
            f"carries = {nix_list([str(path) for path in self.carries])}; "
            f"switching = {nix_value(self.switching)}; "
            f"secrets = builtins.fromJSON {secrets}; }} {nix_list(attribute)}"
        )

    def check(self, plan: Mapping[str, Any], what: str) -> None:
        """Raise `NotAVirtualMachineError` where `what` can't be built so."""
        if plan.get("noVm"):
            raise NotAVirtualMachineError(
                f"{what} can't be built as a VM: it has no config.system.build.vm."
            )
        if "derivation" not in plan:
            raise NotAVirtualMachineError(
                f"{what} is neither a NixOS configuration nor a derivation."
            )
        program = plan.get("mainProgram")
        if program is not None and not re.fullmatch(r"run-.*-vm", program):
            raise NotAVirtualMachineError(
                f"{what} is no VM: its program is bin/{program}, a VM's is bin/run-NAME-vm."
            )

    def root(
        self,
        cache: Cache,
        name: str,
        url: str,
        attribute: str,
        overrides: object,
        what: str | None = None,
    ) -> Path:
        """Where the result is rooted: one place a machine, so that old results are let go.

        The variants have a place each, or each build would let another's result go; `what` is
        part of the machine's that has a place of its own. Revisions, and builds that carry
        something, get one each (see `let_go`).
        """
        place, revision = _split(url)
        parts: list[object] = [place, attribute, overrides, *self.words]
        if what:
            parts.append(what)
        varying = [revision, *map(str, self.carries), *map(_text, self.secrets)]
        safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)
        root = f"{safe}-{_digest(parts)}"
        return cache.roots / (f"{root}.{_digest(varying)}" if any(varying) else root)


class RealSystem(Variant):
    """The system of the real machine is asked for, with nothing of ours in it."""

    @property
    def words(self) -> list[str]:
        """What tells it from a VM, for names of logs and questions."""
        return ["real"]

    def expression(self, attribute: Sequence[str]) -> str:
        """Return the question as modules/target.nix takes it."""
        return f"this.real {nix_list(attribute)}"

    def check(self, plan: Mapping[str, Any], what: str) -> None:
        """Take whatever was built: it is no VM."""


def let_go(root: Path) -> None:
    """Drop the oldest of the roots that stand beside this one."""
    stem, dot, last = root.name.rpartition(".")
    if not dot or not re.fullmatch(r"[0-9a-f]{12}(-\w+)?", last):
        return
    found: list[tuple[float, Path]] = []
    for path in root.parent.glob(f"{stem.replace('[', '?')}.*"):
        try:
            found.append((path.lstat().st_mtime, path))
        except OSError:  # another session was quicker
            continue
    for _, path in sorted(found, reverse=True)[_KEEP:]:
        if path != root:
            path.unlink(missing_ok=True)


def as_json(secrets: Sequence[Secret]) -> str:
    """Return secrets as modules/secrets.nix takes them."""
    return json.dumps([_secret(secret) for secret in secrets])


def secrets_of(found: Sequence[Mapping[str, Any]]) -> tuple[Secret, ...]:
    """Return what modules/secrets.nix found."""
    return tuple(
        Secret(
            name=one["name"],
            path=one["path"],
            owner=one.get("owner") or "root",
            group=one.get("group") or "root",
            mode=one.get("mode") or "0400",
            provider=one.get("provider") or "hook",
            restart_units=tuple(one.get("restartUnits") or ()),
            reload_units=tuple(one.get("reloadUnits") or ()),
        )
        for one in found
    )


def overrides_of(plan: Mapping[str, Any]) -> tuple[Override, ...]:
    """Return what a plan changes in the configuration."""
    return tuple(
        Override(
            attribute_text(o["option"]),
            o["shown"] if "shown" in o else nix_value(o["value"]),
            o["reason"],
        )
        for o in plan["overrides"]
    )


def _secret(secret: Secret) -> dict[str, object]:
    return {
        "name": secret.name,
        "path": secret.path,
        "owner": secret.owner,
        "group": secret.group,
        "mode": secret.mode,
        "provider": secret.provider,
        "restartUnits": list(secret.restart_units),
        "reloadUnits": list(secret.reload_units),
    }


def _text(secret: Secret) -> str:
    return json.dumps(_secret(secret), sort_keys=True)


def _split(url: str) -> tuple[str, str]:
    """Take a reference apart: the flake, and its revision."""
    base, _, query = url.partition("?")
    parameters = dict(parse_qsl(query))
    revision = parameters.pop("rev", "")
    found = (
        _REVISION.search(base) if base.startswith(("github:", "gitlab:", "sourcehut:")) else None
    )
    if found:
        base, revision = base[: found.start()], found[0]
    if not revision:
        return url, ""
    return f"{base}?{urlencode({**parameters, 'rev': 'any'})}", revision


def _digest(parts: object) -> str:
    about = json.dumps(parts)
    return hashlib.blake2b(about.encode(errors="surrogateescape"), digest_size=6).hexdigest()
