"""``python -m runtime serve`` (``solocard-serve``): the current bundle, its engine, its KV store, then the server.

Takes a VerifiedBundle and nothing else: an unsigned directory cannot be served.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from appliance.bundle import VerifiedBundle
from appliance.config import Config, KvConfig
from appliance.errors import EngineError, StoreError
from appliance.wire import KvStatus
from runtime import bits
from runtime.engine import Engine
from runtime.kv.approvals import APPROVALS, Approvals
from runtime.kv.contents import KV_DIRECTORY, KV_MASTER_KEY, configured
from runtime.kv.fingerprint import Fingerprint, fingerprint
from runtime.kv.keys import load_master_key
from runtime.kv.policy import HOUR_S, Policy
from runtime.kv.record import ALIGN_BYTES, Role
from runtime.kv.segment import SEGMENT_BYTES
from runtime.kv.store import KvStore
from runtime.load import load_engine
from runtime.server.keys import KeyFolder
from runtime.server.serve import check_tokenizer, run
from runtime.tokenizer import Tokenizer

_LOCATION = re.compile(rb"objects/[0-9a-f]{2}/([0-9a-f]{64})")


def serve_current(home: Path, *, profile: str | None = None) -> int:
    """Verify, load and serve until a signal; the exit code. ``profile`` overrides ``engine.profile``."""
    config = Config.load(home)
    profile = profile or config.engine.profile
    started_s = time.monotonic()
    bundle = VerifiedBundle.open_current(home)
    tokenizer = servable_tokenizer(bundle)
    _say(f"loading {bundle.bundle_id}, profile {profile}: {bundle.manifest.total_bytes:,} bytes, verified")
    engine = load_engine(
        bundle, profile=profile, threads=config.engine.threads, context_tokens=config.engine.context_tokens
    )  # fmt: skip
    engine.reuse_mixed = bits.rows_agree(engine)
    store, without_kv = open_store(home, bundle, engine, config)
    notes = describe(engine)
    _say(f"{engine.backend.description}; ready in {time.monotonic() - started_s:.1f} s; {notes[0]}")
    keys = KeyFolder(home / "keys")
    return run(
        config, engine, tokenizer, store, home=home, verify=keys.verify,
        bundle_id=bundle.bundle_id, profile=profile, backend_description=engine.backend.description,
        device=engine.backend.device,
        arithmetic=dataclasses.asdict(engine.backend.arithmetic), notes=notes, reuse_mixed=engine.reuse_mixed,
        is_approved=approved_texts(home) if store else lambda text: False,
        close=store.close if store else lambda: None, without_kv=without_kv,
    )  # fmt: skip


def servable_tokenizer(bundle: VerifiedBundle) -> Tokenizer:
    """The bundle's tokenizer, once it is clear that the bundle can be served; asked by the trial too.

    So no bundle becomes current that would then keep the server from starting. EngineError, UsageError or BundleError.
    """
    if bundle.spec.numerics == "kv-f32":
        raise EngineError(
            f"{bundle.bundle_id} keeps f32 caches (kv-f32), for parity checks with `solocard-export parity` only; "
            "build it with --numerics kv-v4 to serve it"
        )
    tokenizer = Tokenizer.from_file(bundle.tokenizer_path)
    check_tokenizer(tokenizer, bundle.spec.config.eos_token_id)
    return tokenizer


def describe(engine: Engine) -> tuple[str, ...]:
    """What a person should know about this server, in plain sentences, shown by /health and the console."""
    reuse = (
        "single tokens, tails and whole chunks give equal bits here: answers are reused as prompts"
        if engine.reuse_mixed
        else "single tokens and chunks differ in bits here: only whole prompt chunks are reused"
    )
    return (reuse, "runs on the CPU; Atlas cards: unverified on hardware")


def open_store(
    home: Path, bundle: VerifiedBundle, engine: Engine, config: Config
) -> tuple[KvStore | None, KvStatus | None]:
    """The KV store of this home, rooted in what the bundle computes; ``kv.enabled: false`` stores nothing.

    None when it cannot be opened, and a status with the reason: answers do not need it, so the server goes on and
    says why. BusyError still ends the start: another server has this home.
    """
    try:
        return _open_store(home, bundle, engine, config), None
    except StoreError as error:
        _say(f"serving without the KV cache: {error}")
        return None, dataclasses.replace(configured(config.kv), writing=False, reason=f"not opened: {error}")


def _open_store(home: Path, bundle: VerifiedBundle, engine: Engine, config: Config) -> KvStore:
    return KvStore.open(
        home / KV_DIRECTORY, layout=engine.layout, fingerprint=bundle_fingerprint(bundle, engine),
        master_key=load_master_key(home / KV_MASTER_KEY), policy=kv_policy(config.kv),
        segment_bytes=segment_bytes(config.kv.max_bytes),
    )  # fmt: skip


def segment_bytes(max_bytes: int) -> int:
    """How long a segment may get: room is made by whole ones, so a small cache has smaller ones, eight at least."""
    return min(SEGMENT_BYTES, max_bytes // 8 // ALIGN_BYTES * ALIGN_BYTES)


def kv_policy(config: KvConfig) -> Policy:
    """The bounds of the cache as ``config.yaml`` sets them."""
    ttl_s = dict.fromkeys(Role, config.ttl_hours * HOUR_S) | {Role.ANSWER: config.answer_ttl_hours * HOUR_S}
    return Policy(
        max_bytes=config.max_bytes * config.enabled, min_free_bytes=config.min_free_bytes,
        daily_write_bytes=config.daily_write_bytes, ttl_s=ttl_s,
    )  # fmt: skip


def approved_texts(home: Path) -> Callable[[str], bool]:
    """Whether a system prompt may be shared by all tenants (``solocard kv share``)."""
    return Approvals(home / KV_DIRECTORY / APPROVALS, load_master_key(home / KV_MASTER_KEY)).is_approved


def bundle_fingerprint(bundle: VerifiedBundle, engine: Engine) -> Fingerprint:
    """F of the engine's profile: the objects its graph maps, its graph, its id. Not the manifest's own digest.

    The model's config counts as part of the graph: what the host feeds it (RoPE rows) follows from the config alone,
    so two bundles may share graph and objects and still compute different rows.
    """
    files = {entry.path: entry.sha256 for entry in bundle.manifest.files}
    config = json.dumps(dataclasses.asdict(bundle.spec.config), sort_keys=True, separators=(",", ":"))
    graph = bundle.graph(engine.profile).read_bytes()
    graphs = [hashlib.sha256(graph).hexdigest(), hashlib.sha256(config.encode()).hexdigest()]
    return fingerprint(
        objects=mapped_objects(graph), graphs=graphs, profile=engine.profile,
        tokenizer_sha256=files["tokenizer.json"], encoding=bundle.spec.encoding, numerics=bundle.spec.numerics,
        layout_id=engine.layout.layout_id, arithmetic=engine.backend.arithmetic,
    )  # fmt: skip


def mapped_objects(graph: bytes) -> set[str]:
    """SHA-256 of every object a serialized graph refers to; its external_data locations are ``objects/ab/<sha256>``."""
    return {match[1].decode() for match in _LOCATION.finditer(graph)}


def _say(message: str) -> None:
    print(f"solocard-serve: {message}", file=sys.stderr, flush=True)
