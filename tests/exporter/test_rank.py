"""Rankings from hand-made statistics; the token tables of cut hash layers; refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from appliance.errors import CheckpointError
from exporter.__main__ import main
from exporter.checkpoint import Checkpoint
from exporter.hash_rule import rewritten
from exporter.overlay import Overlay
from exporter.ranking import Ranking
from exporter.safetensors_file import write_file
from exporter.stage import write_json
from exporter.view import View

EXPERTS, LAYERS, HASHED, PER_TOKEN = 8, 7, 3, 2


@pytest.fixture
def observed(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Statistics of two domains, drawn; expert 6 of layer 4 is a super expert, expert 2 of layer 5 saw no token."""
    draw, folder, files = np.random.default_rng(3), tmp_path / "stats", []
    folder.mkdir()
    for layer in range(LAYERS):
        count = draw.integers(1, 50, (2, EXPERTS))
        count[:, 2] *= layer != 5
        path = folder / f"layer_{layer:03d}.safetensors"
        saliency = (draw.random((2, EXPERTS)) * count).astype(np.float32)
        write_file(path, [("reap_sum", "F32", saliency), ("count", "I64", count)])
        files.append({"name": path.name, "size_bytes": path.stat().st_size, "sha256": ""})
    write_json(folder / "observe.json", {
        "format": 1, "files": files, "source_sha256": Checkpoint.open(tiny_checkpoint).source_sha256,
        "domains": ["code", "prose"], "experts": EXPERTS, "super_experts": [[4, 6]], "recipe": {"texts_sha256": ""},
    })
    return folder


def raw(folder: Path, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """reap_sum and count, read with plain numpy."""
    data = (folder / f"layer_{layer:03d}.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    sums = np.frombuffer(data, "<f4", 16, start).reshape(2, 8).astype(np.float64)
    return sums, np.frombuffer(data, "<i8", 16, start + 64).reshape(2, 8)


@pytest.mark.parametrize("score", ["reap-mean", "reap-sum", "frequency"])
def test_learned_layers_by_score(tiny_checkpoint: Path, observed: Path, tmp_path: Path, score: str) -> None:
    out = tmp_path / "ranking.json"
    command = ["rank", str(tiny_checkpoint), str(observed), "--score", score, "--out", str(out)]
    assert main([*command, "--domain-weight", "prose=3"]) == 0
    ranking = Ranking.read(out)
    assert ranking.orders[:HASHED] == (tuple(range(EXPERTS)),) * HASHED
    for layer in range(HASHED, LAYERS):
        sums, count = raw(observed, layer)
        total, seen = sums[0] + 3 * sums[1], count[0] + 3 * count[1]
        value = {"reap-mean": total / np.maximum(seen, 1), "reap-sum": total, "frequency": seen}[score]
        expected = sorted(range(EXPERTS), key=lambda e: (not (layer == 4 and e == 6), -value[e], e))
        assert ranking.orders[layer] == tuple(expected)
    assert ranking.orders[4][0] == 6
    if score != "reap-mean":
        assert ranking.orders[5][-1] == 2
    View(Checkpoint.open(tiny_checkpoint), ranking=ranking)


def test_orders_without_statistics(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = {}
    for name, options in (("first", ["first"]), ("a", ["random"]), ("b", ["random"]), ("c", ["random", "--seed", "1"])):
        assert main(["rank", str(tiny_checkpoint), "--out", str(tmp_path / name), "--score", *options]) == 0
        found[name] = Ranking.read(tmp_path / name).orders
    assert found["first"] == (tuple(range(EXPERTS)),) * LAYERS
    assert found["a"] == found["b"] != found["c"]
    assert len(set(found["a"][HASHED:])) == LAYERS - HASHED
    assert found["a"][:HASHED] == found["first"][:HASHED]


def test_a_cut_hash_layer_names_kept_experts_only(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, overlay, kept = tmp_path / "ranking.json", tmp_path / "hash", (5, 8, 4, 4, 4, 4, 4)
    (tmp_path / "plan.json").write_text(json.dumps({"experts_kept": kept}))
    command = ["rank", str(tiny_checkpoint), "--score", "random", "--out", str(out)]
    assert main([*command, "--overlay-out", str(overlay), "--plan", str(tmp_path / "plan.json")]) == 0
    assert "of the token table entries moved" in capsys.readouterr().out
    base, ranking = Checkpoint.open(tiny_checkpoint), Ranking.read(out)
    view = View(base, ranking=ranking, experts_kept=kept)
    with pytest.raises(CheckpointError, match="some tokens are routed to experts beyond the 5 kept"):
        view.read("layers.0.ffn.gate.tid2eid")
    view = view.over(Overlay.open(overlay))
    for layer in (0, 2):
        gate = base.float32(f"layers.{layer}.ffn.gate.weight").astype(np.float64)
        alive = ranking.orders[layer][: kept[layer]]
        official = base.read(f"layers.{layer}.ffn.gate.tid2eid")
        found = np.array(ranking.orders[layer])[view.read(f"layers.{layer}.ffn.gate.tid2eid")]
        for row, new in zip(official.tolist(), found.tolist(), strict=True):
            expected = list(row)
            for slot, expert in enumerate(row):
                if expert not in alive:
                    free = [e for e in alive if e not in expected]
                    expected[slot] = max(free, key=lambda e: float(
                        gate[expert] @ gate[e] / np.linalg.norm(gate[expert]) / np.linalg.norm(gate[e])
                    ))
            assert new == expected
    assert not Overlay.open(overlay).tensors.keys() & {"layers.1.ffn.gate.tid2eid"}


def test_rewriting_leaves_what_is_kept() -> None:
    table = np.array([[0, 1], [3, 1], [3, 2], [2, 0]])
    preferred = np.array([[0, 1, 2], [0, 1, 2], [0, 1, 2], [2, 1, 0]])
    np.testing.assert_array_equal(rewritten(table, preferred, 3), [[0, 1], [2, 1], [1, 2], [2, 0]])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--score", "reap-mean"], "--score reap-mean needs STATS"),
        (["--score", "first", "--keep", "4"], "--overlay-out DIR needs --plan FILE or --keep K"),
        (["--score", "first", "--overlay-out", "o"], "--overlay-out DIR needs --plan FILE or --keep K"),
        (["--score", "random", "--seed", "-1"], "--seed -1: expected at least 0"),
        (["--score", "first", "--domain-weight", "x"], "--domain-weight x: expected NAME=W"),
        (["--score", "first", "--keep", "8", "--overlay-out", "o"], "no layer routed by token id is cut"),
    ],
)
def test_refusals(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    options: list[str], words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["rank", str(tiny_checkpoint), "--out", str(tmp_path / "r.json"), *options]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_domain(tiny_checkpoint: Path, observed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rank", str(tiny_checkpoint), str(observed), "--domain-weight", "law=2"]) == 2
    assert "--domain-weight law" in capsys.readouterr().err
