"""Several profiles in one bundle: what is shared, what each adds, and what stops a profile from being built."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import onnx
import pytest
from build_support import a_release, build, no_goldens, stored_objects
from graph_support import view_engine
from view_support import cut_view, quantized, random_ranking, short_checkpoint

from appliance.bundle import BuiltBundle
from appliance.errors import CheckpointError, UsageError
from exporter.__main__ import main as export
from exporter.engine_process import engine_logits
from exporter.evaluate.gates import Waiver, default_bounds, judge
from exporter.evaluate.quality import Quality
from exporter.ops.moe import record_bytes
from exporter.overlay import OverlayWriter
from exporter.plan.budget import Ask
from exporter.plan.card import load
from exporter.plan.plan import make_plan
from exporter.release import write_bundle
from exporter.view import View

KEEP = 5
GOOD = {
    "kl_mean": 0.01, "kl_p99": 0.1, "top1": 0.99, "ppl_increase": 0.0, "layer_error": 0.1, "length_ppl_increase": 0.0,
    "needle_loss": 0.0, "greedy_agreement": 0.9, "continuation_nll_increase": 0.0, "loop_increase": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A checkpoint, its ranking, a plan of 5 experts with D4 and an FP8 head, and the overlay that does it."""
    folder = tmp_path_factory.mktemp("profiles")
    base = short_checkpoint(folder / "checkpoint")
    ranking = random_ranking(base)
    ranking.write(folder / "ranking.json")
    view = cut_view(base, KEEP, folder / "quantized")
    plan_of(base, folder / "plan.json")
    return folder, base, ranking, view


def plan_of(base, path, plan_id="small-card", keep=KEEP, **fields):
    plan = make_plan(base, load("atlas-350-112g"), Ask(4096, keep=keep, hash_rule="full"), plan_id=plan_id, **fields)
    plan.write(path)
    return plan


def quality_of(view, path, waivers=(), bounds=None, **measured):
    gates = judge(bounds or default_bounds(pruned=True), {**GOOD, **measured}, waivers)
    quality = Quality(
        view.recipe_sha256, view.source_sha256, {"kind": "test"}, "0" * 64, {"version": "test"}, {"kl": 0.01}, gates,
        tuple(waivers),
    )  # fmt: skip
    quality.write(path)
    return path


def profile_of(folder):
    return f"{folder / 'plan.json'},{folder / 'quantized'}"


def built(parts, out, **fields):
    folder, _, ranking, _ = parts
    fields = {"profiles": [profile_of(folder)], "reason": "test", "ranking": ranking} | fields
    return build(folder / "checkpoint", out, workers=2, **fields)


def places(bundle, graph):
    loaded = onnx.load(str(bundle / graph), load_external_data=False).graph
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in loaded.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL
    }  # fmt: skip


def test_a_profile_adds_only_what_its_overlays_touch(parts, tmp_path):
    _, _, _, view = parts
    alone = built(parts, tmp_path / "alone", profiles=[])
    manifest = built(parts, tmp_path / "b")
    full, small = BuiltBundle.open(tmp_path / "b").spec.profiles
    assert (full.id, small.id, small.card, small.experts_kept) == ("full", "small-card", "atlas-350-112g", (8, 5, 5))
    assert {o.sha256 for o in alone.objects} <= {o.sha256 for o in manifest.objects}
    assert full.overlay_objects == ()
    added = {o.sha256 for o in manifest.objects} - {o.sha256 for o in alone.objects}
    assert set(small.overlay_objects) == added
    touched = [name for overlay in view.overlays for name in overlay.tensors]
    assert 0 < len(added) <= len(touched)
    own, shared = places(tmp_path / "b", "model.small-card.onnx"), places(tmp_path / "b", "model.onnx")
    assert {name for name in own if own[name]["location"] != shared.get(name, {}).get("location")} == set(touched)
    objects = stored_objects(tmp_path / "b")
    for name in touched:
        assert objects[own[name]["location"][-64:]] == view.read(name).tobytes()
    record = record_bytes(view.config.hidden_size, view.config.moe_intermediate_size)
    assert int(own["layers.1.ffn.experts"]["length"]) == KEEP * record
    assert own["layers.1.ffn.experts"]["location"] == shared["layers.1.ffn.experts"]["location"]


def test_the_engine_on_a_profile_gives_the_bits_of_the_graph_of_its_view(parts, tmp_path):
    _, base, ranking, view = parts
    built(parts, tmp_path / "b")
    prompt = np.random.Generator(np.random.PCG64(1)).integers(2, view.config.vocab_size, 40).tolist()
    for profile, of in (("small-card", view), ("full", View(base, ranking=ranking))):
        (found,) = engine_logits(tmp_path / "b", [prompt], profile=profile)
        engine = view_engine(of, tmp_path / profile)
        expected = engine.forward(engine.open(), prompt, rows=range(40))
        assert np.array_equal(found, expected)


