"""The seam between engine and graph: a backend runs one call of the graph and keeps no state of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy.typing as npt

from runtime.kv.fingerprint import Arithmetic

Arrays = Mapping[str, npt.NDArray[Any]]


class Backend(Protocol):
    """``run`` takes every graph input by name and answers every output; arrays may be read, never kept."""

    @property
    def description(self) -> str:
        """For people: what runs the graph, e.g. "onnxruntime 1.31.1 on CPU, function bodies, 2 threads"."""
        ...

    @property
    def device(self) -> str:
        """ "CPU" or the card's name."""
        ...

    @property
    def arithmetic(self) -> Arithmetic:
        """What the bits of an answer depend on besides the bundle; part of the KV fingerprint."""
        ...

    def run(self, feeds: Arrays) -> Arrays: ...
