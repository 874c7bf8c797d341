"""The session's SSH key: fresh each time, never in the Nix store."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.hazmat.primitives.serialization import PublicFormat as Public

COMMENT = "pytest-nixvm"


@dataclass(frozen=True)
class KeyPair:
    """An Ed25519 key pair: the private half in a file, the public half as a line.

    key = KeyPair.generate(directory)         # a directory that only we can enter
    agent.add_ssh_key("root", key.public_line)
    """

    private: Path
    public_line: str

    @classmethod
    def generate(cls, directory: Path, name: str = "id_ed25519") -> KeyPair:
        """Make a pair and write its private half, in OpenSSH's format, to `directory/name`.

        The file must not exist yet (`FileExistsError`) and is never readable for others, not even
        for a moment. Raises `OSError`.
        """
        key = Ed25519PrivateKey.generate()
        path = directory / name
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor has no path
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        line = key.public_key().public_bytes(Encoding.OpenSSH, Public.OpenSSH).decode()
        return cls(path, f"{line} {COMMENT}")
