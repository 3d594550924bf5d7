"""Ctrl-C and SIGTERM, taken at the end of the running step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Remembers the first signal in `requested`; a second Ctrl-C interrupts at once. Does nothing outside the main thread.

    `restore` brings back the handlers there were when this was made, for Lightning sets some of its own in between.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before = {number: signal.getsignal(number) for number in SIGNALS}

    def install(self) -> None:
        self._set(dict.fromkeys(SIGNALS, self._take))

    def restore(self) -> None:
        self._set(self._before)

    def _set(self, handlers: Mapping[signal.Signals, Any]) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
