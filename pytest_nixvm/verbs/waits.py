"""Waits: for units, files, ports, sockets, texts and events."""

from __future__ import annotations

from pytest_nixvm.verbs.guest import Guest


class Waits(Guest):
    """The waits."""
