"""The bundle's tokenizer.json, split in two so that user text can never become a control token.

Two tokenizers are made from the same file. Text goes through one whose added tokens, and every vocabulary entry or
merge that spells one of them, were taken out before it was built: it has no way to produce such an id. Control tokens
come only from :class:`Control` segments, by name, and only the chat template makes those. Ids back to text go through
the byte table of byte-level BPE, so that half a UTF-8 character is held back rather than guessed.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import BundleError, EngineError

MAX_TOKENIZER_BYTES = 64 << 20
_BUILDING = "take the tokenizer.json that came with the checkpoint"


@dataclass(frozen=True, slots=True)
class Control:
    """One control token of a prompt, by its literal, e.g. ``<｜User｜>``."""

    literal: str


@dataclass(frozen=True, slots=True)
class Sampled:
    """Ids that stand in a prompt exactly as they were once sampled; never made from what a client sent."""

    ids: tuple[int, ...]


Segment = str | Control | Sampled


def _byte_alphabet() -> dict[str, int]:
    """Character → byte of byte-level BPE: printable Latin-1 stands for itself, the rest follows from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTES = _byte_alphabet()


def _piece_bytes(piece: str) -> bytes:
    return b"".join(bytes((_BYTES[c],)) if c in _BYTES else c.encode() for c in piece)


class Tokenizer:
    """Prompt segments → ids, ids → text. Thread-safe; nothing here reaches the network."""

    def __init__(self, raw: dict[str, Any], source: str) -> None:
        """``raw`` is the parsed tokenizer.json; raises BundleError naming ``source``."""
        os.environ["HF_HUB_OFFLINE"] = "1"  # the library must not even look for a hub
        from tokenizers import Tokenizer as Backend

        added = _added_tokens(raw, source)
        _check_byte_level(raw, source)
        self._ids = {str(token["content"]): int(token["id"]) for token in added}
        self._literals = {number: literal for literal, number in self._ids.items()}
        self._special = {int(token["id"]) for token in added if token.get("special")}
        text_only = _without_control(raw, set(self._ids))
        vocab: dict[str, int] = text_only["model"]["vocab"]
        self._bytes = {number: _piece_bytes(piece) for piece, number in vocab.items()}
        self._longest_bytes = max(1, *(len(piece) for piece in self._bytes.values()))
        clash = self._literals.keys() & self._bytes.keys()
        if clash:
            raise BundleError(f"{source}: id {min(clash)} is both a control token and a piece of text; {_BUILDING}")
        try:
            self._backend = Backend.from_str(json.dumps(text_only, ensure_ascii=False))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"{source} is not a usable tokenizer ({error}); {_BUILDING}") from None

    @staticmethod
    def from_file(path: Path) -> Tokenizer:
        """Read ``tokenizer.json``; raises BundleError naming the file."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BundleError(f"{path}: cannot be read ({error.strerror}); {_BUILDING}") from None
        if len(data) > MAX_TOKENIZER_BYTES:
            raise BundleError(f"{path}: {len(data)} bytes, at most {MAX_TOKENIZER_BYTES} are accepted; {_BUILDING}")
        try:
            raw = json.loads(data)
        except ValueError as error:
            raise BundleError(f"{path} is not JSON ({error}); {_BUILDING}") from None
        if not isinstance(raw, dict):
            raise BundleError(f"{path} is not a tokenizer.json; {_BUILDING}")
        return Tokenizer(raw, str(path))

    @property
    def control_ids(self) -> frozenset[int]:
        """Every id that text can never become."""
        return frozenset(self._literals)

    def control_id(self, literal: str) -> int:
        """The id of a control token; raises EngineError when this tokenizer has none of that name."""
        try:
            return self._ids[literal]
        except KeyError:
            raise EngineError(f"the bundle's tokenizer has no token {literal}; the prompt dialect needs it") from None

    def control_literal(self, token: int) -> str | None:
        """The literal of a control token, None for a piece of text (or an id the tokenizer does not know)."""
        return self._literals.get(token)

    def is_special(self, token: int) -> bool:
        """Whether the file marks this control token as one that is never shown."""
        return token in self._special

    def encode(self, segments: Iterable[Segment]) -> list[int]:
        """Ids of a prompt: control tokens by name, sampled ids as they are, text as bytes and merges only."""
        ids: list[int] = []
        for segment in segments:
            if isinstance(segment, Control):
                ids.append(self.control_id(segment.literal))
            elif isinstance(segment, Sampled):
                ids += segment.ids
            else:
                ids += self.encode_text(segment)
        return ids

    def least_tokens(self, segments: Iterable[Segment]) -> int:
        """A lower bound of len(encode(segments)) at the price of a length: text bytes over the longest token's."""
        segments = list(segments)
        size_bytes = sum(len(s.encode("utf-8", "replace")) for s in segments if isinstance(s, str))
        return size_bytes // self._longest_bytes + sum(len(s.ids) for s in segments if isinstance(s, Sampled))

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text, none of them a control token whatever ``text`` spells."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of a token, possibly half a character; empty for an id the tokenizer does not know."""
        literal = self._literals.get(token)
        return self._bytes.get(token, b"") if literal is None else literal.encode()

    def segments(self, ids: Sequence[int]) -> list[Segment]:
        """The other way round: control tokens by name, what is between them as text, broken UTF-8 as U+FFFD."""
        found: list[Segment] = []
        piece = b""
        for token in ids:
            literal = self._literals.get(token)
            if literal is None:
                piece += self._bytes.get(token, b"")
                continue
            found += [piece.decode(errors="replace"), Control(literal)] if piece else [Control(literal)]
            piece = b""
        return [*found, piece.decode(errors="replace")] if piece else found

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, control tokens as their literals, broken UTF-8 as U+FFFD."""
        return b"".join(self.token_bytes(token) for token in ids).decode(errors="replace")


class TextStream:
    """Ids of an answer, one by one, to text: what is not yet a whole character is held back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What was held back, as U+FFFD."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def _added_tokens(raw: dict[str, Any], source: str) -> list[dict[str, Any]]:
    added = raw.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(t, dict) and t.get("content") and "id" in t for t in added):
        raise BundleError(f"{source}: added_tokens is not a list of tokens; {_BUILDING}")
    return added


def _check_byte_level(raw: dict[str, Any], source: str) -> None:
    model = raw.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or model.get("type", "BPE") != "BPE":
        raise BundleError(f"{source}: the model is not byte-level BPE; {_BUILDING}")
    missing = [c for c in _BYTES if c not in model["vocab"]]
    if missing or '"ByteLevel"' not in json.dumps(raw.get("decoder")):
        raise BundleError(f"{source}: the vocabulary lacks {len(missing)} of 256 bytes or its decoder; {_BUILDING}")


def _without_control(raw: dict[str, Any], literals: set[str]) -> dict[str, Any]:
    """The same tokenizer without added tokens, without template, and without any way to spell a control token."""
    model = dict(raw["model"])
    model["vocab"] = {piece: number for piece, number in model["vocab"].items() if piece not in literals}
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges", []))
    model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & literals]
    if model.get("unk_token") in literals:
        model["unk_token"] = None  # never needed: all 256 bytes are in the vocabulary
    return raw | {"model": model, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
