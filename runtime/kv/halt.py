"""Why nothing is written to the KV cache, and when it is tried again.

A full disk, or a system short of files or memory, is tried again a minute later; a disk that fails stays left alone
until the next start. An index that is damaged and cannot be made again is tried again every minute: until then nothing
is read either.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable

from appliance.errors import StoreError
from runtime.kv import files
from runtime.kv.index_file import is_damage

_RETRY_S = 60.0
_NEVER_S = float("inf")
_log = logging.getLogger("solocard.kv")


class Halt:
    """``reason`` is "" while the store writes. Used under the store's write lock; ``reason`` may be read without."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.reason = ""
        self._clock, self._retry_s = clock, _NEVER_S
        self._lost, self._lost_s = "", 0.0  # what kept a damaged index from being made again, and when

    @property
    def final(self) -> bool:
        """Has the disk failed? Then only a restart tries again."""
        return bool(self.reason) and self._retry_s == _NEVER_S

    def holds(self) -> bool:
        """Is nothing to be written now? No longer than a minute, if the clock is set back."""
        waits = self._retry_s - _RETRY_S <= self._clock() < self._retry_s
        if not self.final and not waits:
            self.reason = ""
        return bool(self.reason)

    def stop(self, error: OSError | sqlite3.Error) -> str:
        """Nothing is written because of ``error``, or of what it goes back to; the reason."""
        if not self.final:  # a disk that failed stays left alone, whatever it says next
            passes = bool(self._lost) or files.passes(error)
            self.reason = self._lost or files.reason(error)
            self._retry_s = self._clock() + _RETRY_S if passes else _NEVER_S
            _log.warning("KV cache stops writing: %s", self.reason)
        return self.reason

    def may_mend(self, error: OSError | sqlite3.Error) -> bool:
        """Is it time to make the index again? Not on a disk that failed, nor within a minute of the last attempt."""
        if self._lost:
            return abs(self._clock() - self._lost_s) >= _RETRY_S
        return is_damage(error) and not self.final

    def not_mended(self, error: OSError | sqlite3.Error | StoreError) -> None:
        """The index is damaged and could not be made again."""
        why = str(error) if isinstance(error, StoreError) else files.reason(error)
        self._lost, self._lost_s = f"index: damaged, and it could not be made again ({why})", self._clock()
        _log.warning("KV %s", self._lost)

    def mended(self) -> None:
        """The index was made again: writing goes on."""
        self._lost = ""
        if not self.final:
            self.reason = ""
