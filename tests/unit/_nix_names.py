"""Which names a Nix file binds and never uses. nix itself finds those that nobody has bound.

This reads tokens, not the grammar: a name counts as used if it stands anywhere else in the file as
a variable could. So it misses some, and accuses none that is used.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

_NAME = r"[a-zA-Z_][a-zA-Z0-9_'-]*"
_PLAIN = re.compile(
    rf"""
    (?P<blank>\s+|\#[^\n]*|/\*.*?\*/)
    |(?P<path>(?:[a-zA-Z0-9._+-]+|~)?(?:/[a-zA-Z0-9._+-]+)+/?|<{_NAME}(?:/[^>]*)?>)
    |(?P<url>[a-zA-Z][a-zA-Z0-9+.-]*:[a-zA-Z0-9%/?:@&=+$,_.!~*'-]+)
    |(?P<name>{_NAME})
    |(?P<number>\d+(?:\.\d+)?)
    |(?P<open>\$\{{|\{{)
    |(?P<quote>''|")
    |(?P<sign>\.\.\.|//|->|\+\+|[!=<>]=|&&|\|\||.)
    """,
    re.VERBOSE | re.DOTALL,
)
# What is text in a string: all but the end of it and the beginning of `${`.
_TEXT = {
    '"': re.compile(r'(?:\\.|\$\$|[^"\\$]|\$(?!\{))*', re.DOTALL),
    "''": re.compile(r"(?:''(?:\$|'|\\.)|\$\$|'(?!')|[^'$]|\$(?!\{))*", re.DOTALL),
}


class Token(NamedTuple):
    kind: str  # name, sign, string, number, path
    text: str


def tokens(text: str) -> list[Token]:
    """Return the tokens of a file that nix can parse; what is in `${…}` counts, other text not."""
    return list(_tokens(text))


def _tokens(text: str) -> Iterator[Token]:
    at = 0
    nested: list[str] = []  # what closes: "}" of a set, or the string that `${` was in
    while at < len(text):
        found = _PLAIN.match(text, at)
        assert found is not None
        kind, word = found.lastgroup or "", found.group()
        at = found.end()
        if kind == "open":
            nested.append("}")
            yield Token("sign", "{" if word == "{" else "${")
        elif kind == "sign" and word == "}" and nested:
            yield Token("sign", "}")
            if (inside := nested.pop()) != "}":
                at = yield from _string(text, at, inside, nested)
        elif kind == "quote":
            at = yield from _string(text, at, word, nested)
        elif kind != "blank":
            yield Token("string" if kind == "url" else kind, word)


def _string(text: str, at: int, quote: str, nested: list[str]) -> Iterator[Token]:
    """Read on in a string, to its end or to the next `${`."""
    found = _TEXT[quote].match(text, at)
    assert found is not None
    at = found.end()
    if text.startswith("${", at):
        nested.append(quote)
        yield Token("sign", "${")
        return at + 2
    yield Token("string", "")
    return at + len(quote)


def unused(text: str) -> list[str]:
    """Return the names of arguments and of `let` that occur nowhere else in the file."""
    every = tokens(text)
    bound = [*_arguments(every), *_of_let(every)]
    count = Counter(
        token.text
        for before, token in zip([Token("sign", ""), *every], every, strict=False)
        # Behind a dot it is a part of something else.
        if token.kind == "name" and before.text != "."
    )
    times = Counter(bound)
    return sorted(name for name in times if count[name] <= times[name] and not name.startswith("_"))


def _arguments(every: list[Token]) -> Iterator[str]:
    """The names in `{ a, b ? c, ... }:`, with a name bound by `@`."""
    opened: list[int] = []
    for at, token in enumerate(every):
        if token.text in ("{", "${"):
            opened.append(at)
        elif token.kind == "sign" and token.text == "}" and opened:
            start = opened.pop()
            behind = [t.text for t in every[at + 1 : at + 4]]
            pattern = behind[:1] == [":"] or (behind[:1] == ["@"] and behind[2:3] == [":"])
            if every[start].text != "{" or not pattern:
                continue
            if behind[0] == "@":
                yield behind[1]
            depth = 0
            for one, before in zip(every[start + 1 : at], every[start : at - 1], strict=True):
                depth += {"{": 1, "${": 1, "(": 1, "[": 1, "}": -1, ")": -1, "]": -1}.get(
                    one.text, 0
                )
                if depth == 0 and one.kind == "name" and before.text in ("{", ","):
                    yield one.text


def _of_let(every: list[Token]) -> Iterator[str]:
    """The names that `let … in` binds, those of `inherit (x) a b;` too."""
    for at, token in enumerate(every):
        if token != Token("name", "let"):
            continue
        depth, start, inherits = 0, True, False
        for one in every[at + 1 :]:
            if depth == 0 and one == Token("name", "in"):
                break
            if one == Token("name", "let") or one.text in ("{", "${", "(", "["):
                depth += 1
            elif one == Token("name", "in") or one.text in ("}", ")", "]"):
                depth -= 1
            elif depth == 0 and one.text == ";":
                start, inherits = True, False
                continue
            elif depth == 0 and one == Token("name", "inherit") and start:
                inherits = True
            elif depth == 0 and one.kind == "name" and (start or inherits):
                yield one.text
            start = False
