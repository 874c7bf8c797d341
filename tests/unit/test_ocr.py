"""Text on pictures, and what is said without tesseract."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pytest_nixvm.errors import MissingProgramError
from pytest_nixvm.guest import ocr

pytest.importorskip("PIL.Image")
pytest.importorskip("pytesseract")

needs_tesseract = pytest.mark.skipif(shutil.which("tesseract") is None, reason="needs tesseract")


@pytest.fixture(params=["bright on dark", "dark on bright"])
def picture(request, tmp_path: Path) -> Path:
    from PIL import Image, ImageDraw, ImageFont

    ink, paper = ("white", "black") if request.param == "bright on dark" else ("black", "white")
    image = Image.new("RGB", (640, 120), paper)
    font = ImageFont.load_default(24)
    ImageDraw.Draw(image).text((20, 40), "Welcome to the machine", fill=ink, font=font)
    image.save(tmp_path / "screen.png")
    return tmp_path / "screen.png"


@needs_tesseract
def test_text_is_read(picture: Path):
    assert "Welcome to the machine" in ocr.read(picture)
    assert any("Welcome to the machine" in text for text in ocr.variants(picture))


def test_tesseract_is_missing(picture: Path, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingProgramError, match=r"tesseract.*nixpkgs#tesseract"):
        ocr.read(picture)
