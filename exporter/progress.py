"""Progress of anything long on stderr: done, share, rate and time left, at most twice a second."""

from __future__ import annotations

import sys
import time


class Progress:
    """Counts ``unit`` (bytes, tokens, weights …) up to ``total``; shows one line each half second and at the end."""

    def __init__(self, label: str, total: int, unit: str = "bytes") -> None:
        self._label, self._unit = label, unit
        self._total, self._done, self._resumed = max(total, 1), 0, 0
        self._started_s, self._shown_s = time.monotonic(), 0.0

    def resume(self, amount: int) -> None:
        """``amount`` was done by an earlier run: part of the share, not of the rate."""
        self._done += amount
        self._resumed += amount

    def add(self, what: str, amount: int) -> None:
        """``amount`` more is done, last of all ``what``."""
        self._done += amount
        now_s = time.monotonic()
        if now_s - self._shown_s < 0.5 and self._done < self._total:
            return
        self._shown_s = now_s
        rate = (self._done - self._resumed) / max(now_s - self._started_s, 1e-6)
        left_s = (self._total - self._done) / max(rate, 1e-9)
        share = 100 * self._done / self._total
        done = f"{self._label}: {self._done:,} of {self._total:,} {self._unit} ({share:.0f} %)"
        pace = f"{_rate(rate, self._unit)}, {_duration(left_s)} left"
        print(f"{done}, {pace}, {what}", file=sys.stderr, flush=True)


def _rate(per_s: float, unit: str) -> str:
    if unit == "bytes":
        return f"{per_s / 1e6:.0f} MB/s"
    return f"{per_s:,.1f} {unit}/s" if per_s < 1e5 else f"{per_s / 1e6:,.1f} million {unit}/s"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 7200 else f"{whole / 3600:.1f} h"
