"""Calibration and evaluation texts: JSON lines of one domain and one sequence each.

``{"domain": "code", "text": "…"}`` goes through the checkpoint's tokenizer.json (special tokens as written, none
added), ``{"domain": "code", "ids": [1, 2, …]}`` is taken as it is. Every sequence starts at position 0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import CheckpointError, UsageError
from exporter.view import View

TOKENIZER = "tokenizer.json"
MAX_LINE_BYTES = 64 << 20
MAX_DOMAIN_CHARS = 64
MAX_DOMAINS = 64

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Text:
    """One sequence: token ids from position 0, and the domain its statistics are counted under."""

    domain: str
    ids: tuple[int, ...]


def read_texts(path: Path, view: View, *, max_tokens: int | None = None) -> list[Text]:
    """Every line of ``path``, in order; ``max_tokens`` stops after so many in all (the last line is cut short).

    UsageError names file, line and field: bad JSON, no ids, ids outside the vocabulary, more tokens than
    max_position_embeddings, more than 64 domains.
    """
    encode = _encoder(view.path / TOKENIZER)
    texts: list[Text] = []
    left = max_tokens
    for number, line in _lines(path):
        if left is not None and left <= 0:
            break
        text = _parse(line, f"{path}: line {number}", view, encode)
        if left is not None:
            text = Text(text.domain, text.ids[:left])
            left -= len(text.ids)
        texts.append(text)
    if not texts:
        raise UsageError(f"{path}: no line of text; expected JSON lines with a domain and a text")
    if len(domains(texts)) > MAX_DOMAINS:
        raise UsageError(f"{path}: {len(domains(texts))} domains, expected at most {MAX_DOMAINS}")
    return texts


def domains(texts: list[Text]) -> tuple[str, ...]:
    """The domains of ``texts``, sorted."""
    return tuple(sorted({text.domain for text in texts}))


def texts_sha256(path: Path) -> str:
    """SHA-256 (hex) of the file, as recipes and provenance name it."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give a file of JSON lines") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of every line that is not blank."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise UsageError(f"{path}: line {number}: more than {MAX_LINE_BYTES >> 20} MiB; split it")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give a file of JSON lines") from None


def _parse(line: bytes, where: str, view: View, encode: Encode) -> Text:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON ({str(error)[:80]}); expected {{\"domain\": …, \"text\": …}}") from None
    if not isinstance(raw, dict) or ("text" in raw) == ("ids" in raw):
        raise UsageError(f"{where}: expected an object with a domain and either a text or ids")
    domain = raw.get("domain")
    if not isinstance(domain, str) or not 1 <= len(domain) <= MAX_DOMAIN_CHARS:
        raise UsageError(f"{where}: domain: expected a string of 1 to {MAX_DOMAIN_CHARS} characters")
    if "text" in raw and not isinstance(raw["text"], str):
        raise UsageError(f"{where}: text: found a {type(raw['text']).__name__}, expected a string")
    for field in ("domain", "text"):
        if any("\ud800" <= letter <= "\udfff" for letter in raw.get(field, "")):
            raise UsageError(f"{where}: {field}: holds half of a surrogate pair (\\ud800 …), which is no character")
    ids = encode(raw["text"]) if "text" in raw else raw["ids"]
    return Text(domain, _checked_ids(ids, where, view))


def _checked_ids(ids: Any, where: str, view: View) -> tuple[int, ...]:
    vocabulary, longest = view.config.vocab_size, view.config.max_position_embeddings
    if not isinstance(ids, list) or not ids:
        raise UsageError(f"{where}: no token; expected at least one")
    for value in ids:
        if type(value) is not int or not 0 <= value < vocabulary:
            raise UsageError(f"{where}: ids: found {str(value)[:40]}, expected 0 to {vocabulary - 1}")
    if len(ids) > longest:
        raise UsageError(f"{where}: {len(ids):,} tokens, the model takes at most {longest:,}; split the text")
    return tuple(ids)


def _encoder(path: Path) -> Encode:
    """The tokenizer of ``path``, opened with the first text that needs it."""
    opened: list[Any] = []

    def encode(text: str) -> list[int]:
        if not opened:
            opened.append(open_tokenizer(path))
        return list(opened[0].encode(text, add_special_tokens=False).ids)

    return encode


def open_tokenizer(path: Path) -> Any:
    """The checkpoint's tokenizer; CheckpointError names the file."""
    from tokenizers import Tokenizer

    if not path.is_file():
        raise CheckpointError(f"{path}: is missing; lines with a text need it, lines with ids do not")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        raise CheckpointError(f"{path}: not a tokenizer ({str(error)[:80]}); copy the checkpoint again") from None
