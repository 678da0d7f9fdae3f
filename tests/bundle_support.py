"""A small synthetic bundle: real manifest, objects and model.json, and bytes in place of a graph."""

from __future__ import annotations

import hashlib
from pathlib import Path

from appliance.bundle import BundleWriter, VerifiedBundle
from appliance.errors import TrialError
from appliance.floors import Floors
from appliance.install import Installer, Outcome
from appliance.manifest import Manifest
from appliance.model import Golden, ModelConfig, ModelSpec, Profile, RopeScaling, state_tensors
from appliance.roots import add_root
from appliance.state import State
from appliance.trust import TrustedRoot
from appliance.wire import Progress
from exporter.signing import new_keys, sign


def config() -> ModelConfig:
    return ModelConfig(
        hidden_size=128, num_hidden_layers=3, vocab_size=64, num_attention_heads=2, head_dim=128, qk_rope_head_dim=64,
        q_lora_rank=32, o_lora_rank=32, o_groups=1, sliding_window=32, index_n_heads=16, index_head_dim=64,
        index_topk=8, moe_intermediate_size=32, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
        num_hash_layers=1, routed_scaling_factor=1.0, swiglu_limit=10.0, hc_mult=4, hc_sinkhorn_iters=4, hc_eps=1e-6,
        rms_norm_eps=1e-6, rope_theta=10000.0, compress_rope_theta=40000.0,
        rope_scaling=RopeScaling(4.0, 1024, 32.0, 1.0), max_position_embeddings=4096, bos_token_id=0, eos_token_id=1,
        compress_ratios=(0, 4, 128),
    )


def spec(name: str = "sample", graph: bytes = b"") -> ModelSpec:
    return ModelSpec(
        name=name, config=config(), states=state_tensors(config(), "kv-v4"), encoding="dsv4-0424", numerics="kv-v4",
        profiles=(Profile("full", "any", (4, 4, 4), (), hashlib.sha256(graph).hexdigest()),),
        goldens=(Golden("full", (0, 5, 6), (7,), 0.5),),
    )


def build(out: Path, *, counter: int = 1, seed: int = 0, tokenizer: bool = True) -> Manifest:
    """An unsigned bundle of three objects (one shared by every seed), the small files and a manifest."""
    writer = BundleWriter(out)
    writer.add_object([bytes([7]) * 3000])
    writer.add_object([bytes([seed, i]) * 2048 for i in range(4)], record_bytes=4096)
    writer.add_object([b"%d:%d," % (seed, i) for i in range(500)])
    graph = b"not a graph, %d" % seed
    writer.add_file("model.onnx", graph)
    writer.add_file("model.json", spec(graph=graph).to_json().encode())
    if tokenizer:
        writer.add_file("tokenizer.json", b'{"version":"1.0"}')
    return writer.finish("sample", f"1.{counter}", counter, {"seed": seed})


class Desk:
    """A release desk: one set of keys, bundles built and signed below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.keys = folder, folder / "keys"
        self.root = new_keys(self.keys)

    def release(self, counter: int, *, name: str = "", seed: int | None = None, **signing) -> Path:
        """A signed bundle directory; equal seeds give equal bytes."""
        out = self.folder / (name or f"release-{counter}")
        build(out, counter=counter, seed=counter if seed is None else seed)
        sign(out, self.keys, **signing)
        return out


class Machine:
    """An appliance in a folder, its trial replaced by a Python function; ``steps`` collects what it reported."""

    def __init__(self, home: Path, root: TrustedRoot | None = None) -> None:
        self.home = home
        self.steps: list[Progress] = []
        self.tried: list[str] = []
        self.trial_error = ""
        if root is not None:
            add_root(home, root, Path("root.json"))

    def installer(self) -> Installer:
        return Installer(self.home, self.steps.append, trial=self._trial)

    def install(self, stick: Path) -> Outcome:
        return self.installer().install(stick)

    @property
    def state(self) -> State:
        return State.read(self.home)

    @property
    def floors(self) -> Floors | None:
        return Floors.read(self.home)

    def _trial(self, home: Path, bundle_id: str, timeout_s: int) -> str:
        VerifiedBundle.open_installed(home, bundle_id)
        self.tried.append(bundle_id)
        if self.trial_error:
            raise TrialError(self.trial_error)
        return "1 golden, 1 token: all as recorded"


def files_of(folder: Path) -> list[str]:
    """Relative names of every file below, sorted."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
