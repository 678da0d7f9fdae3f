"""A byte-level BPE tokenizer.json with V4's control tokens, for sample and small trained checkpoints.

Ids as in the original: 0 begin of sentence, 1 end of sentence, then the 256 bytes and the merges, and the control
tokens at the end of the vocabulary; what lies between is filled with placeholders, so that every id has a name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from appliance.errors import UsageError

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
# (literal, special): special ones are never shown; the original has ｜DSML｜ and the think marks as ordinary text.
CONTROL_TOKENS: tuple[tuple[str, bool], ...] = (
    ("<｜fim▁hole｜>", True), ("<｜fim▁begin｜>", True), ("<｜fim▁end｜>", True),
    ("<｜User｜>", True), ("<｜Assistant｜>", True), ("<｜System｜>", True),
    ("<think>", False), ("</think>", False), ("｜DSML｜", False), ("<｜latest_reminder｜>", True),
    ("<｜action｜>", True), ("<｜query｜>", True), ("<｜authority｜>", True), ("<｜domain｜>", True),
    ("<｜title｜>", True), ("<｜read_url｜>", True), ("<｜image｜>", True),
)
FIRST_TEXT_ID = 2
_LETTERS = "etaoinshrdlcumwfgypbvkjxqz"
_SPACE = "Ġ"  # byte 0x20 in the byte alphabet


def byte_alphabet() -> list[str]:
    """Byte → character of byte-level BPE: printable Latin-1 stands for itself, the rest from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = itertools.count(256)
    return [chr(byte) if byte in plain else chr(next(spare)) for byte in range(256)]


def build(vocab_size: int) -> dict[str, Any]:
    """tokenizer.json of an untrained sample: bytes, then merges of common letters as far as there is room.

    Raises UsageError if ``vocab_size`` has no room for bytes and control tokens.
    """
    tokens = byte_alphabet()
    merges = list(itertools.islice(_letter_merges(), max(0, text_capacity(vocab_size) - len(tokens))))
    tokens += [left + right for left, right in merges]
    return wrap({token: number for number, token in enumerate(tokens)}, merges, vocab_size)


def text_capacity(vocab_size: int) -> int:
    """How many text tokens (bytes and merges) a vocabulary of ``vocab_size`` ids has room for."""
    return vocab_size - FIRST_TEXT_ID - len(CONTROL_TOKENS)


def wrap(bpe_vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], vocab_size: int) -> dict[str, Any]:
    """tokenizer.json around a byte-level BPE: ``bpe_vocab`` token → rank (any increasing numbers, no control tokens).

    Text tokens get ids from 2 on in rank order, control tokens the last ids. Raises UsageError if it does not fit.
    """
    text = sorted(bpe_vocab, key=lambda token: bpe_vocab[token])
    first_control = vocab_size - len(CONTROL_TOKENS)
    if FIRST_TEXT_ID + len(text) > first_control or len(text) < 256:
        raise UsageError(f"vocab_size {vocab_size}: room for {text_capacity(vocab_size)} text tokens, not {len(text)}")
    fillers = range(FIRST_TEXT_ID + len(text), first_control)
    controls = [(BOS, 0, True), (EOS, 1, True)]
    controls += [(f"<｜place▁holder▁no▁{number}｜>", token, True) for number, token in enumerate(fillers)]
    controls += [(literal, first_control + i, special) for i, (literal, special) in enumerate(CONTROL_TOKENS)]
    vocab = {literal: number for literal, number, _ in controls}
    vocab |= {token: FIRST_TEXT_ID + rank for rank, token in enumerate(text)}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [_added(*control) for control in controls],
        "normalizer": None, "pre_tokenizer": _PRE_TOKENIZER, "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])), "merges": [list(pair) for pair in merges],
        },
    }


_PRE_TOKENIZER: dict[str, Any] = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


def _added(literal: str, token: int, special: bool) -> dict[str, Any]:
    return {"id": token, "content": literal, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": special}


def _letter_merges() -> Iterator[tuple[str, str]]:
    """Pairs, " "+letter, then three and four letters: each part is a byte or an earlier merge."""
    pairs = [a + b for a in _LETTERS for b in _LETTERS]
    yield from itertools.product(_LETTERS, _LETTERS)
    yield from itertools.product(_SPACE, _LETTERS)
    yield from itertools.product(pairs, _LETTERS)
    yield from itertools.product(pairs, pairs)
