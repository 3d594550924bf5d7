"""Ctrl-C and SIGTERM, taken at the end of the running step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Remembers the first signal in `requested`; a second Ctrl-C interrupts at once. Does nothing outside the main thread."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous.setdefault(number, signal.getsignal(number))
                signal.signal(number, self._take)

    def restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
