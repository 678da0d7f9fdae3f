"""The whole chain in one process within seconds: sample → objects and graph → engine → prefill, decode, KV round trip.

It runs in an interpreter of its own, so that what it imports is known: no torch, and the graph is made of the op set's
function bodies without onnxscript.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "onnxscript", "transformers", "onnx_ir")


def chain(folder: Path) -> dict[str, object]:
    """Runs in the child: what came out, as JSON types."""
    import functools

    import numpy as np
    from graph_support import quick_engine

    from exporter.sample import write_sample
    from runtime.kv.fingerprint import fingerprint
    from runtime.kv.record import Role
    from runtime.kv.store import KvStore, Policy, PutJob, Unit

    write_sample(folder / "checkpoint", "tiny", seed=3)
    engine = quick_engine(folder / "checkpoint", folder / "bundle", context_tokens=512, max_sequences=2)
    ids = np.random.default_rng(3).integers(0, engine.spec.config.vocab_size, 300).tolist()
    seq = engine.open()
    engine.prefill(seq, ids[:256])
    checkpoint = seq.checkpoint
    assert checkpoint is not None
    cold = [engine.prefill(seq, ids[256:])]
    cold.append(engine.decode(seq, int(cold[0].argmax())))

    identity = fingerprint(
        objects=["00"], graphs=["11"], profile="full", tokenizer_sha256="22", encoding=engine.spec.encoding,
        numerics=engine.spec.numerics, layout_id=engine.layout.layout_id, arithmetic=engine.backend.arithmetic,
    )  # fmt: skip
    store = KvStore.open(
        folder / "kv", layout=engine.layout, fingerprint=identity, master_key=bytes(32),
        policy=Policy(max_bytes=1 << 30),
    )  # fmt: skip
    units = [Unit(256, Role.PROMPT, checkpoint[1])]
    stored = store.put(PutJob("default", ids[:256], {0: engine.export_block(seq, 0)}, units))
    other = engine.open()
    hit = store.lookup("default", ids, functools.partial(engine.import_block, other))
    store.close()
    engine.resume(other, hit.tokens, checkpoint=hit.checkpoint, blocks=hit.blocks)
    warm = [engine.prefill(other, ids[256:])]
    warm.append(engine.decode(other, int(warm[0].argmax())))
    return {
        "finite": bool(np.isfinite(cold).all()), "vocab": [row.shape[0] for row in cold],
        "stored": stored.stored, "hit_tokens": hit.tokens, "difference": float(np.abs(np.subtract(cold, warm)).max()),
        "heavy": [name for name in HEAVY if name in sys.modules],
    }  # fmt: skip


def test_the_chain_holds_with_function_bodies_alone(tmp_path: Path) -> None:
    here = Path(__file__).parent
    code = "import json, pathlib, sys, test_smoke; print(json.dumps(test_smoke.chain(pathlib.Path(sys.argv[1]))))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)], env=env, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "finite": True, "vocab": [768, 768], "stored": True, "hit_tokens": 256, "difference": 0.0, "heavy": [],
    }  # fmt: skip
