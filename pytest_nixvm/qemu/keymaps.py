"""Keyboard layouts: which keys type which character.

QEMU ships its layouts as text files, `share/qemu/keymaps/{de,en-us,fr,…}`, one line a keysym:

    exclam 0x02 shift                   # X11's name, the key's number, what is held meanwhile

The number is what QMP takes as `{"type": "number"}`: the PC's scancode, plus 0x80 for the keys that
have the prefix E0. Format: `parse_keyboard_layout` in QEMU's ui/keymaps.c.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pytest_nixvm.errors import MachineError

Keys = tuple[int, ...]
"""The numbers of keys that are pressed together, in this order."""

SHIFT, CONTROL, ALTGR = 0x2A, 0x1D, 0xB8
_102ND = 0x56

# X11's names of the layouts, and what people call them, where QEMU's differ.
_ALIASES = {
    "us": "en-us",
    "en": "en-us",
    "gb": "en-gb",
    "uk": "en-gb",
    "be": "fr-be",
    "br": "pt-br",
    "ca": "fr-ca",
    "ch": "de-ch",
    "dk": "da",
    "ee": "et",
    "jp": "ja",
    "se": "sv",
    "si": "sl",
}

# --- X11's keysyms (https://www.x.org/releases/current/doc/xproto/x11protocol.html#keysym_encoding)

_NAMED = {
    "Return": "\n",
    "Tab": "\t",
    "BackSpace": "\b",
    "Escape": "\x1b",
    "space": " ",
    "exclam": "!",
    "quotedbl": '"',
    "numbersign": "#",
    "dollar": "$",
    "percent": "%",
    "ampersand": "&",
    "apostrophe": "'",
    "quoteright": "'",
    "parenleft": "(",
    "parenright": ")",
    "asterisk": "*",
    "plus": "+",
    "comma": ",",
    "minus": "-",
    "period": ".",
    "slash": "/",
    "colon": ":",
    "semicolon": ";",
    "less": "<",
    "equal": "=",
    "greater": ">",
    "question": "?",
    "at": "@",
    "bracketleft": "[",
    "backslash": "\\",
    "bracketright": "]",
    "asciicircum": "^",
    "underscore": "_",
    "grave": "`",
    "quoteleft": "`",
    "braceleft": "{",
    "bar": "|",
    "braceright": "}",
    "asciitilde": "~",
    "nobreakspace": "\xa0",
    "exclamdown": "¡",
    "cent": "¢",
    "sterling": "£",
    "currency": "¤",
    "yen": "¥",
    "brokenbar": "¦",
    "section": "§",
    "diaeresis": "¨",
    "copyright": "©",
    "ordfeminine": "ª",
    "guillemotleft": "«",
    "notsign": "¬",
    "hyphen": "\xad",
    "registered": "®",
    "macron": "¯",
    "degree": "°",
    "plusminus": "±",
    "twosuperior": "²",
    "threesuperior": "³",
    "acute": "´",
    "mu": "µ",
    "paragraph": "¶",
    "periodcentered": "·",
    "cedilla": "¸",
    "onesuperior": "¹",
    "masculine": "º",
    "guillemotright": "»",
    "onequarter": "¼",
    "onehalf": "½",
    "threequarters": "¾",
    "questiondown": "¿",
    "multiply": "×",
    "division": "÷",
    "AE": "Æ",
    "ae": "æ",
    "ETH": "Ð",
    "eth": "ð",
    "THORN": "Þ",
    "thorn": "þ",
    "ssharp": "ß",
    "Ooblique": "Ø",
    "Oslash": "Ø",
    "oslash": "ø",
    "OE": "Œ",
    "oe": "œ",
    "Aring": "Å",
    "aring": "å",
    "Uring": "Ů",
    "uring": "ů",
    "Dstroke": "Đ",
    "dstroke": "đ",
    "Hstroke": "Ħ",
    "hstroke": "ħ",
    "Lstroke": "Ł",
    "lstroke": "ł",
    "Tslash": "Ŧ",
    "tslash": "ŧ",
    "ENG": "Ŋ",
    "eng": "ŋ",
    "idotless": "ı",
    "kra": "ĸ",
    "EuroSign": "€",
    "trademark": "™",
    "endash": "–",
    "emdash": "—",
    "ellipsis": "…",
    "leftsinglequotemark": "‘",
    "rightsinglequotemark": "’",
    "singlelowquotemark": "‚",
    "leftdoublequotemark": "“",
    "rightdoublequotemark": "”",
    "doublelowquotemark": "„",
    "leftarrow": "←",
    "uparrow": "↑",
    "rightarrow": "→",
    "downarrow": "↓",
    "oneeighth": "⅛",
    "threeeighths": "⅜",
    "fiveeighths": "⅝",
    "seveneighths": "⅞",
    "numerosign": "№",
    "breve": "˘",
    "caron": "ˇ",
    "ogonek": "˛",
    "abovedot": "˙",
    "doubleacute": "˝",
    "notequal": "≠",
    "lessthanequal": "≤",
    "greaterthanequal": "≥",
    "infinity": "∞",
    "Greek_mu": "μ",
    "Greek_pi": "π",
    "Greek_PI": "Π",
    "Greek_OMEGA": "Ω",
}

# Letters of Latin-1 to Latin-4 are named by letter and accent: eacute, Ccaron, zabovedot.
_ACCENTS = {
    "grave": "\u0300",
    "acute": "\u0301",
    "circumflex": "\u0302",
    "tilde": "\u0303",
    "macron": "\u0304",
    "breve": "\u0306",
    "abovedot": "\u0307",
    "diaeresis": "\u0308",
    "abovering": "\u030a",
    "doubleacute": "\u030b",
    "caron": "\u030c",
    "cedilla": "\u0327",
    "ogonek": "\u0328",
}
_ACCENTED = re.compile(rf"([A-Za-z])({'|'.join(_ACCENTS)})")

# What a dead key gives when the space bar follows.
_ALONE = {
    "\u0300": "`",
    "\u0301": "´",
    "\u0302": "^",
    "\u0303": "~",
    "\u0308": "¨",
    "\u0327": "¸",
}

# Cyrillic_yu, …, in the order of KOI8-R, as X11 has them.
_KOI8 = (
    "yu a be tse de ie ef ghe ha i shorti ka el em en o pe ya er es te u zhe ve softsign yeru "
    "ze sha e shcha che hardsign io"
)
_CYRILLIC = dict(zip(_KOI8.split(), "юабцдефгхийклмнопярстужвьызшэщчъё", strict=True))


def character(keysym: str) -> str | None:
    """Return what a keysym types, None for the keys that type nothing, or nothing known."""
    if len(keysym) == 1:
        return keysym
    if keysym in _NAMED:
        return _NAMED[keysym]
    found = re.fullmatch(r"U([0-9A-Fa-f]{4,6})|0x0*1([0-9A-Fa-f]{6})", keysym)
    if found:
        code = int(found[1] or found[2], 16)
        return chr(code) if code < 0x110000 else None
    found = _ACCENTED.fullmatch(keysym)
    if found:
        text = unicodedata.normalize("NFC", found[1] + _ACCENTS[found[2]])
        return text if len(text) == 1 else None
    if keysym.startswith("Cyrillic_"):
        name = keysym.removeprefix("Cyrillic_")
        letter = _CYRILLIC.get(name.lower())
        return letter.upper() if letter and name.isupper() else letter
    return None


# --- layouts ---


@dataclass(frozen=True)
class Layout:
    """A keyboard layout. `name` is QEMU's, `where` its file or "built in"."""

    name: str
    where: str
    keys: Mapping[str, Keys]  # a character -> the keys that type it
    dead: Mapping[str, Keys]  # a combining accent -> the dead key that adds it

    def strokes(self, char: str) -> tuple[Keys, ...] | None:
        """Return what to press for a character, one after the other; None if it can't be typed.

        What has no key of its own may have a dead key and a letter: é is ´ and e.
        """
        char = "\n" if char == "\r" else char
        if char in self.keys:
            return (self.keys[char],)
        base, accent = " ", next((a for a, alone in _ALONE.items() if alone == char), "")
        if not accent:
            parts = unicodedata.normalize("NFD", char)
            base, accent = parts[:-1], parts[-1]
        if base in self.keys and accent in self.dead:
            return (self.dead[accent], self.keys[base])
        return None


