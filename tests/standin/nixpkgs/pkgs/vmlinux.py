"""vmlinux.py BZIMAGE TARGET: unpack the kernel in a bzImage, whichever way it is packed.

Fails if there is none, or one that QEMU could not start.
"""

import lzma
import subprocess
import sys
import zlib
from pathlib import Path


def xz(data: bytes) -> bytes:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(data)


def gzip(data: bytes) -> bytes:
    return zlib.decompressobj(31).decompress(data)


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-dcq"], input=data, capture_output=True).stdout


DECODERS = {b"\xfd7zXZ\x00": xz, b"\x1f\x8b\x08": gzip, b"\x28\xb5\x2f\xfd": zstd}


def unpack(data: bytes) -> bytes:
    """The payload is followed by other bytes: the decoders must not insist on the end."""
    for magic, decode in DECODERS.items():
        start = data.find(magic)
        while start >= 0:
            try:
                image = decode(data[start:])
            except (lzma.LZMAError, zlib.error):
                image = b""
            if image.startswith(b"\x7fELF"):
                return image
            start = data.find(magic, start + 1)
    sys.exit("no kernel found in it")


image = unpack(Path(sys.argv[1]).read_bytes())
# QEMU jumps to the entry point in the note "Xen", type 18 (XEN_ELFNOTE_PHYS32_ENTRY).
if not any(size + b"\0\0\0\x12\0\0\0Xen\0" in image for size in (b"\x04", b"\x08")):
    sys.exit("no PVH entry in it")
Path(sys.argv[2]).write_bytes(image)
