"""Small checkpoints, releases without golden tokens, and plain readers of what a build made of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from appliance.manifest import Manifest, object_path
from exporter.build_profiles import open_profiles
from exporter.checkpoint import Checkpoint
from exporter.presets import TINY
from exporter.ranking import Ranking
from exporter.release import Release, write_bundle
from exporter.sample import write_random

# Three layers, one of each attention kind, one of them routed by token id: few objects, every sort of them.
SMALL = dataclasses.replace(
    TINY, num_hidden_layers=3, compress_ratios=(0, 4, 16), num_hash_layers=1, n_routed_experts=4, vocab_size=600
)


def small_checkpoint(path: Path) -> Path:
    write_random(path, SMALL, 5, mtp=1)
    return path


def a_release(
    checkpoint: Path, *, ranking: Ranking | None = None, profiles: Sequence[str] = (), qualities: Sequence[Path] = (),
    reason: str | None = None, **fields,
) -> Release:  # fmt: skip
    found = open_profiles(Checkpoint.open(checkpoint), ranking, profiles, qualities, reason)
    values = {
        "name": "sample", "version": "1.0", "counter": 1, "encoding": "dsv4-0731", "numerics": "kv-v4",
        "profiles": found, "tokenizer": b'{"version":"1.0"}',
    }  # fmt: skip
    return Release(**{**values, **fields})


def no_goldens(*_) -> tuple:
    return ()


def build(checkpoint: Path, out: Path, *, workers: int = 1, **fields) -> Manifest:
    """Everything `build` does but the search for golden tokens."""
    return write_bundle(a_release(checkpoint, **fields), out, workers=workers, find=no_goldens)


def tensor_bytes(checkpoint: Path) -> dict[str, bytes]:
    """Every tensor's bytes by name, from headers and offsets read here."""
    found = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        with safe_open(path, "np") as reader:
            assert set(reader.keys()) == set(header) - {"__metadata__"}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                found[name] = data[8 + length + start : 8 + length + end]
    return found


def stored_objects(bundle: Path) -> dict[str, bytes]:
    """Every object of a bundle by SHA-256, the digest computed here."""
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    found = {}
    for entry in manifest["objects"]:
        data = (bundle / object_path(entry["sha256"])).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        assert [hashlib.sha256(data[c["offset"] :][: c["size_bytes"]]).hexdigest() for c in entry["chunks"]] == [
            c["sha256"] for c in entry["chunks"]
        ]
        assert sum(c["size_bytes"] for c in entry["chunks"]) == entry["size_bytes"] == len(data)
        found[entry["sha256"]] = data
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
