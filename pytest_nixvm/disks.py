"""The disks of VMs that a person uses: kept from one `nixvm run` to the next.

One for each machine of a flake, in the user's state. What is inside has no other copy, so nothing
here removes a disk unless it is asked to.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import struct
from pathlib import Path
from types import TracebackType

import platformdirs
from filelock import FileLock, Timeout

from pytest_nixvm.errors import SettingsError
from pytest_nixvm.running import holder

_QCOW2 = b"QFI\xfb"


class KeptDisk:
    """The disk of one machine, held by us until it is released.

        with KeptDisk("dev-vm", "git+file:///home/me/config#nixosConfigurations.dev-vm") as disk:
            disk.environment()          # for the start script, which makes it where there is none
            disk.is_made()              # it has

    `identity` is what makes it that flake's machine: two flakes with a machine of the same name
    share no disk. Raises `SettingsError` if another process holds it, or it can't be kept.
    """

    def __init__(
        self, name: str, identity: str, base: Path | None = None, *, fresh: bool = False
    ) -> None:
        base = base or platformdirs.user_state_path("pytest-nixvm") / "disks"
        safe = re.sub(r"[^A-Za-z0-9._@-]", "_", name)
        digest = hashlib.blake2b(identity.encode(), digest_size=5).hexdigest()
        self.name = name
        self._fresh = fresh
        self.path = base / f"{safe}-{digest}.qcow2"
        self._efi_vars = base / f"{safe}-{digest}.efi-vars.fd"
        self.root = base / f"{safe}-{digest}.image"
        """Where the image that it was made over is rooted, so that nix does not collect that."""
        # While it is there, the disk may be half made.
        self._unmade = base / f"{safe}-{digest}.new"
        self._lock = FileLock(base / f"{safe}-{digest}.lock", mode=0o600, thread_local=False)

    def __enter__(self) -> KeptDisk:
        base = self.path.parent
        if "," in str(base):
            # The scripts put it unescaped into `-drive file=…,…`.
            raise SettingsError(
                f"{base}, where disks are kept, has a comma in its path, which ends a value on "
                "QEMU's command line. Set XDG_STATE_HOME to a directory without one."
            )
        try:
            base.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise SettingsError(self._in_use()) from None
        except OSError as error:
            raise self._unusable(error) from None
        try:
            self._prepare()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()

    @property
    def exists(self) -> bool:
        """Whether there is one from an earlier run."""
        return self.path.exists()

    def environment(self) -> dict[str, str]:
        """Return what tells the start script to use it."""
        return {"NIX_DISK_IMAGE": str(self.path), "NIX_EFI_VARS": str(self._efi_vars)}

    def remove(self) -> bool:
        """Remove the disk and what belongs to it; return whether there was one."""
        found = self.exists
        try:
            further = self.path.parent.glob(f"{glob.escape(self.path.name)}-*")  # an OVA's
            for path in (self.path, *further, self._efi_vars, self._unmade):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise self._unusable(error) from None
        return found

    def begin(self) -> None:
        """Note that the start script is about to make it, where there is none."""
        try:
            if not self.exists:
                self._unmade.touch(mode=0o600)
        except OSError as error:
            raise self._unusable(error) from None

    def is_made(self) -> None:
        """Note that the start script has done its work: QEMU runs."""
        self._unmade.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what is in it may be secret
            self.path.chmod(0o600)

    def _prepare(self) -> None:
        if self._unmade.exists():  # whoever made it was killed
            self.remove()
        below = backing_file(self.path)
        if below is not None and not below.exists() and not self._fresh:
            raise SettingsError(
                f"{self.name}'s disk, {self.path}, was made over {below}, which is no longer in "
                "the store. --fresh begins with a new disk."
            )

    def _in_use(self) -> str:
        text = f"{self.name}'s disk, {self.path}, is in use"
        running = holder(self.path)
        if running is None:
            return f"{text} by another process."
        return (
            f"{text}: {running.name} is run by process {running.pid}. `nixvm ssh {running.name}` "
            "logs in there."
        )

    def _unusable(self, error: OSError) -> SettingsError:
        return SettingsError(
            f"{self.name}'s disk can't be kept in {self.path.parent}: {error.strerror}."
        )


def backing_file(disk: Path) -> Path | None:
    """Return what a qcow2 disk was made over, None if it stands alone or is no qcow2.

    The header is in QEMU's docs/interop/qcow2.txt.
    """
    try:
        with disk.open("rb") as file:
            head = file.read(20)
            if len(head) < 20 or not head.startswith(_QCOW2):
                return None
            _, _, offset, size = struct.unpack(">IIQI", head)
            if not offset or size > 1023:
                return None
            file.seek(offset)
            name = os.fsdecode(file.read(size))
    except OSError:
        return None
    if name.startswith("json:"):  # a disk in an OVA: the file that it is in
        name = _file_in(name.removeprefix("json:"))
    return disk.parent / name if name and ":" not in name else None


def virtual_size(disk: Path) -> int | None:
    """Return how large the guest finds a qcow2 disk, in bytes, None if it is no qcow2."""
    try:
        with disk.open("rb") as file:
            head = file.read(32)
    except OSError:
        return None
    return struct.unpack(">Q", head[24:])[0] if len(head) == 32 and head[:4] == _QCOW2 else None


def _file_in(text: str) -> str:
    try:
        node = json.loads(text)
        while isinstance(node["file"], dict):
            node = node["file"]
            if "filename" in node:
                return str(node["filename"])
    except (ValueError, KeyError, TypeError):
        pass
    return ""
