"""Where a bundle's weights came from: what was read, by digest, what made it, what was left out. No times, no paths."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from appliance.errors import UsageError
from appliance.manifest import MAX_PROVENANCE_BYTES, canonical_json
from exporter.build_profiles import BuildProfile
from exporter.checkpoint import Checkpoint
from exporter.journal import Journal
from exporter.object_plan import ObjectPlan
from exporter.stage import code_version, digest
from exporter.view import View


def provenance(view: View, profiles: Sequence[BuildProfile], source: dict[str, Any]) -> dict[str, Any]:
    """The manifest's provenance; UsageError if it would be longer than the manifest allows.

    ``source``: :func:`source_digest`'s answer, or anything as long.
    """
    config = json.dumps(dict(view.base.raw_config), sort_keys=True, separators=(",", ":"))
    found = {
        "source": {
            "config_sha256": hashlib.sha256(config.encode()).hexdigest(), "source_sha256": view.source_sha256, **source
        },
        "dropped": dropped(view),
        "code": code_version(),
        "profiles": {profile.id: profile.recipe() for profile in profiles},
        "ranking": {
            "sha256": view.ranking.sha256, "score": view.ranking.score, "stats_sha256": view.ranking.stats_sha256
        },
    }  # fmt: skip
    size_bytes = len(canonical_json(found))
    if size_bytes > MAX_PROVENANCE_BYTES:
        raise UsageError(f"the provenance takes {size_bytes:,} bytes, {MAX_PROVENANCE_BYTES:,} at most; fewer profiles")
    return found


def source_digest(plans: Iterable[ObjectPlan], journal: Journal) -> dict[str, Any]:
    """SHA-256 over the sorted [source, SHA-256] of everything read from the checkpoint, from the journal.

    A source is a tensor, or ``layers.L.ffn.experts.E``: the six tensors of an expert, one after the other as in its
    record (w1, w3, w2, then their scales). It does not depend on ranking, profiles or overlays.
    """
    lines = []
    for plan in plans:
        if not plan.is_base:
            continue
        if plan.layer is None:
            lines.append([plan.tensor, _line(journal.fact("object", plan.key))["source_sha256"]])
            continue
        records = (_line(journal.record(plan.key, index)) for index in range(plan.count))
        lines += [[record["source"], record["source_sha256"]] for record in records]
    return {"read_sha256": digest(sorted(lines))}


def dropped(view: View) -> dict[str, Any]:
    """The tensors of the checkpoint that no graph reads: blocks for multi-token prediction (MTP, DSpark)."""
    names = unread(view.base)
    return {"tensors": len(names), "bytes": sum(view.base.info(name).size_bytes for name in names)}


def unread(base: Checkpoint) -> list[str]:
    """Names of the tensors that belong to no layer of the backbone."""
    return [name for name in base.names if name.startswith("mtp.")]


def _line(entry: Any) -> Any:
    if entry is None:
        raise RuntimeError("an object was written without its journal line")
    return entry
