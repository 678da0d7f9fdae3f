"""The profiles of one bundle: a view each, its plan, and the proof of its quality or the reason why there is none.

``full`` is the whole ranked model. Every other profile is a plan with the overlays made for it; its quality.json must
be of exactly that model, and a gate it failed must be waived in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from appliance.errors import CheckpointError, UsageError
from appliance.manifest import graph_file
from appliance.model import MAX_PROFILES
from appliance.wire import FULL
from exporter.checkpoint import Checkpoint
from exporter.evaluate.gates import Gate, kind_of
from exporter.evaluate.quality import Quality
from exporter.overlay import Overlay
from exporter.plan.plan import Plan
from exporter.ranking import Ranking
from exporter.stage import digest
from exporter.view import View

MAX_REASON_BYTES = 1000


@dataclass(frozen=True, slots=True)
class BuildProfile:
    """One profile to be built. ``plan`` is None for ``full`` only."""

    id: str
    card: str
    view: View
    plan: Plan | None = None
    quality: Quality | None = None
    without_quality: str = ""  # the reason given

    @property
    def graph_file(self) -> str:
        """The graph's name in the bundle."""
        return graph_file(self.id)

    def loosened(self) -> dict[str, str]:
        """Gate → "bound, planned bound" where the quality was judged by a looser one than the plan has (--gate)."""
        if self.plan is None or self.quality is None:
            return {}
        pairs = [(gate, self.plan.gates[gate.name]) for gate in self.quality.gates if gate.name in self.plan.gates]
        return {gate.name: f"{gate.bound}, planned {planned}" for gate, planned in pairs if _is_looser(gate, planned)}

    def recipe(self) -> dict[str, Any]:
        """What the profile is made of, by digest: for the build's recipe and the provenance."""
        found: dict[str, Any] = {"recipe_sha256": self.view.recipe_sha256}
        if self.plan is not None:
            found["plan_sha256"] = digest(self.plan.to_dict())
        if self.view.overlays:
            found["overlays"] = [_overlay(overlay) for overlay in self.view.overlays]
        if self.quality is not None:
            found |= {"quality_sha256": digest(self.quality.to_dict()), "waived": list(self.quality.waived_gates)}
            found |= {"looser_than_planned": loosened} if (loosened := self.loosened()) else {}
        if self.without_quality:
            found["without_quality"] = self.without_quality
        return found


def open_profiles(
    base: Checkpoint, ranking: Ranking | None, profiles: Sequence[str], qualities: Sequence[Path], reason: str | None
) -> tuple[BuildProfile, ...]:
    """``full`` first, then one per "PLAN.json[,OVERLAY_DIR…]". UsageError or CheckpointError names what is wrong."""
    if len(profiles) > MAX_PROFILES:
        raise UsageError(f"--profile: {len(profiles)} of them, {MAX_PROFILES} at most beside {FULL!r}")
    if reason is not None and not 0 < len(reason.encode()) <= MAX_REASON_BYTES:
        raise UsageError(f"--without-quality: {len(reason.encode())} bytes, expected 1 to {MAX_REASON_BYTES}")
    found = [BuildProfile(FULL, "any", View(base, ranking=ranking))]
    for text in profiles:
        plan, *overlays = text.split(",")
        profile = _opened(base, ranking, Path(plan), [Path(path) for path in overlays])
        if profile.id in {other.id for other in found}:
            raise UsageError(f"{plan}: a second profile called {profile.id!r}; plan it with another --id")
        found.append(profile)
    proven = _with_quality(found, qualities)
    return tuple(_judged(profile, reason) for profile in proven)


def quality_json(profiles: Sequence[BuildProfile]) -> dict[str, Any] | None:
    """quality.json of the bundle, {format, profiles: {id: quality}}; None when no profile has one."""
    found = {profile.id: profile.quality.to_dict() for profile in profiles if profile.quality is not None}
    return {"format": 1, "profiles": found} if found else None


