"""The bundle's contract between exporter and runtime: what ``model.json`` says. No numpy, no onnx here.

The exporter writes a :class:`ModelSpec`; the runtime allocates every state tensor and feeds every graph input from it
and from nothing else. Keys of :class:`ModelConfig` are those of the checkpoint's ``config.json``.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from appliance.errors import BundleError, UsageError
from appliance.wire import FULL, PROFILE_ID

BLOCK_TOKENS = 256  # one KV block, in memory and on disk (design: state is paged from the start)
OP_DOMAIN = "solocard"
OP_VERSION = 1
MAX_PROFILES = 16  # besides full
ENCODINGS = ("dsv4-0424", "dsv4-0731")
NUMERICS = ("kv-v4", "kv-f32")

StateKind = Literal["win", "ring", "iring", "ent", "ient"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """YaRN of the compressed layers: ``factor``, original length in tokens, betas (config.json ``rope_scaling``)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The checkpoint's config.json, the keys the maths needs, checked. Lengths in elements, positions in tokens."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    rope_scaling: RopeScaling
    max_position_embeddings: int
    bos_token_id: int
    eos_token_id: int
    compress_ratios: tuple[int, ...]  # one per layer: 0 sliding window only, 4 CSA, larger HCA

    @property
    def csa_ratio(self) -> int:
        """Tokens per entry of the layers that have an indexer (overlapping compressor)."""
        return 4

    def layer_kind(self, layer: int) -> Literal["S", "C", "H"]:
        """S sliding window, C compressed sparse attention (indexer), H heavily compressed attention."""
        ratio = self.compress_ratios[layer]
        return "S" if ratio == 0 else "C" if ratio == self.csa_ratio else "H"


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One state input of the graph; its fresh rows come back as output ``<name>.new``.

    ``win``, ``ring``, ``iring``: pool [slots, rows, width], a sequence's row of token t is t mod rows.
    ``ent``, ``ient``: pool [blocks, rows, width] with rows = 256 / ratio; entry s is row s mod rows of page s // rows.
    ``dtype`` u8 holds stored bytes (``kv-v4``), f32 plain values (rings always; everything in ``kv-f32``).
    """

    name: str
    layer: int
    kind: StateKind
    dtype: Literal["u8", "f32"]
    rows: int
    width: int
    ratio: int  # tokens per row: 1 for win and rings, r for entries

    @property
    def paged(self) -> bool:
        return self.kind in ("ent", "ient")

    @property
    def row_bytes(self) -> int:
        return self.width * (1 if self.dtype == "u8" else 4)


@dataclass(frozen=True, slots=True)
class Golden:
    """A trial entry: greedy ``expected_ids`` after ``prompt_ids``; top-1 margin ≥ ``min_margin`` at every step."""

    profile: str
    prompt_ids: tuple[int, ...]
    expected_ids: tuple[int, ...]
    min_margin: float


@dataclass(frozen=True, slots=True)
class Profile:
    """One card class: experts kept per layer, objects only this profile adds, the graph's digest."""

    id: str
    card: str
    experts_kept: tuple[int, ...]
    overlay_objects: tuple[str, ...]
    graph_sha256: str


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """All of ``model.json``. ``encoding`` names the prompt dialect, ``numerics`` the stored formats."""

    name: str
    config: ModelConfig
    states: tuple[StateTensor, ...]
    encoding: str
    numerics: str
    profiles: tuple[Profile, ...]
    goldens: tuple[Golden, ...]
    chunk_tokens: int = BLOCK_TOKENS
    block_tokens: int = BLOCK_TOKENS
    opset: int = 18
    op_domain: str = OP_DOMAIN
    op_version: int = OP_VERSION
    tokenizer: bool = True
    format: int = 1

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, compact, no final newline."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def profile(self, profile_id: str, bundle_id: str) -> Profile:
        """The profile of that id; UsageError names the profiles ``bundle_id`` has."""
        for profile in self.profiles:
            if profile.id == profile_id:
                return profile
        known = ", ".join(profile.id for profile in self.profiles) or "none"
        raise UsageError(
            f"profile {profile_id!r} is not in {bundle_id}, which has {known}; name one with --profile, or as "
            "engine.profile in config.yaml"
        )

    @staticmethod
    def from_json(text: str, source: str = "model.json") -> ModelSpec:
        """Parse and check; raises BundleError naming ``source`` and the field."""
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise BundleError(f"{source} is not JSON ({error}); copy the bundle again") from None
        if not isinstance(raw, dict) or raw.get("format") != 1:
            found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
            raise BundleError(f"{source}: format {found!r} is not 1; not a model.json, or this Solocard is too old")
        try:
            spec = _spec(raw)
            _check_profiles(spec, source)
            return spec
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"{source}: field {error} is missing or of the wrong type") from None


