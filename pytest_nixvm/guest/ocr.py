"""Text on a picture of the screen, by tesseract (the extra `ocr`).

What tesseract was trained on is black print on white paper at 300 dpi; a screen is bright on dark,
at 72. So each picture is read three times, as in the NixOS test driver: as it is, and enlarged, as
it is and negated. No one of them is the best on every screen.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from pytest_nixvm.errors import MachineError, MissingProgramError

if TYPE_CHECKING:
    from PIL.Image import Image

TIMEOUT = 60.0
"""Seconds that tesseract may take for one reading."""

_SCALE = 3
_SPARSE = "--psm 11"  # text anywhere, in no order: a screen is no page


def read(picture: Path) -> str:
    """Return the text on a picture, by the reading that suits it: dark on bright.

    Raises `MissingProgramError` without the extra or without tesseract, `MachineError` if it fails.
    """
    image = _open(picture)
    return _tesseract(_prepared(image, negate=_is_dark(image)))


def variants(picture: Path) -> Iterator[str]:
    """Yield the text of each reading, the likeliest first. Raises as `read` does."""
    image = _open(picture)
    dark = _is_dark(image)
    yield _tesseract(_prepared(image, negate=dark))
    yield _tesseract(image)
    yield _tesseract(_prepared(image, negate=not dark))


def need() -> ModuleType:
    """Return pytesseract. Raises `MissingProgramError` if it, Pillow or tesseract is missing."""
    try:
        import PIL.Image  # noqa: F401 - only whether it is there
        import pytesseract
    except ImportError as error:
        raise MissingProgramError(
            f"Reading text from the screen needs the Python package {error.name}: "
            "pip install 'pytest-nixvm[ocr]'."
        ) from None
    if shutil.which(pytesseract.pytesseract.tesseract_cmd) is None:
        raise MissingProgramError(
            "Reading text from the screen needs the program tesseract, which is not on PATH: "
            "`nix shell nixpkgs#tesseract` on NixOS, `apt-get install tesseract-ocr` on Debian."
        )
    module: ModuleType = pytesseract
    return module


def _open(picture: Path) -> Image:
    need()
    import PIL.Image

    with PIL.Image.open(picture) as opened:
        return opened.convert("L")


def _is_dark(image: Image) -> bool:
    histogram = image.histogram()
    return sum(histogram[:128]) > sum(histogram[128:])


def _prepared(image: Image, *, negate: bool) -> Image:
    import PIL.Image
    import PIL.ImageOps

    size = (image.width * _SCALE, image.height * _SCALE)
    # The colours of a console are of many shades of grey; its letters are all meant to be read.
    large = PIL.ImageOps.autocontrast(image, cutoff=0.5).resize(size, PIL.Image.Resampling.BICUBIC)
    return PIL.ImageOps.invert(large) if negate else large


def _tesseract(image: Image) -> str:
    pytesseract = need()
    try:
        return str(pytesseract.image_to_string(image, config=_SPARSE, timeout=TIMEOUT))
    except pytesseract.TesseractError as error:
        raise MachineError(f"tesseract failed: {error}") from None
    except RuntimeError:  # pytesseract's only sign of a timeout
        raise MachineError(f"tesseract did not end within {TIMEOUT:g} s.") from None
