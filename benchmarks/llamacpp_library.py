"""The few calls of llama.cpp's C interface that the side-by-side needs, through ctypes.

Any shared library that exports ``llama_*`` will do: libllama.so of a build, or a Python package's extension module.
The parameter structs grow from version to version; the few fields set here have kept their places, and a library whose
defaults are not found there is refused.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ELEMENT_TYPES = {"f32": 0, "f16": 1, "q8_0": 8}
_TYPE_K = (
    26  # fields n_ctx, n_batch, n_ubatch, n_seq_max are words 0 … 3 of llama_context_params, type_k, type_v 26, 27
)
_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_ERROR = 4  # level of a log line


class LibraryError(Exception):
    """llama.cpp refused something; the message says what and ends with its last error line."""


class _Params(ctypes.Structure):
    """Either parameter struct with room for later fields: the callee reads its own part of it."""

    _fields_ = (("raw", ctypes.c_uint64 * 64),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32), ("token", ctypes.POINTER(ctypes.c_int32)), ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p), ("n_seq_id", ctypes.c_void_p), ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )  # fmt: skip


class Library:
    """A loaded llama.cpp; ``errors`` holds the error lines it has logged."""

    def __init__(self, path: Path) -> None:
        try:
            self.calls = ctypes.CDLL(str(path))
            self._declare()
        except (OSError, AttributeError) as error:
            raise LibraryError(f"{path}: not a llama.cpp library this machine can load: {error}") from None
        self.errors: list[str] = []
        self._log = _LOG_CALLBACK(self._keep)
        self.calls.llama_log_set(self._log, None)
        self.calls.llama_backend_init()

    def _declare(self) -> None:
        pointer, text, size, c = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, self.calls
        ids = ctypes.POINTER(ctypes.c_int32)
        for name, result, arguments in (
            ("ggml_version", text, ()), ("llama_print_system_info", text, ()),
            ("llama_model_default_params", _Params, ()), ("llama_context_default_params", _Params, ()),
            ("llama_model_load_from_file", pointer, (text, _Params)), ("llama_model_free", None, (pointer,)),
            ("llama_init_from_model", pointer, (pointer, _Params)), ("llama_free", None, (pointer,)),
            ("llama_model_get_vocab", pointer, (pointer,)), ("llama_vocab_n_tokens", ctypes.c_int32, (pointer,)),
            ("llama_set_n_threads", None, (pointer, ctypes.c_int32, ctypes.c_int32)),
            ("llama_batch_get_one", _Batch, (ids, ctypes.c_int32)),
            ("llama_decode", ctypes.c_int32, (pointer, _Batch)),
            ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), (pointer, ctypes.c_int32)),
            ("llama_state_seq_save_file", size, (pointer, text, ctypes.c_int32, ids, size)),
            ("llama_state_seq_load_file", size, (pointer, text, ctypes.c_int32, ids, size, ctypes.POINTER(size))),
            ("llama_get_memory", pointer, (pointer,)),
            ("llama_memory_seq_pos_max", ctypes.c_int32, (pointer, ctypes.c_int32)),
            ("llama_memory_seq_rm", ctypes.c_bool, (pointer, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)),
            ("llama_log_set", None, (_LOG_CALLBACK, pointer)), ("llama_backend_init", None, ()),
        ):  # fmt: skip
            call = getattr(c, name)
            call.restype, call.argtypes = result, list(arguments)

    def _keep(self, level: int, line: bytes, _data: object) -> None:
        if level == _ERROR:
            self.errors.append(line.decode(errors="replace").strip())

    @property
    def last_error(self) -> str:
        return self.errors[-1] if self.errors else "no error line"

    @property
    def description(self) -> str:
        """What the library says of itself."""
        features = self.calls.llama_print_system_info().decode().strip(" |")
        return f"ggml {self.calls.ggml_version().decode()}; {features}"


class Model:
    """A loaded GGUF file."""

    def __init__(self, library: Library, path: Path) -> None:
        self.library, calls = library, library.calls
        self.handle = calls.llama_model_load_from_file(str(path).encode(), calls.llama_model_default_params())
        if not self.handle:
            raise LibraryError(f"{path}: llama.cpp does not load it: {library.last_error}")
        self.vocab_size = calls.llama_vocab_n_tokens(calls.llama_model_get_vocab(self.handle))

    def close(self) -> None:
        self.library.calls.llama_model_free(self.handle)


class Context:
    """One sequence (number 0) of ``model``.

    ``n_ctx`` tokens of context, batches of 2,048 tokens computed in pieces of 512, all else by llama.cpp's defaults.
    """

    def __init__(self, model: Model, n_ctx: int, *, threads: int = 1, cache: str = "f16") -> None:
        self.model, self.library = model, model.library
        calls = model.library.calls
        params = calls.llama_context_default_params()
        _fill(params, n_ctx, ELEMENT_TYPES[cache])
        self.handle = calls.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise LibraryError(f"llama.cpp makes no context of {n_ctx} tokens: {self.library.last_error}")
        calls.llama_set_n_threads(self.handle, threads, threads)

    def close(self) -> None:
        self.library.calls.llama_free(self.handle)

    def decode(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append ``ids`` → logits f32 [vocab] after the last."""
        calls, step = self.library.calls, 2048
        for at in range(0, len(ids), step):
            piece = _tokens(ids[at : at + step])
            code = calls.llama_decode(self.handle, calls.llama_batch_get_one(piece, len(piece)))
            if code:
                raise LibraryError(f"llama_decode gave {code}: {self.library.last_error}")
        row = calls.llama_get_logits_ith(self.handle, -1)
        return np.ctypeslib.as_array(row, (self.model.vocab_size,)).copy()

    def save(self, path: Path, ids: Sequence[int]) -> int:
        """Write sequence 0 with its token ids to ``path`` → bytes; not fsynced by llama.cpp."""
        calls = self.library.calls
        written: int = calls.llama_state_seq_save_file(self.handle, str(path).encode(), 0, _tokens(ids), len(ids))
        if not written:
            raise LibraryError(f"{path}: not saved: {self.library.last_error}")
        return written

    def load(self, path: Path, capacity: int) -> list[int] | None:
        """Read sequence 0 from ``path`` → its token ids; None when llama.cpp refuses the file."""
        ids, count = (ctypes.c_int32 * capacity)(), ctypes.c_size_t(0)
        calls = self.library.calls
        if not calls.llama_state_seq_load_file(self.handle, str(path).encode(), 0, ids, capacity, count):
            return None
        return list(ids[: count.value])

    def clear(self) -> None:
        """Forget sequence 0."""
        calls = self.library.calls
        calls.llama_memory_seq_rm(calls.llama_get_memory(self.handle), 0, -1, -1)

    def tokens(self) -> int:
        """How many tokens llama.cpp says that sequence 0 holds."""
        calls = self.library.calls
        last: int = calls.llama_memory_seq_pos_max(calls.llama_get_memory(self.handle), 0)
        return last + 1


def _fill(params: _Params, n_ctx: int, element_type: int) -> None:
    words = np.frombuffer((ctypes.c_char * ctypes.sizeof(params)).from_buffer(params), np.uint32)
    if list(words[:4]) != [512, 2048, 512, 1] or list(words[_TYPE_K : _TYPE_K + 2]) != [1, 1]:
        raise LibraryError("llama_context_params of this library has another layout; b11549 is known to work")
    words[0] = n_ctx
    words[_TYPE_K : _TYPE_K + 2] = element_type


def _tokens(ids: Sequence[int]) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * len(ids))(*ids)
