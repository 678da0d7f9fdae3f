"""The two sides of benchmarks/llamacpp.py behind one face: prompt, step, save to a folder, restore from it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from llamacpp_library import Context, Library, Model
from numpy.typing import NDArray

Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Restored:
    """``tokens`` are back without being computed; ``reason`` says why not all of them."""

    tokens: int
    reason: str = ""


class Side(Protocol):
    """One program with one loaded model. A chat is one sequence, a place is what a restore starts from."""

    unit_tokens: int  # a restore is asked for at multiples of this

    def start(self) -> Any: ...
    def feed(self, chat: Any, ids: Sequence[int]) -> Logits:
        """Append a prompt → logits f32 [vocab] after it."""

    def step(self, chat: Any, token: int) -> Logits: ...
    def clear(self, chat: Any) -> None:
        """After a refused restore: make the chat fit for computing the prompt."""

    def close(self, chat: Any) -> None: ...
    def saver(self, folder: Path) -> Any:
        """What a save writes to; made before the clock starts."""

    def save(self, saver: Any, chat: Any, ids: Sequence[int]) -> None: ...
    def opened(self, folder: Path) -> Any:
        """What a restore reads from."""

    def restore(self, opened: Any, chat: Any, ids: Sequence[int]) -> Restored:
        """``ids``: those saved and at least one more; ``chat`` is fresh."""

    def done(self, saver_or_opened: Any) -> None: ...


class PeerSide:
    """llama.cpp: one state file per sequence, ``llama_state_seq_save_file`` and ``…_load_file``."""

    unit_tokens = 1

    def __init__(self, library: Path, gguf: Path, *, context_tokens: int, cache: str) -> None:
        self._context_tokens, self._cache = context_tokens, cache
        self.library = Library(library)
        self._model = Model(self.library, gguf)

    def start(self) -> Context:
        return Context(self._model, self._context_tokens, cache=self._cache)

    def feed(self, chat: Context, ids: Sequence[int]) -> Logits:
        return chat.decode(ids)

    def step(self, chat: Context, token: int) -> Logits:
        return chat.decode([token])

    def clear(self, chat: Context) -> None:
        chat.clear()

    def close(self, chat: Context) -> None:
        chat.close()

    def saver(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        return folder / "slot.bin"

    opened = saver

    def save(self, saver: Path, chat: Context, ids: Sequence[int]) -> None:
        chat.save(saver, ids)

    def restore(self, opened: Path, chat: Context, ids: Sequence[int]) -> Restored:
        found = chat.load(opened, len(ids))
        if found is None:
            left = f"; the sequence is left with {chat.tokens()} tokens" if chat.tokens() else ""
            return Restored(0, self.library.last_error + left)
        if found != list(ids[: len(found)]):
            return Restored(0, "other token ids in the file")  # llama-server compares them too
        return Restored(len(found))

    def done(self, saver_or_opened: Path) -> None:
        """Nothing is held open."""


class OurSide:
    """runtime.engine and runtime.kv.store, as the server uses them.

    ``exact_tail``: the state after any number of tokens, as a suspended session is stored; otherwise what every
    request stores, the blocks and the checkpoint at a multiple of 256.
    """

    def __init__(self, checkpoint: Path, folder: Path, *, context_tokens: int, exact_tail: bool) -> None:
        self._engine = self._load(checkpoint, folder, context_tokens)
        self._exact_tail = exact_tail
        self.unit_tokens = 1 if exact_tail else self._engine.spec.block_tokens
        self._identity = self._fingerprint(folder)
        self._last: Logits | None = None

    def _load(self, checkpoint: Path, folder: Path, context_tokens: int) -> Any:
        from graph_support import quick_engine

        return quick_engine(checkpoint, folder, context_tokens=context_tokens, max_sequences=2)

    def _fingerprint(self, folder: Path) -> Any:
        """F as the server makes it, from the sha256 of the objects and the graph of this model."""
        from runtime.kv.fingerprint import fingerprint

        engine = self._engine
        graphs = [hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("model.onnx")]
        objects = [path.name for path in (folder / "objects").rglob("*") if path.is_file()]
        return fingerprint(
            objects=objects, graphs=graphs, profile="full", tokenizer_sha256="", encoding=engine.spec.encoding,
            numerics=engine.spec.numerics, layout_id=engine.layout.layout_id, arithmetic=engine.backend.arithmetic,
        )  # fmt: skip

    def start(self) -> Any:
        return self._engine.open()

    def feed(self, chat: Any, ids: Sequence[int]) -> Logits:
        from runtime.schedule import prompt_calls

        for at, call in zip(range(chat.n_tokens, 1 << 30, 256), prompt_calls(ids), strict=False):
            assert at % 256 == 0, "a prompt goes on at a multiple of 256"
            self._last = self._engine.prefill(chat, call)
        assert self._last is not None
        return self._last

    def step(self, chat: Any, token: int) -> Logits:
        return self._engine.decode(chat, token)

    def clear(self, chat: Any) -> None:
        """A refused restore has left nothing behind."""

    def close(self, chat: Any) -> None:
        """Give the blocks back and fill them with what no sequence may read."""
        pages, slot = list(chat.blocks), chat.slot
        self._engine.close(chat)
        for state in self._engine.spec.states:
            pool = self._engine.pools[state.name]
            pool[pages if state.paged else slot] = 255 if pool.dtype == np.uint8 else 1e30

    def saver(self, folder: Path) -> Any:
        from runtime.kv.reclaim import Policy
        from runtime.kv.store import KvStore

        return KvStore.open(
            folder / "kv", layout=self._engine.layout, fingerprint=self._identity, master_key=bytes(range(32)),
            policy=Policy(max_bytes=1 << 36),
        )  # fmt: skip

    opened = saver

    def save(self, saver: Any, chat: Any, ids: Sequence[int]) -> None:
        from runtime.kv.record import Role
        from runtime.kv.store import PutJob, TailUnit, Unit

        engine, n = self._engine, chat.n_tokens
        blocks = {i: engine.export_block(chat, i) for i in range(n // engine.spec.block_tokens)}
        units, tail = (), None
        if self._exact_tail:
            assert self._last is not None
            tail = TailUnit(ids, engine.export_tail(chat, self._last))
        else:
            assert chat.checkpoint is not None
            units = (Unit(chat.checkpoint[0], Role.PROMPT, chat.checkpoint[1]),)
        result = saver.put(PutJob("default", ids, blocks, units, tail))
        if not result.stored:
            raise SystemExit(f"solocard: not stored: {result.reason}")

    def restore(self, opened: Any, chat: Any, ids: Sequence[int]) -> Restored:
        sink = functools.partial(self._engine.import_block, chat)
        hit = opened.lookup("default", ids, sink, tails=self._exact_tail)
        self._engine.resume(chat, hit.tokens, checkpoint=hit.checkpoint, tail=hit.tail, blocks=hit.blocks)
        return Restored(hit.tokens, hit.reason)

    def done(self, saver_or_opened: Any) -> None:
        saver_or_opened.close()


class FilledSide(OurSide):
    """Our side without a graph: a prompt's state is random bytes, on which sizes and times do not depend."""

    def _load(self, checkpoint: Path, folder: Path, context_tokens: int) -> Any:
        from appliance.model import ModelSpec, state_tensors
        from exporter.checkpoint import Checkpoint
        from runtime.engine import Engine

        config = Checkpoint.open(checkpoint).config
        states = state_tensors(config, "kv-v4")
        spec = ModelSpec("test", config, states, "dsv4-0731", "kv-v4", (), ())
        return Engine(spec, NoBackend(), context_tokens=context_tokens, max_sequences=2)

    def feed(self, chat: Any, ids: Sequence[int]) -> Logits:
        engine, rng = self._engine, np.random.default_rng(len(ids))
        blocks = len(ids) // engine.spec.block_tokens
        for index in range(blocks):
            engine.import_block(chat, index, rng.bytes(engine.layout.block_bytes))
        engine.resume(chat, len(ids), checkpoint=rng.bytes(engine.layout.checkpoint_bytes), blocks=blocks)
        self._last = np.zeros(engine.spec.config.vocab_size, np.float32)
        return self._last


class NoBackend:
    """Stands where a backend's arithmetic is asked for; runs nothing."""

    def __init__(self) -> None:
        from runtime.kv.fingerprint import Arithmetic

        self.arithmetic = Arithmetic("none", "", "", "", "", 256)