def test_a_layer_with_trained_experts_becomes_an_object_of_the_kept_ones(parts, tmp_path):
    folder, base, _, view = parts
    name = "layers.2.ffn.experts.3.w2.scale"
    scale = base.read("layers.0.ffn.experts.0.w2.scale")
    writer = OverlayWriter(tmp_path / "qad", "qad", view.recipe_sha256, {"texts_sha256": "7" * 64, "steps": 2})
    writer.add("layer_002", [(name, "F8_E8M0", scale)])
    writer.finish()
    manifest = built(parts, tmp_path / "b", profiles=[f"{profile_of(folder)},{tmp_path / 'qad'}"])
    own, shared = places(tmp_path / "b", "model.small-card.onnx"), places(tmp_path / "b", "model.onnx")
    experts = [f"layers.{layer}.ffn.experts" for layer in range(3)]
    assert [own[name]["location"] == shared[name]["location"] for name in experts] == [True, True, False]
    objects = stored_objects(tmp_path / "b")
    trained, stored = (objects[p["layers.2.ffn.experts"]["location"][-64:]] for p in (own, shared))
    record = record_bytes(view.config.hidden_size, view.config.moe_intermediate_size)
    assert len(trained) == KEEP * record
    at = 3 * record
    assert (trained[:at], trained[at + record :]) == (stored[:at], stored[at + record : KEEP * record])
    assert trained[at : at + record] != stored[at : at + record]
    assert scale.tobytes() in trained[at : at + record]
    (_, overlay) = manifest.provenance["profiles"]["small-card"]["overlays"]
    assert (overlay["stage"], overlay["inputs"]["texts_sha256"]) == ("qad", "7" * 64)
    assert manifest.provenance["profiles"]["small-card"]["without_quality"] == "test"


def test_two_cards_share_objects_and_any_number_of_workers_writes_the_same(parts, tmp_path):
    folder, base, ranking, _ = parts
    view = View(base, ranking=ranking, experts_kept=(8, 4, 4))
    quantized(view, tmp_path / "q4")
    plan_of(base, tmp_path / "four.json", "tiny-card", keep=4)
    profiles = [profile_of(folder), f"{tmp_path / 'four.json'},{tmp_path / 'q4'}"]
    one = built(parts, tmp_path / "a", profiles=profiles)
    two = write_bundle(
        a_release(folder / "checkpoint", ranking=ranking, profiles=profiles, reason="test"), tmp_path / "b",
        workers=5, find=no_goldens,
    )  # fmt: skip
    assert one.digest == two.digest
    assert one.profiles == ("full", "small-card", "tiny-card")
    single = built(parts, tmp_path / "c")
    assert {o.sha256 for o in one.objects} == {o.sha256 for o in single.objects}  # the same rounding of the same bytes


def test_quality_is_stored_and_must_be_of_the_model_that_is_built(parts, tmp_path):
    _, base, ranking, view = parts
    good = quality_of(view, tmp_path / "good.json")
    manifest = built(parts, tmp_path / "b", qualities=[good], reason=None)
    stored = json.loads((tmp_path / "b" / "quality.json").read_text())
    assert stored == {"format": 1, "profiles": {"small-card": json.loads(good.read_text())}}
    assert manifest.file("quality.json") is not None
    assert "without_quality" not in manifest.provenance["profiles"]["small-card"]
    other = quality_of(View(base, ranking=ranking, experts_kept=(8, 6, 6)), tmp_path / "other.json")
    with pytest.raises(UsageError, match=r"other\.json: recipe_sha256: measured on .* small-card is"):
        built(parts, tmp_path / "c", qualities=[other])
    with pytest.raises(UsageError, match="profile small-card has no --quality of its own"):
        built(parts, tmp_path / "c", reason=None)


