"""Small pieces of text: Nix literals, lists of names, near matches."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence


def nix_string(text: str) -> str:
    """Return `text` as a Nix string literal; nothing in it is evaluated."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${")
    return f'"{escaped}"'


def nix_list(texts: Sequence[str]) -> str:
    """Return a Nix list of strings."""
    return f"[ {' '.join(map(nix_string, texts))} ]"


def nix_value(value: object) -> str:
    """Return a plain value (from JSON) as Nix writes it."""
    if value == {}:
        return "{ }"
    return nix_string(value) if isinstance(value, str) else json.dumps(value)


def near(name: str, names: Sequence[str]) -> str:
    """End a sentence with the names that were probably meant, if any."""
    found = difflib.get_close_matches(name, names, 3, 0.6)
    return f". Did you mean {' or '.join(found)}?" if found else "."


def listed(names: Sequence[str], most: int = 20) -> str:
    """Return names for a sentence, not more than `most`."""
    shown = ", ".join(names[:most])
    return f"{shown}, … ({len(names)} in all)" if len(names) > most else shown or "none"
