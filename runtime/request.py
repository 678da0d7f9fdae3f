"""One request on its way through the scheduler, and the seams to the engine and the KV store as protocols.

Two threads meet here: the scheduler's (engine and KV calls) and the event loop's (sockets). The loop makes a
:class:`Request` and may set ``cancelled``; everything that comes back is an :data:`Event` handed to ``emit``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from appliance.errors import SolocardError
from appliance.model import ModelSpec
from appliance.wire import TENANT_DEFAULT, KvStatus
from runtime.kv.job import KvHit, PutJob, PutResult, Sink
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
    @property
    def replay_tokens(self) -> int: ...
    def open(self) -> S: ...
    def close(self, seq: S) -> None: ...
    def prefill(self, seq: S, ids: Sequence[int]) -> Logits | None: ...
    def decode(self, seq: S, token: int) -> Logits: ...
    def export_block(self, seq: S, index: int) -> bytes: ...
    def export_tail(self, seq: S, logits: Logits) -> bytes: ...
    def import_block(self, seq: S, index: int, payload: memoryview) -> None: ...
    def resume(
        self, seq: S, tokens: int, *, checkpoint: bytes | None = None, tail: bytes | None = None, blocks: int
    ) -> Logits | None: ...


class KvLike(Protocol):
    """What a request needs of the KV store (runtime.kv.store says what each means)."""

    def lookup(
        self, tenant: str, ids: Sequence[int], sink: Sink, *, replay_tokens: int = 0, tails: bool = False,
        shared_tokens: int = 0,
    ) -> KvHit: ...  # fmt: skip
    def pin(
        self, tenant: str, ids: Sequence[int], shared_tokens: int = 0
    ) -> AbstractContextManager[object]: ...
    def put_all(self, jobs: Sequence[PutJob]) -> list[PutResult]: ...
    def replay_ids(self, tenant: str, names: Sequence[str]) -> Mapping[str, Sequence[int]]: ...
    def status(self) -> KvStatus: ...


class TranscriptLike(Protocol):
    """Turns tokens into text: runtime.chat.transcript in the server."""

    @property
    def stopped(self) -> bool: ...
    @property
    def reasoning_tokens(self) -> int: ...
    def push(self, token: int) -> list[Delta]: ...
    def flush(self) -> list[Delta]: ...
    def replays(self, tokens: Sequence[int]) -> Mapping[str, Sequence[int]]: ...


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer, never empty, never half a character."""

    kind: DeltaKind
    text: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request; ``hit_tokens`` of the prompt came from the KV cache.

    ``miss_reason`` says why it was not the longest usable part, empty when it was.
    """

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
    """A prompt, what to sample, and where the answer goes. ``emit`` is called on the scheduler's thread.

    ``anchor_tokens``: where the prompt's leading part ends that other prompts are likely to share (system message and
    tools); ``shared_tokens``: how much of it may be shared with every tenant. Both are multiples of 256, 0 for none.
    """

    id: str
    prompt_ids: Sequence[int]
    sampling: SamplingParams
    transcript: TranscriptLike
    emit: Callable[[Event], None]
    tenant: str = TENANT_DEFAULT
    anchor_tokens: int = 0
    shared_tokens: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)
    queued_at_s: float = 0.0  # scheduler clock
    usage: Usage | None = None  # as far as it is known, also of a request that ends early
