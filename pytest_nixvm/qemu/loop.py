"""The one I/O thread: asyncio for QMP and the agent below, a synchronous face above."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class IoThread:
    """Runs an asyncio event loop in a daemon thread.

    io = IoThread()
    reply = io.run(client.execute("query-status"), timeout=5)
    io.close()
    """

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(_report)
        self._thread = threading.Thread(target=self._main, name="nixvm-io", daemon=True)
        self._thread.start()

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            if tasks:  # without one, gather looks for a loop where somebody may have set another
                self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self.loop.close()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float) -> T:
        """Run `coroutine` on the loop and return its result.

        After `timeout` seconds it is cancelled and `TimeoutError` raised. The calling thread's own
        interruption (Ctrl-C) cancels it as well.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("IoThread.run called from the I/O thread itself")
        if self.loop.is_closed():
            coroutine.close()  # or Python would warn that nobody awaited it
            raise RuntimeError("IoThread.run called after its end")
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, timeout), self.loop)
        try:
            # The loop enforces the time; the margin is for a loop that is busy or dead.
            return future.result(timeout + 5)
        except concurrent.futures.CancelledError as error:
            raise TimeoutError from error
        except BaseException:
            future.cancel()
            raise

    def call(self, function: Callable[[], object]) -> None:
        """Call `function` on the loop soon, without waiting for it."""
        self.loop.call_soon_threadsafe(function)

    def close(self) -> None:
        """Cancel what is under way and end the thread. May be called twice."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(5)


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # A connection whose end nobody waited for is how a VM ends; everything else is a bug.
    if not isinstance(context.get("exception"), EOFError | ConnectionError):
        loop.default_exception_handler(context)
