"""The layer-wise walk against the whole reference: equal logits, equal bytes after any kill, one layer in memory."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from appliance.errors import UsageError
from exporter.checkpoint import Checkpoint
from exporter.ranking import Ranking
from exporter.view import View

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from exporter import layer_reference, layerwise  # noqa: E402
from exporter.forced import forced_logits  # noqa: E402
from exporter.layer_reference import LayerReference  # noqa: E402
from exporter.layerwise import Walk, split  # noqa: E402
from exporter.reference import Reference  # noqa: E402

SEQUENCES = [list(range(3, 150)), [5], [9, 700, 9, 9, 300] * 8, list(range(700, 600, -1))]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def view(tiny_checkpoint: Path) -> View:
    return View(Checkpoint.open(tiny_checkpoint))


def whole(view: View, ids: list[int], **switches: bool) -> np.ndarray:
    """Logits of the plain reference, all weights in memory, all tokens at once."""
    reference = Reference.from_checkpoint(view.base, **switches)
    with torch.no_grad():
        return reference.forward(ids, reference.new_state()).numpy()


@pytest.mark.parametrize("kv_sim", [False, True])
def test_logits_are_the_references(view: View, tmp_path: Path, kv_sim: bool) -> None:
    found = list(forced_logits(view, SEQUENCES, work=tmp_path / "work", kv_sim=kv_sim))
    assert len(found) == len(SEQUENCES)
    for ids, logits in zip(SEQUENCES, found, strict=True):
        np.testing.assert_allclose(logits, whole(view, ids, kv_sim=kv_sim), rtol=0, atol=1e-5)


def test_sequences_go_on_in_the_next_batch(view: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In f32: with stored formats another schedule may round a cache row the other way, in the reference, too."""
    monkeypatch.setattr(layerwise, "MAX_BATCH_TOKENS", 100)
    monkeypatch.setattr(layer_reference, "MAX_STEP_ROWS", 48)
    found = list(forced_logits(view, SEQUENCES, work=tmp_path / "work", kv_sim=False))
    for ids, logits in zip(SEQUENCES, found, strict=True):
        expected = whole(view, ids, kv_sim=False)
        assert np.abs(logits - expected).max() <= 1e-5 * max(1.0, float(np.abs(expected).max()))


def test_streams_of_the_rounding_mode_are_spilled_in_bf16(view: View, tmp_path: Path) -> None:
    switches = {"act_sim": True, "kv_sim": True}
    reference = LayerReference(view, **switches)
    reference._linear = lambda name, x: reference._cast(x @ reference._w(f"{name}.weight").T)  # tiny: inputs below 128
    walk = Walk(reference, SEQUENCES[2:3], tmp_path / "work")
    walk.run()
    plain = Reference.from_checkpoint(view.base, **switches)
    plain._linear = lambda name, x: plain._cast(x @ plain._w(f"{name}.weight").T)
    with torch.no_grad():
        expected = plain.forward(SEQUENCES[2], plain.new_state())
    (_, streams), = walk.streams()
    np.testing.assert_allclose(reference.logits(streams), expected, rtol=0, atol=1e-5)
    assert np.load(tmp_path / "work" / "streams_007" / "batch_00000.npy").dtype == np.uint16


def test_a_cut_ranked_view_walks(view: View, tmp_path: Path) -> None:
    """Experts in reverse order, uncut: the same model, so the same logits to the bit."""
    order = tuple(reversed(range(8)))
    ranking = Ranking(view.source_sha256, "reverse", (order,) * 7)
    turned = View(view.base, ranking=ranking)
    (found,) = forced_logits(turned, SEQUENCES[2:3], work=tmp_path / "turned")
    np.testing.assert_allclose(found, whole(view, SEQUENCES[2], kv_sim=True), rtol=0, atol=1e-5)
    assert found.tobytes() == next(forced_logits(view, SEQUENCES[2:3], work=tmp_path / "plain")).tobytes()
    cut = View(view.base, ranking=ranking, experts_kept=(8, 8, 8, 4, 4, 4, 4))
    (pruned,) = forced_logits(cut, SEQUENCES[2:3], work=tmp_path / "cut")
    assert np.abs(pruned - found).max() > 1e-2


