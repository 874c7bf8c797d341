"""Files into the VM and out of it."""

from __future__ import annotations

from pytest_nixvm.verbs.guest import Guest


class Files(Guest):
    """Copies."""
