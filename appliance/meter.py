"""How far a long step is, told at most twice a second."""

from __future__ import annotations

import time
from collections.abc import Callable

from appliance.wire import Progress

INTERVAL_S = 0.5
Report = Callable[[Progress], None]


class Meter:
    """Counts the bytes of one step; ``tick`` may be called for every piece."""

    def __init__(self, report: Report, step: str, message: str, total_bytes: int) -> None:
        self._report, self._step, self._message = report, step, message
        self._start = self._told = time.monotonic()
        self.total_bytes, self.done_bytes = total_bytes, 0

    def tick(self, count_bytes: int) -> None:
        """``count_bytes`` more are done."""
        self.done_bytes += count_bytes
        if time.monotonic() - self._told >= INTERVAL_S:
            self._told = time.monotonic()
            self._tell(self._message)

    def finish(self, message: str) -> None:
        """The step is done, and this is what it came to."""
        self._tell(message)

    def _tell(self, message: str) -> None:
        elapsed_s = round(time.monotonic() - self._start, 3)
        self._report(Progress(self._step, message, self.done_bytes, self.total_bytes, elapsed_s))
