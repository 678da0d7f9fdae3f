"""One request on its way through the scheduler, and the seams to the engine and the KV store as protocols.

Two threads meet here: the scheduler's (engine and KV calls) and the event loop's (sockets). The loop makes a
:class:`Request` and may set ``cancelled``; everything that comes back is an :data:`Event` handed to ``emit``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from appliance.errors import SolocardError
from appliance.model import ModelSpec
from appliance.wire import KvStatus
from runtime.sampler import SamplingParams

Logits = npt.NDArray[np.float32]  # [vocab]
FinishReason = Literal["stop", "length"]
DeltaKind = Literal["reasoning", "content"]


class SequenceLike(Protocol):
    """A sequence that owns a slot. ``checkpoint``: the newest (position in tokens, bytes), at a multiple of 256."""

    @property
    def n_tokens(self) -> int: ...
    @property
    def checkpoint(self) -> tuple[int, bytes] | None: ...


S = TypeVar("S", bound=SequenceLike)


class EngineLike(Protocol[S]):
    """What the scheduler needs of an engine; all calls come from one thread."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def context_tokens(self) -> int: ...
    def open(self) -> S: ...
    def close(self, seq: S) -> None: ...
    def prefill(self, seq: S, ids: Sequence[int]) -> Logits | None: ...
    def decode(self, seq: S, token: int) -> Logits: ...
    def export_block(self, seq: S, index: int) -> bytes: ...
    def restore(self, seq: S, blocks: Sequence[bytes], checkpoint: bytes) -> None: ...


class KvHitLike(Protocol):
    """A lookup's answer: ``tokens`` is a multiple of 256, 0 on a miss, and then ``reason`` says why."""

    @property
    def tokens(self) -> int: ...
    @property
    def blocks(self) -> Sequence[bytes]: ...
    @property
    def checkpoint(self) -> bytes | None: ...
    @property
    def reason(self) -> str: ...


class KvLike(Protocol):
    """What the scheduler needs of the KV store; ``put`` is durable when it returns."""

    def lookup(self, tenant: str, ids: Sequence[int]) -> KvHitLike: ...
    def put(self, tenant: str, ids: Sequence[int], block: Callable[[int], bytes], checkpoint: bytes) -> object: ...
    def status(self) -> KvStatus: ...


class TranscriptLike(Protocol):
    """Turns tokens into text: runtime.chat.transcript in the server."""

    @property
    def stopped(self) -> bool: ...
    @property
    def reasoning_tokens(self) -> int: ...
    def push(self, token: int) -> list[Delta]: ...
    def flush(self) -> list[Delta]: ...


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer, never empty, never half a character."""

    kind: DeltaKind
    text: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request; ``hit_tokens`` of the prompt came from the KV cache, ``miss_reason`` is its word."""

    prompt_tokens: int
    hit_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    miss_reason: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request that was answered."""

    reason: FinishReason
    usage: Usage


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that was not."""

    error: SolocardError


Event = Delta | Finished | Failed


@dataclass(slots=True, eq=False)
class Request:
    """A prompt, what to sample, and where the answer goes. ``emit`` is called on the scheduler's thread."""

    id: str
    prompt_ids: Sequence[int]
    sampling: SamplingParams
    transcript: TranscriptLike
    emit: Callable[[Event], None]
    tenant: str = "default"
    cancelled: threading.Event = field(default_factory=threading.Event)
    queued_at_s: float = 0.0  # scheduler clock