def test_a_failed_gate_stops_the_build_until_a_person_waives_it(parts, tmp_path):
    _, _, _, view = parts
    failed = quality_of(view, tmp_path / "failed.json", kl_mean=0.4)
    message = r"failed gate kl_mean: measured 0\.4, bound at most 0\.05; .*evaluate --waive kl_mean=REASON"
    with pytest.raises(CheckpointError, match=message):
        built(parts, tmp_path / "b", qualities=[failed], reason="this does not help")
    missing = quality_of(view, tmp_path / "missing.json", top1=None)
    with pytest.raises(CheckpointError, match=r"gate top1: measured nothing, bound at least 0\.93"):
        built(parts, tmp_path / "b", qualities=[missing])
    waiver = Waiver("kl_mean", "demonstration only", "desk")
    waived = quality_of(view, tmp_path / "waived.json", [waiver], kl_mean=0.4)
    manifest = built(parts, tmp_path / "b", qualities=[waived], reason=None)
    assert manifest.provenance["profiles"]["small-card"]["waived"] == ["kl_mean"]
    assert json.loads((tmp_path / "b" / "quality.json").read_text())["profiles"]["small-card"]["waivers"] == [
        {"gate": "kl_mean", "reason": "demonstration only", "by": "desk"}
    ]
    loose = quality_of(view, tmp_path / "loose.json", bounds={**default_bounds(pruned=True), "kl_mean": 0.5})
    manifest = built(parts, tmp_path / "c", qualities=[loose], reason=None)
    looser = manifest.provenance["profiles"]["small-card"]["looser_than_planned"]
    assert looser == {"kl_mean": "0.5, planned 0.05"}


def test_wrong_profiles_are_named(parts, tmp_path):
    folder, base, *_ = parts
    with pytest.raises(UsageError, match=r"plan\.json: plans D4 for layers\.0\.attn\.wq_a, the overlays .* F8_E4M3"):
        built(parts, tmp_path / "b", profiles=[str(folder / "plan.json")])
    with pytest.raises(UsageError, match="a second profile called 'small-card'"):
        built(parts, tmp_path / "b", profiles=[profile_of(folder)] * 2)
    with pytest.raises(UsageError, match="quantized: was computed on another model"):
        built(parts, tmp_path / "b", ranking=random_ranking(base, 9))
    plan = plan_of(base, tmp_path / "full.json")
    dataclasses.replace(plan, id="full").write(tmp_path / "full.json")
    with pytest.raises(UsageError, match="'full' is the name of the whole model"):
        built(parts, tmp_path / "b", profiles=[str(tmp_path / "full.json")])
    dataclasses.replace(plan, source_sha256="0" * 64).write(tmp_path / "else.json")
    with pytest.raises(UsageError, match="planned for another checkpoint"):
        built(parts, tmp_path / "b", profiles=[str(tmp_path / "else.json")])
    with pytest.raises(UsageError, match="--profile: 17 of them, 16 at most"):
        built(parts, tmp_path / "b", profiles=["x"] * 17)
    cut = dataclasses.replace(plan, id="cut", dense="D8", head="bf16", experts_kept=(5, 5, 5))
    cut.write(tmp_path / "cut.json")
    with pytest.raises(CheckpointError, match="tid2eid: some tokens are routed to experts beyond the 5 kept"):
        built(parts, tmp_path / "b", profiles=[str(tmp_path / "cut.json")])
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_a_damaged_overlay_is_refused_before_anything_is_written(parts, tmp_path):
    folder, *_ = parts
    shutil.copytree(folder / "quantized", tmp_path / "worn")
    shard = tmp_path / "worn" / "layer_001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"layer_001\.safetensors: damaged \(SHA-256"):
        built(parts, tmp_path / "b", profiles=[f"{folder / 'plan.json'},{tmp_path / 'worn'}"])
    assert not (tmp_path / "b.partial").exists()


def test_a_resumed_build_of_another_profile_is_refused_by_name(parts, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("exporter.release.build_graph", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            built(parts, tmp_path / "b")
    with pytest.raises(UsageError, match=r"another recipe \(profile small-card without_quality: test there"):
        built(parts, tmp_path / "b", reason="another")


def test_the_command_builds_profiles_with_golden_tokens_of_their_own(parts, tmp_path, capsys):
    folder, *_ = parts
    arguments = ["build", str(folder / "checkpoint"), str(tmp_path / "b"), "--encoding", "dsv4-0731", "--workers", "2"]
    arguments += ["--ranking", str(folder / "ranking.json"), "--profile", profile_of(folder)]
    assert export([*arguments, "--without-quality", "random weights"]) == 0
    printed = capsys.readouterr()
    assert "profile small-card: atlas-350-112g, 5 to 8 experts a layer, quality not measured: random" in printed.out
    assert "left out: " in printed.err
    spec = BuiltBundle.open(tmp_path / "b").spec
    assert {golden.profile for golden in spec.goldens} == {"full", "small-card"}
    for profile in ("full", "small-card"):
        goldens = [golden for golden in spec.goldens if golden.profile == profile]
        logits = engine_logits(tmp_path / "b", [golden.prompt_ids for golden in goldens], profile=profile)
        assert [row[-1].argmax() for row in logits] == [golden.expected_ids[0] for golden in goldens]
