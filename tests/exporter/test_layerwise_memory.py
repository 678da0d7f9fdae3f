"""A walk's memory: a process that observes never holds a layer's experts as floats."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.presets import TINY
from exporter.sample import write_random

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

EXPERTS, DIMS, LAYERS = 96, 512, 2
FLOAT_LAYER_MB = EXPERTS * 3 * DIMS * DIMS * 4 / 1e6  # 302 MB; stored 40 MB
SCRIPT = """
import sys
from pathlib import Path
import torch
from exporter.calibration import Text
from exporter.checkpoint import Checkpoint
from exporter.observe.run import ObserveOptions, observe
from exporter.view import View

def peak_kb():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])

torch.set_num_threads(1)
before = peak_kb()
out = Path(sys.argv[2])
texts = [Text("a", tuple((7 * i + n) % 768 for i in range(128))) for n in range(2)]
observe(View(Checkpoint.open(Path(sys.argv[1]))), texts, out, out.with_name("work"), ObserveOptions("0" * 64))
print(peak_kb() - before)
"""


def test_one_layer_of_stored_bytes(tmp_path: Path) -> None:
    config = dataclasses.replace(
        TINY, hidden_size=DIMS, moe_intermediate_size=DIMS, n_routed_experts=EXPERTS, num_experts_per_tok=6,
        num_hidden_layers=LAYERS, compress_ratios=(0, 0), num_hash_layers=0,
    )  # fmt: skip
    write_random(tmp_path / "checkpoint", config, mtp=0)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "checkpoint"), str(tmp_path / "stats")],
        check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert len(json.loads((tmp_path / "stats" / "observe.json").read_text())["files"]) == LAYERS
    grown_mb = int(done.stdout) / 1e3
    stored_mb = sum(p.stat().st_size for p in (tmp_path / "checkpoint").glob("*.safetensors")) / 1e6 / LAYERS
    assert grown_mb < stored_mb + 110 < FLOAT_LAYER_MB / 1.5, f"{grown_mb:.0f} MB for {stored_mb:.0f} MB a layer"
