"""Where the flake side keeps things: the cache, its locks, the session's logs."""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from pytest_nixvm.errors import BuildError, SettingsError
from pytest_nixvm.progress import Progress

Writer = Callable[[str], None]


class Cache:
    """A directory that outlives the session, private to the user.

    `evaluations` are records of what was evaluated, `roots` keep results from being collected,
    `locks` let one session do what several want. `script` keeps a program.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.evaluations = self.directory / "evaluations"
        self.roots = self.directory / "roots"
        self._scripts = self.directory / "scripts"
        self._locks = self.directory / "locks"

    def prepare(self) -> None:
        """Make the directories.

        Raises:
            SettingsError: they can't be made or written.
        """
        for path in (self.evaluations, self.roots, self._locks):
            try:
                path.mkdir(parents=True, exist_ok=True, mode=0o700)
                with _probe(path):
                    pass
            except OSError as error:
                raise self.unusable(error) from error

    def script(self, name: str, text: str) -> Path:
        """Return a program with this text, at a place that no other text has: .../bin/NAME.

        Raises:
            SettingsError: it can't be written.
        """
        digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=12).hexdigest()
        path = self._scripts / digest / "bin" / name
        try:
            if path.exists():
                return path
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, errors="surrogateescape",
                                             encoding="utf-8", delete=False) as file:  # fmt: skip
                file.write(text)
            made = Path(file.name)
            made.chmod(0o700)
            made.replace(path)
        except OSError as error:
            raise self.unusable(error) from error
        return path

    def unusable(self, error: OSError) -> SettingsError:
        """Return the error for a cache that can't be written."""
        return SettingsError(
            f"The cache directory {self.directory} can't be written: {error.strerror}. "
            "Make room there or name another: --nixvm-cache=DIR."
        )

    @contextlib.contextmanager
    def lock(self, name: str, progress: Progress, *, timeout: float) -> Iterator[None]:
        """Hold the lock `name`; it falls when we end, however we end.

        Raises:
            BuildError: another session has held it for `timeout` seconds.
        """
        lock = FileLock(self._locks / f"{name}.lock")
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                step = progress.step("Waiting for another session that does the same")
                try:
                    lock.acquire(timeout=timeout, poll_interval=0.1)
                except BaseException:
                    step.fail()
                    raise
                step.finish()
        except Timeout:
            raise BuildError(
                f"Another session has worked on the same machine for {timeout:g} s and still does "
                f"(it holds {lock.lock_file})."
            ) from None
        except OSError as error:
            raise self.unusable(error) from error
        try:
            yield
        finally:
            lock.release()


@contextlib.contextmanager
def log_file(directory: Path | None, name: str) -> Iterator[tuple[Writer | None, Path | None]]:
    """Yield a function that writes lines to NAME.log, and that file; it is made on first use."""
    if directory is None:
        yield None, None
        return
    path = directory / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.log"
    with contextlib.ExitStack() as stack:
        opened: list[IO[str]] = []

        def write(line: str) -> None:
            try:
                if not opened:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    opened.append(stack.enter_context(path.open("w", encoding="utf-8")))
                opened[0].write(line + "\n")
                opened[0].flush()
            except OSError as error:
                why = f"The log {path} can't be written: {error.strerror}."
                raise SettingsError(why) from error

        yield write, path


@contextlib.contextmanager
def _probe(folder: Path) -> Iterator[None]:
    """Make a file and remove it: permission bits don't tell root of a read-only file system."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-"):
        yield