def directories(executable: Path | None) -> tuple[Path, ...]:
    """Return where the keymaps of that QEMU binary are, if they are there, the likeliest first."""
    places = [Path("/usr/share/qemu/keymaps"), Path("/usr/local/share/qemu/keymaps")]
    if executable is not None:
        # Both in the Nix store and in /usr the data is beside bin.
        places.insert(0, executable.parent.parent / "share" / "qemu" / "keymaps")
    return tuple(place for place in dict.fromkeys(places) if place.is_dir())


def find_layout(name: str, places: Iterable[Path]) -> Layout:
    """Return the layout of that name, QEMU's ("de", "en-us", "fr-ch") or X11's ("us", "gb").

    Where there are no keymap files, "us" is built in. Raises `MachineError` for a name that no
    file has, with those that are there.
    """
    return _find(name, tuple(places))


@lru_cache
def _find(name: str, places: tuple[Path, ...]) -> Layout:
    wanted = _ALIASES.get(name.lower(), name.lower())
    # No path: a layout is a file in one of these directories, nothing else.
    if re.fullmatch(r"[a-z0-9-]+", wanted):
        for place in places:
            if (place / wanted).is_file():
                return _read(place / wanted)
    if wanted == "en-us":
        return _BUILT_IN
    have = ", ".join(available(places))
    raise MachineError(
        f"QEMU has no keyboard layout {name!r}; it has {have}."
        if places
        else f"There is no keyboard layout {name!r}: this QEMU comes without its keymap files "
        "(share/qemu/keymaps), so only 'us' is known."
    )


