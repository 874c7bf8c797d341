"""What all tests need."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Take signals as a terminal would give them to us.

    Under nohup, or in the background of a script, SIGINT and SIGHUP are ignored, and so they would
    be in everything that the tests start and send them to.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