def _spec(raw: dict[str, Any]) -> ModelSpec:
    config = dict(raw["config"])
    config["rope_scaling"] = RopeScaling(**config["rope_scaling"])
    config["compress_ratios"] = tuple(int(r) for r in config["compress_ratios"])
    spec = dict(raw)
    spec["config"] = ModelConfig(**config)
    spec["states"] = tuple(StateTensor(**s) for s in raw["states"])
    spec["profiles"] = tuple(
        Profile(**{**p, "experts_kept": tuple(p["experts_kept"]), "overlay_objects": tuple(p["overlay_objects"])})
        for p in raw["profiles"]
    )
    spec["goldens"] = tuple(
        Golden(**{**g, "prompt_ids": tuple(g["prompt_ids"]), "expected_ids": tuple(g["expected_ids"])})
        for g in raw["goldens"]
    )
    if spec["numerics"] not in NUMERICS or spec["encoding"] not in ENCODINGS:
        raise ValueError("numerics" if spec["numerics"] not in NUMERICS else "encoding")
    return ModelSpec(**spec)


def _check_profiles(spec: ModelSpec, source: str) -> None:
    """Ids once and in form, ``full`` first, as many counts as layers; golden tokens of profiles that exist."""
    ids, config = [profile.id for profile in spec.profiles], spec.config
    if not 1 <= len(ids) <= MAX_PROFILES + 1 or ids[0] != FULL or len(set(ids)) != len(ids):
        raise BundleError(f"{source}: profiles are not {FULL!r} and up to {MAX_PROFILES} others, each once")
    for profile in spec.profiles:
        if not PROFILE_ID.fullmatch(profile.id):
            raise BundleError(f"{source}: profile id {profile.id[:60]!r} is not of the form {PROFILE_ID.pattern}")
        kept, least, most = profile.experts_kept, config.num_experts_per_tok, config.n_routed_experts
        if len(kept) != config.num_hidden_layers or not all(type(k) is int and least <= k <= most for k in kept):
            raise BundleError(
                f"{source}: profile {profile.id}: experts_kept is not {config.num_hidden_layers} counts of {least} to "
                f"{most}, one a layer"
            )
    unknown = {golden.profile for golden in spec.goldens} - set(ids)
    if unknown:
        raise BundleError(f"{source}: golden tokens of a profile {sorted(unknown)[0]!r} that is not there")


def attention_row_width(config: ModelConfig, numerics: str) -> int:
    """Elements of a window or entry row: kv-v4 bytes nope + pad8(nope/64) + 2·rope, kv-f32 head_dim floats."""
    if numerics == "kv-f32":
        return config.head_dim
    nope = config.head_dim - config.qk_rope_head_dim
    return nope + (nope // 64 + 7) // 8 * 8 + 2 * config.qk_rope_head_dim


def index_row_width(config: ModelConfig, numerics: str) -> int:
    """Elements of an index-key row: kv-v4 bytes d/2 FP4 codes + d/32 E8M0 scales, kv-f32 d floats."""
    d = config.index_head_dim
    return d if numerics == "kv-f32" else d // 2 + d // 32


def state_tensors(config: ModelConfig, numerics: str) -> tuple[StateTensor, ...]:
    """Every state of the graph, layer by layer, in the order of its inputs (design, decision 4)."""
    row, irow = attention_row_width(config, numerics), index_row_width(config, numerics)
    stored: Literal["u8", "f32"] = "u8" if numerics == "kv-v4" else "f32"
    states: list[StateTensor] = []
    for layer in range(config.num_hidden_layers):
        name, ratio, kind = f"layers.{layer}", config.compress_ratios[layer], config.layer_kind(layer)
        states.append(StateTensor(f"{name}.win", layer, "win", stored, config.sliding_window, row, 1))
        if kind == "S":
            continue
        overlap = 2 if kind == "C" else 1  # CSA entries overlap by one block: a 2r ring and two column halves
        ring_rows = overlap * ratio
        states.append(StateTensor(f"{name}.ring", layer, "ring", "f32", ring_rows, 2 * overlap * config.head_dim, 1))
        states.append(StateTensor(f"{name}.ent", layer, "ent", stored, BLOCK_TOKENS // ratio, row, ratio))
        if kind == "C":
            width = 2 * overlap * config.index_head_dim
            states.append(StateTensor(f"{name}.iring", layer, "iring", "f32", ring_rows, width, 1))
            states.append(StateTensor(f"{name}.ient", layer, "ient", stored, BLOCK_TOKENS // ratio, irow, ratio))
    return tuple(states)