def _opened(base: Checkpoint, ranking: Ranking | None, path: Path, overlays: Sequence[Path]) -> BuildProfile:
    plan = _plan(path, base)
    kept = plan.experts_kept
    view = View(base, ranking=ranking, experts_kept=kept, overlays=[Overlay.open(folder) for folder in overlays])
    _check_formats(path, plan, view)
    for layer in range(base.config.num_hash_layers):
        view.read(f"layers.{layer}.ffn.gate.tid2eid")  # refuses experts that tokens are routed to and that were cut
    for overlay in view.overlays:
        overlay.check_bytes()
    return BuildProfile(plan.id, str(plan.card.get("id", "")), view, plan)


def _plan(path: Path, base: Checkpoint) -> Plan:
    plan = Plan.read(path)
    if plan.source_sha256 != base.source_sha256:
        raise UsageError(f"{path}: was planned for another checkpoint than {base.path}; plan for this one")
    if plan.id == FULL:
        raise UsageError(f"{path}: id: {FULL!r} is the name of the whole model; plan with another --id")
    return plan


def _check_formats(path: Path, plan: Plan, view: View) -> None:
    """The plan's bytes hold only if the overlays store what it counted with."""
    for name, planned, dtypes in _planned_formats(plan, view):
        found = view.info(f"{name}.weight").dtype
        if found != dtypes[planned]:
            raise UsageError(
                f"{path}: plans {planned} for {name}, the overlays given leave it {found}; lay the overlay of "
                "`quantize` over it (--profile PLAN,OVERLAY), or plan what you have"
            )


def _planned_formats(plan: Plan, view: View) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    dense = {"D4": "I8", "D8": "F8_E4M3"}
    for layer in range(view.config.num_hidden_layers):
        for linear in ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b"):
            yield f"layers.{layer}.{linear}", plan.dense, dense
        for part in ("w1", "w2", "w3"):
            yield f"layers.{layer}.ffn.shared_experts.{part}", plan.dense, dense
    yield "head", plan.head, {"bf16": "BF16", "fp8": "F8_E4M3"}


def _with_quality(profiles: Sequence[BuildProfile], paths: Sequence[Path]) -> list[BuildProfile]:
    """Each quality.json at the profile it was measured on."""
    found = list(profiles)
    for path in paths:
        quality = Quality.read(path)
        at = [i for i, profile in enumerate(found) if profile.view.recipe_sha256 == quality.recipe_sha256]
        if not at:
            known = ", ".join(f"{p.id} is {p.view.recipe_sha256[:12]}" for p in found)
            raise UsageError(
                f"{path}: recipe_sha256: measured on {quality.recipe_sha256[:12]}, {known}; evaluate with the same "
                "checkpoint, ranking, plan and overlays as are built"
            )
        _check_gates(path, quality, found[at[0]])
        for index in at:
            found[index] = replace(found[index], quality=quality)
    return found


def _check_gates(path: Path, quality: Quality, profile: BuildProfile) -> None:
    for gate in quality.gates:
        if not gate.passed and not gate.waived:
            side, measured = kind_of(gate.name).side, "nothing" if gate.measured is None else gate.measured
            raise CheckpointError(
                f"{path}: profile {profile.id} failed gate {gate.name}: measured {measured}, bound {side} "
                f"{gate.bound}; train or keep more, or let a person waive it with "
                f"`solocard-export evaluate --waive {gate.name}=REASON`"
            )


def _is_looser(gate: Gate, planned: float) -> bool:
    return gate.bound > planned if kind_of(gate.name).side == "at most" else gate.bound < planned


def _judged(profile: BuildProfile, reason: str | None) -> BuildProfile:
    """Its quality, or the reason why there is none; only the whole untouched model needs neither."""
    if profile.quality is not None or (profile.id == FULL and not profile.view.overlays):
        return profile
    if reason is None:
        raise UsageError(
            f"profile {profile.id} has no --quality of its own; evaluate it, or build it --without-quality REASON "
            "(the reason goes into the provenance)"
        )
    return replace(profile, without_quality=reason)


def _overlay(overlay: Overlay) -> dict[str, Any]:
    """Stage and digest, and the digests of what it was computed with (calibration texts, statistics …)."""
    inputs = {key: value for key, value in sorted(overlay.recipe.items()) if key.endswith("_sha256")}
    return {"stage": overlay.stage, "sha256": overlay.sha256, "inputs": inputs}
