"""Views that tests build graphs and bundles of: a random ranking, a cut, an overlay that quantizes what is ours to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from graph_support import build_bundle

from exporter import codec
from exporter.checkpoint import Checkpoint
from exporter.overlay import Overlay, OverlayWriter
from exporter.presets import TINY
from exporter.ranking import Ranking
from exporter.sample import write_random
from exporter.view import View
from exporter.view_arguments import learned_cut

# Three layers, one of each attention kind, one of them routed by token id: engines that load in a second. Four experts
# a token: two terms give the same sum in either order.
SHORT = dataclasses.replace(
    TINY, num_hidden_layers=3, compress_ratios=(0, 4, 16), num_hash_layers=1, num_experts_per_tok=4
)
ROTATED = {"attn.wq_b": 64, "attn.wo_b": 32, "attn.wo_a": 128, "attn.wq_a": 0, "ffn.shared_experts.w2": 64}


def short_checkpoint(folder: Path) -> Checkpoint:
    """A random checkpoint of ``SHORT``."""
    write_random(folder, SHORT)
    return Checkpoint.open(folder)


def random_ranking(base: Checkpoint, seed: int = 3) -> Ranking:
    """Every layer's experts in an order of its own."""
    rng = np.random.Generator(np.random.PCG64(seed))
    layers, experts = base.config.num_hidden_layers, base.config.n_routed_experts
    orders = tuple(tuple(int(e) for e in rng.permutation(experts)) for _ in range(layers))
    return Ranking(base.source_sha256, "random", orders)


def dense_linears(base: Checkpoint, layer: int) -> list[str]:
    """The D4 linears of a layer that the checkpoint stores as FP8, without ".weight"."""
    prefix = f"layers.{layer}."
    fp8 = [n for n in base.names if n.startswith(prefix) and n.endswith(".weight") and base.info(n).dtype == "F8_E4M3"]
    return [name.removesuffix(".weight") for name in fp8]


def rotate_rows(weight: np.ndarray, block: int) -> np.ndarray:
    """W [N, K] → W·H with H built entry by entry: ±block^−½, sign by the parity of the common bits of its indices."""
    index = np.arange(block)
    signs = np.array([[(-1) ** int(i & j).bit_count() for j in index] for i in index], np.float64)
    turned = weight.reshape(len(weight), -1, block).astype(np.float64) @ (signs * block**-0.5)
    return turned.reshape(weight.shape).astype(np.float32)


def quantized(view: View, folder: Path) -> Overlay:
    """Attention and shared experts in FP4, some rotated, the head in FP8: written as ``quantize`` would."""
    base, rotated = view.base, {}
    writer = OverlayWriter(folder, "quantize", view.recipe_sha256, {"rule": "test"})
    for layer in range(view.config.num_hidden_layers):
        tensors = []
        for name in dense_linears(base, layer):
            weight = base.float32(f"{name}.weight")
            block = ROTATED.get(name.split(".", 2)[2], 0)
            if block and weight.shape[1] % block == 0:
                weight, rotated[name] = rotate_rows(weight, block), block
            codes, scales = codec.fp4_quantize(weight)
            tensors += [(f"{name}.weight", "I8", codes), (f"{name}.scale", "F8_E8M0", scales)]
        writer.add(f"layer_{layer:03d}", tensors)
    codes, scales = codec.fp8_block_quantize(base.float32("head.weight"))
    writer.add("head", [("head.weight", "F8_E4M3", codes), ("head.scale", "F8_E8M0", scales)])
    return writer.finish(rotated=rotated)


def cut_view(base: Checkpoint, keep: int, folder: Path, seed: int = 3) -> View:
    """Ranked at random, ``keep`` experts in learned layers, dense part and head quantized."""
    view = View(base, ranking=random_ranking(base, seed), experts_kept=learned_cut(base.config, keep))
    return view.over(quantized(view, folder))


def write_plan(path: Path, view: View, profile: str, card: str = "atlas-350-112g") -> Path:
    """A plan.json that ``build`` takes, for ``view``; its bytes are nobody's."""
    kept = list(view.experts_kept)
    plan = {
        "format": 1, "id": profile, "card": {"id": card}, "context_tokens": 1024, "sequences": 1, "mode": "pruned",
        "dense": "D4", "head": "fp8", "experts_kept": kept, "experts_resident": kept, "hash_layers": "full",
        "bytes": {"device": {}, "headroom": 0, "host": {}, "kv": {}, "bundle": {}}, "bound": {"tokens_per_s": 1.0},
        "gates": {}, "verdict": "a test", "assumptions": [], "source_sha256": view.source_sha256, "code": {},
    }  # fmt: skip
    path.write_text(json.dumps(plan))
    return path


def build_profiles(checkpoint: Path, out: Path, folder: Path, profile: str = "small", **more: str) -> View:
    """``solocard-export build`` of ``full`` and one cut, quantized ``profile``; → the profile's view."""
    base = Checkpoint.open(checkpoint)
    view = cut_view(base, base.config.n_routed_experts - 3, folder / "overlay")
    view.ranking.write(folder / "ranking.json")
    plan = write_plan(folder / "plan.json", view, profile)
    ranking, with_overlay = str(folder / "ranking.json"), f"{plan},{folder / 'overlay'}"
    build_bundle(checkpoint, out, ranking=ranking, profile=with_overlay, without_quality="a test", **more)
    return view