def available(places: Iterable[Path]) -> list[str]:
    """Return the names of the layouts."""
    names = {entry.name for place in places for entry in place.iterdir() if entry.is_file()}
    # Not layouts but parts of them, in QEMU before 3.0.
    return sorted(names - {"common", "modifiers"} | {"en-us"})


def layouts_with(char: str, places: Iterable[Path]) -> list[str]:
    """Return the names of the layouts that have a character."""
    places = tuple(places)
    return [name for name in available(places) if _find(name, places).strokes(char)]


def _read(path: Path) -> Layout:
    keys: dict[str, Keys] = {}
    dead: dict[str, Keys] = {}
    for keysym, number, flags in _lines(path, set()):
        # The number pad depends on Num Lock; `inhibit` hides a key from the layout.
        if keysym.startswith("KP_") or flags & {"numlock", "inhibit"}:
            continue
        held = (
            *((SHIFT,) if "shift" in flags else ()),
            *((ALTGR,) if "altgr" in flags else ()),
            *((CONTROL,) if "ctrl" in flags else ()),
        )
        if keysym.startswith("dead_"):
            accent = _ACCENTS.get(keysym.removeprefix("dead_"))
            _keep(dead, accent, (*held, number))
            continue
        char = character(keysym)
        _keep(keys, char, (*held, number))
        if "addupper" in flags and char is not None:
            _keep(keys, char.upper(), (SHIFT, number))
    return Layout(path.name, str(path), keys, dead)


def _keep(table: dict[str, Keys], char: str | None, keys: Keys) -> None:
    """Keep the way that holds the fewest keys; of two, the first.

    The key between Shift and Z is the last resort: American keyboards, and boot menus, lack it.
    """

    def cost(keys: Keys) -> tuple[bool, int]:
        return _102ND in keys, len(keys)

    if char and (char not in table or cost(keys) < cost(table[char])):
        table[char] = keys


def _lines(path: Path, seen: set[Path]) -> Iterable[tuple[str, int, set[str]]]:
    seen.add(path)
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if words[0] == "include" and len(words) > 1:
            other = path.parent / words[1]
            if other not in seen and other.is_file():
                yield from _lines(other, seen)
        elif len(words) > 1 and re.fullmatch(r"(?i)0x[0-9a-f]+|\d+", words[1]):
            yield words[0], int(words[1], 0), set(words[2:])


def _built_in() -> Layout:
    keys: dict[str, Keys] = {"\x1b": (0x01,), "\b": (0x0E,), "\t": (0x0F,), "\n": (0x1C,)}
    rows = (
        (0x02, "1234567890-=", "!@#$%^&*()_+"),
        (0x10, "qwertyuiop[]", "QWERTYUIOP{}"),
        (0x1E, "asdfghjkl;'`", 'ASDFGHJKL:"~'),
        (0x2B, "\\zxcvbnm,./", "|ZXCVBNM<>?"),
    )
    for first, plain, shifted in rows:
        for number, (lower, upper) in enumerate(zip(plain, shifted, strict=True), first):
            keys[lower], keys[upper] = (number,), (SHIFT, number)
    keys[" "] = (0x39,)
    return Layout("en-us", "built in", keys, {})


_BUILT_IN = _built_in()
