"""F, the root of every KV chain: what must be equal for stored rows to be the rows this server would compute.

F = SHA-256 of the canonical JSON below. The bundle's own digest and signatures are not in it, so a re-signed bundle
with the same contents keeps its cache, and any change that could change one bit of a row makes the old rows
unreachable. The JSON is kept beside the cache, so that a miss can name the field that changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What onnxruntime's x86 matrix kernels dispatch on, newest first; the aarch64 flags are the kernel's names.
_X86_CLASSES = ("amx_int8", "avx512_vnni", "avx512bw", "avx512f", "avx2", "avx", "sse4_2")
_ARM_CLASSES = ("sve", "i8mm", "asimddp", "asimd")


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Who computed the rows: change any of these and sums may be taken in another order."""

    backend: str  # "ort" | "torch"
    ort_version: str
    kernels: str  # "bodies-1", or the version of the kernel library
    isa: str  # see isa_class()
    threads: str  # the thread rule, e.g. "intra=2 inter=1"
    chunk_tokens: int


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """``canonical`` is the JSON, ``digest`` its SHA-256 (32 bytes)."""

    canonical: str
    digest: bytes

    @staticmethod
    def from_canonical(text: str) -> Fingerprint:
        return Fingerprint(text, hashlib.sha256(text.encode()).digest())

    @property
    def fields(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.canonical)
        return loaded


def fingerprint(
    *, objects: Iterable[str], graphs: Iterable[str], profile: str, tokenizer_sha256: str, encoding: str,
    numerics: str, layout_id: str, arithmetic: Arithmetic,
) -> Fingerprint:  # fmt: skip
    """Build F from its pieces; ``objects`` (those mapped) and ``graphs`` are sha256 hex digests in any order."""
    pieces = {
        "arithmetic": dataclasses.asdict(arithmetic),
        "encoding": encoding,
        "graphs": sorted(graphs),
        "layout": layout_id,
        "numerics": numerics,
        "objects": sorted(objects),
        "profile": profile,
        "tokenizer": tokenizer_sha256,
    }
    return Fingerprint.from_canonical(json.dumps(pieces, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def difference(old: Fingerprint, new: Fingerprint) -> str:
    """The fields that differ, dotted and comma-separated, e.g. ``arithmetic.threads``; empty when F is equal."""
    return ", ".join(_differing(old.fields, new.fields, ""))


def _differing(old: dict[str, Any], new: dict[str, Any], prefix: str) -> list[str]:
    names: list[str] = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            names += _differing(before, after, f"{prefix}{name}.")
        elif before != after:
            names.append(prefix + name)
    return names


def isa_class(machine: str | None = None, cpuinfo: str | None = None) -> str:
    """This processor's instruction-set class, e.g. ``x86_64 avx512_vnni``; the parameters are for tests."""
    machine = machine or platform.machine()
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
        except OSError:
            return f"{machine} unknown"
    flags: set[str] = set()
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    classes = _X86_CLASSES if machine in ("x86_64", "AMD64") else _ARM_CLASSES
    return f"{machine} {next((c for c in classes if c in flags), 'baseline')}"