class KilledError(Exception):
    pass


@pytest.mark.parametrize("writes", [0, 3, 8, 15])
def test_killed_and_resumed_gives_equal_bytes(
    view: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    monkeypatch.setattr(layerwise, "MAX_BATCH_TOKENS", 120)
    sequences = SEQUENCES[1:]
    once = np.concatenate(list(forced_logits(view, sequences, work=tmp_path / "once")))
    count, real = itertools.count(), layerwise.StreamSpill.write

    def dying(self: layerwise.StreamSpill, layer: int, batch: int, streams: torch.Tensor) -> None:
        if next(count) == writes:
            raise KilledError
        real(self, layer, batch, streams)

    monkeypatch.setattr(layerwise.StreamSpill, "write", dying)
    with pytest.raises(KilledError):
        list(forced_logits(view, sequences, work=tmp_path / "killed"))
    monkeypatch.setattr(layerwise.StreamSpill, "write", real)
    again = np.concatenate(list(forced_logits(view, sequences, work=tmp_path / "killed")))
    assert again.tobytes() == once.tobytes()
    assert [path.name for path in sorted((tmp_path / "killed").iterdir())] == ["recipe.json", "streams_007"]


def test_only_one_layer_is_held(view: View, tmp_path: Path) -> None:
    reference = LayerReference(view)
    held: list[set[str]] = []

    def remember(layer: int) -> None:
        names = {*reference._tensors, *reference._stored}
        held.append({".".join(name.split(".")[:2]) for name in names})
        assert not any(".experts." in name for name in reference._tensors)  # never f32 for longer than its turn
        assert any(".experts." in name for name in reference._stored)

    Walk(reference, SEQUENCES[:1], tmp_path / "work").run(layer_done=remember)
    assert held == [{f"layers.{layer}"} for layer in range(7)]


@pytest.mark.parametrize("rows", [128, 4096])
def test_weights_are_the_views(view: View, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """FP8, FP4, BF16 and F32, made f32 some rows at a time."""
    monkeypatch.setattr(layer_reference, "DEQUANTIZED_ROWS", rows)
    reference = LayerReference(view)
    for name in ("head.weight", "layers.2.attn.wq_b.weight", "layers.2.attn.wo_a.weight", "layers.2.hc_ffn_fn",
                 "layers.2.attn.wkv.weight", "layers.2.ffn.experts.3.w1.weight", "norm.weight"):
        assert reference._w(name).numpy().tobytes() == view.float32(name).tobytes()
    name = "layers.2.ffn.experts.3.w2.weight"  # FP4 as a dense linear is after quantize
    assert reference._dense_f32(name).tobytes() == view.float32(name).tobytes()


def test_split_covers_every_token_once() -> None:
    batches = split(SEQUENCES, 64)
    assert [batch.tokens for batch in batches[:-1]] == [64] * (len(batches) - 1)
    assert torch.cat([batch.ids for batch in batches]).tolist() == [t for ids in SEQUENCES for t in ids]
    owners = torch.cat([batch.sequence_of for batch in batches]).tolist()
    assert owners == [number for number, ids in enumerate(SEQUENCES) for _ in ids]


def test_refusals(view: View, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"sequence 1: expected at least one token id, all from 0 to 767"):
        list(forced_logits(view, [[1], [768]], work=tmp_path / "a"))
    list(forced_logits(view, [[1]], work=tmp_path / "b"))
    with pytest.raises(UsageError, match=r"was made by another recipe \(sequences"):
        list(forced_logits(view, [[2]], work=tmp_path / "b"))
    with pytest.raises(UsageError, match="--device npu: torch_npu cannot be imported"):
        list(forced_logits(view, [[1]], work=tmp_path / "c", device="npu"))
    with pytest.raises(UsageError, match="--device tpu: expected one of cpu, cuda, npu"):
        list(forced_logits(view, [[1]], work=tmp_path / "c", device="tpu"))
