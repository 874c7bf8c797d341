"""The VM's screen and keyboard."""

from __future__ import annotations

from pathlib import Path

from pytest_nixvm.verbs.guest import Guest


class Screen(Guest):
    """The screen."""

    def screenshot(self, filename: str | Path) -> Path:
        """Save the screen as PNG; a relative name is below the machine's output directory.

        Raises `QmpError` if the machine has no display device.
        """
        path = self.output / filename
        if path.suffix != ".png":
            path = path.with_name(path.name + ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        return self.qemu.screenshot(path)
