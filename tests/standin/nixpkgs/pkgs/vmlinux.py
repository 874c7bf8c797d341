"""vmlinux.py BZIMAGE TARGET: unpack the kernel in a bzImage, whichever way it is packed. Fails if QEMU could not start it."""

import lzma
import subprocess
import sys
import zlib
from pathlib import Path


def unpack(data: bytes) -> bytes:
    """The payload is followed by other bytes: decoders that insist on the end of the file are of no use."""
    for magic, decode in (
        (b"\xfd7zXZ\x00", lambda d: lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(d)),
        (b"\x1f\x8b\x08", lambda d: zlib.decompressobj(31).decompress(d)),
        (b"\x28\xb5\x2f\xfd", lambda d: subprocess.run(["zstd", "-dcq"], input=d, capture_output=True).stdout),
    ):
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
# The note of owner "Xen", type 18 (XEN_ELFNOTE_PHYS32_ENTRY) holds the entry point that QEMU jumps to.
if b"\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0" not in image and b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0" not in image:
    sys.exit("no PVH entry in it")
Path(sys.argv[2]).write_bytes(image)
