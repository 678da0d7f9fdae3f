"""plan and inspect: the real model's totals from headers, every byte of a card, bounds by hand, refusals by name."""

import dataclasses
import io
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml
from student_support import fp8_head, overlaid, random_fp4_linears

from appliance.errors import CheckpointError, SpaceError, UsageError
from appliance.manifest import Manifest
from exporter import inventory, official, spec
from exporter.__main__ import main
from exporter.checkpoint import Checkpoint
from exporter.object_plan import base_plans, profile_plans
from exporter.plan import card as cards
from exporter.plan import command
from exporter.plan.bound import bound, kv_read_bytes
from exporter.plan.budget import Ask, fit, kv_bytes
from exporter.plan.kinds import KINDS, kind_of, survey
from exporter.plan.plan import Plan, context_name, make_plan
from exporter.plan.report import BAR_CHARS, bar, gigabytes
from exporter.plan.weights import weights_of
from exporter.presets import TINY, V4_FLASH
from exporter.safetensors_file import write_streamed
from exporter.view import View
from exporter.view_arguments import planned_experts

EXPERT = 13_369_344  # bytes of one expert of the real model (V4 spec)


def write_headers(folder, **draft):
    """The real model's shards at their real sizes, every tensor a hole: no disk, only headers."""
    entries = inventory.expected_tensors(V4_FLASH, **draft)
    files = official.shard_files(entries)
    folder.mkdir()
    for file, names in files.items():
        write_streamed(folder / file, [(n, entries[n][1], entries[n][0]) for n in names], lambda name: None)
    official.write_index(folder, files, inventory.size_bytes(entries))
    (folder / "config.json").write_text(json.dumps(spec.config_json(V4_FLASH, mtp_layers=3)))
    return folder


@pytest.fixture(scope="module")
def preview(tmp_path_factory):
    return write_headers(tmp_path_factory.mktemp("real") / "preview", mtp=1)


@pytest.fixture(scope="module")
def real(preview):
    return Checkpoint.open(preview)


@pytest.fixture(scope="module")
def weights(real):
    return {(dense, head): weights_of(real, dense, head) for dense in ("D4", "D8") for head in ("fp8", "bf16")}


@pytest.fixture(scope="module")
def known():
    return {card.id: card for card in cards.built_in()}


def tiny_card(tmp_path, memory_bytes, **changes):
    """A card file for the tiny checkpoint."""
    numbers = {"devices": 1, "device_memory_bytes": memory_bytes, "bandwidth_bytes_per_s": 10**9,
               "host_link_bytes_per_s": 10**8, "free_percent": 0, "workspace_bytes": 100_000,
               "soc": "none", "fp4": "storage"}  # fmt: skip
    raw = {field: {"value": value, "source": "made up", "verified": True} for field, value in numbers.items()}
    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump({"id": "toy", "name": "Toy", "notes": [], **raw, **changes}))
    return path


def tiny_memory(checkpoint, keep, context=4096):
    """Bytes a device needs for ``keep`` experts in every learned layer of the tiny model, counted tensor by tensor."""
    total = kv_bytes(TINY, context) + 100_000
    for name, info in checkpoint.tensors.items():
        expert = re.search(r"experts\.(\d+)\.", name)
        if name.startswith(("mtp.", "embed.")) or (expert and "shared" not in name):
            continue
        size = info.size_bytes
        if info.dtype == "F8_E4M3":  # a scale per 128×128 becomes one per 32
            size = size // 2 + size // 32
        elif name.endswith(".scale"):
            size = 0
        elif name == "head.weight":
            size = 768 * 128 + 6
        layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
        if re.search(r"ffn\.gate\.(weight|bias)", name) and layer >= TINY.num_hash_layers:
            size = size // 8 * keep
        total += size
    record = -(-3 * 64 * 128 * 17 // 32 // 4096) * 4096
    return total + record * (8 * TINY.num_hash_layers + keep * (TINY.num_hidden_layers - TINY.num_hash_layers))


# ---- inspect


def test_the_real_inventory_to_the_byte(preview, real, capsys):
    assert sum(path.stat().st_blocks * 512 for path in preview.iterdir()) < 64 << 20  # the shards are holes
    found = survey(real)
    assert (found.tensors, found.size_bytes, found.files) == (69_187, 159_609_485_896, 46)
    assert dict(found.layers) == {"S": 2, "C": 21, "H": 20}
    assert (found.hash_layers, found.draft, found.draft_complete) == (3, "1 MTP block", True)
    assert {kind: size for kind, (_, size) in found.by_kind.items()} == {
        "routed": 147_169_738_752, "attention": 4_599_478_144, "shared": 1_082_196_480, "compressors": 525_722_624,
        "indexers": 275_353_344, "mhc": 135_537_756, "gates": 108_834_816, "norms": 712_704,
        "head": 1_059_061_760, "embed": 1_059_061_760, "draft": 3_593_787_756,
    }  # fmt: skip
    assert {dtype: count for dtype, (count, _) in found.by_dtype.items()} == {
        "BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34_167, "I8": 33_792, "I64": 3,
    }  # fmt: skip


def test_the_refresh_to_the_byte(tmp_path, capsys):
    folder = write_headers(tmp_path / "refresh", dspark=inventory.DSpark())
    assert main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tensors"], found["bytes"], found["files"]) == (72_317, 166_878_536_440, 48)
    assert found["by_kind"]["draft"]["bytes"] == 10_862_838_300
    assert (found["draft"], found["draft_complete"]) == ("DSpark, 3 stages", True)


def test_inspect_names_what_is_not_there(tiny_checkpoint, capsys):
    assert main(["inspect", str(tiny_checkpoint)]) == 0
    shown = capsys.readouterr().out
    assert "7 layers: 3 sliding window (S), 2 compressed, indexed (C), 2 heavily compressed (H)" in shown
    assert "draft stages: 1 MTP block" in shown
    assert main(["inspect", str(tiny_checkpoint / "nowhere")]) == 3
    assert "not a folder" in capsys.readouterr().err


def test_every_tensor_has_a_kind():
    entries = inventory.expected_tensors(V4_FLASH, mtp=1)
    assert {kind_of(name) for name in entries} == set(KINDS)


# ---- what fits


@pytest.mark.parametrize(("gigabytes_", "context", "d8", "d4"), [
    (32, "128k", 34, 39), (48, "128k", 60, 65), (64, "128k", 86, 91), (84, "128k", 119, 124), (112, "128k", 165, 170),
    (32, "1m", 28, 33), (48, "1m", 55, 59), (64, "1m", 81, 85), (84, "1m", 113, 118), (112, "1m", 159, 164),
])  # fmt: skip
def test_experts_per_layer_as_the_distillation_plan_has_them(weights, known, gigabytes_, context, d8, d4):
    """Its table cuts every layer alike. Ours cuts router rows, too, and has the indexer's query in D4: 0 or 1 more."""
    (card,) = [card for card in known.values() if card.device_memory_bytes == gigabytes_ * 10**9]
    more = {(32, "1m"): (1, 0), (64, "1m"): (0, 1)}.get((gigabytes_, context), (0, 0))
    for dense, expected, extra in (("D8", d8, more[0]), ("D4", d4, more[1])):
        budget = fit(weights[dense, "fp8"], card, Ask(command.parse_context(context), hash_rule="cut"))
        assert set(budget.experts_kept) == {expected + extra}


@pytest.mark.parametrize(("dense", "context", "keep"), [
    ("D4", 131072, 163), ("D4", 1 << 20, 157), ("D8", 131072, 158), ("D8", 1 << 20, 152),
])  # fmt: skip
def test_the_largest_card_with_hash_layers_whole(weights, known, dense, context, keep):
    budget = fit(weights[dense, "fp8"], known["atlas-350-112g"], Ask(context))
    assert budget.experts_kept == (256,) * 3 + (keep,) * 40
    assert budget.hash_layers == "full"


def test_every_byte_of_a_device_is_accounted_for(weights, known):
    for card in known.values():
        for ask in (Ask(131072), Ask(4096, "tiered"), Ask(131072, keep=20, sequences=2)):
            for model in weights.values():
                budget = fit(model, card, ask)
                assert sum(budget.device.values()) + budget.headroom_bytes == card.device_memory_bytes
                assert budget.device["routed"] == sum(budget.experts_resident) * EXPERT
                assert budget.headroom_bytes >= 0
                if ask.keep is None:
                    assert budget.headroom_bytes < 43 * (EXPERT + 8196)  # one more expert a layer would not fit


def test_dense_formats_by_hand(weights):
    """D4: 4.25 of 8.0005 bits a weight; the head's BF16 halves; tid2eid stays I64 (V4 spec and distillation plan)."""
    d8, d4 = weights["D8", "fp8"], weights["D4", "fp8"]
    everything = (256,) * 43
    assert sum(d8.dense.values()) + d8.gate_rows(everything) == pytest.approx(7.24e9 + 14e6, rel=1e-3)
    linears = 43 * (1024 * 4096 + 32768 * 1024 + 512 * 4096 + 8192 * 4096 + 4096 * 8192 + 3 * 2048 * 4096)
    indexer = 21 * 8192 * 1024
    small = sum(V4_FLASH.num_attention_heads * 4 + (1024 + 512) * 2 for _ in range(43))
    assert d4.dense["attention"] + d4.dense["shared"] - small == linears * 17 // 32
    assert d8.dense["indexers"] - d4.dense["indexers"] == indexer + 21 * 64 * 8 - indexer * 17 // 32
    assert d4.added_objects == (linears + indexer) * 17 // 32 + 129280 * 4096 + 1010 * 32
    assert weights["D8", "bf16"].added_objects == 0
    assert d4.dense["head"] == 129280 * 4096 + 1010 * 32
    assert d4.record == EXPERT
    assert d4.base_objects == 156_015_698_140


def test_hash_layers_are_cut_below_80_of_256(weights, known):
    model, card = weights["D4", "fp8"], known["300i-a2-64g"]
    assert fit(model, card, Ask(131072)).experts_kept == (91,) * 43  # whole, 79 would be left
    assert fit(model, card, Ask(4096)).experts_kept == (256,) * 3 + (80,) * 40
    assert fit(model, card, Ask(131072, hash_rule="full")).experts_kept == (256,) * 3 + (79,) * 40
    assert fit(model, card, Ask(131072, keep=70)).experts_kept == (256,) * 3 + (70,) * 40
    assert fit(model, card, Ask(131072, keep=85)).experts_kept == (85,) * 43
    assert fit(weights["D8", "fp8"], card, Ask(131072)).experts_kept == (86,) * 43


def test_tiered_keeps_everything(weights, known):
    budget = fit(weights["D4", "fp8"], known["atlas-350-112g"], Ask(131072, "tiered"))
    assert set(budget.experts_kept) == {256}
    assert set(budget.experts_resident) == {170}
    assert budget.host == {"embed": 1_059_061_760, "cold experts": 43 * 86 * EXPERT}


def test_cache_bytes_by_hand():
    """V4 spec: rows of 584 and 68 bytes every 4 (CSA) or 128 (HCA) tokens, windows of 128, f32 rings; one pool more."""
    block = 256 * (21 * (584 + 68) // 4) + 2 * 20 * 584
    slot = 43 * 128 * 584 + 4 * (21 * (8 * 2048 + 8 * 512) + 20 * 128 * 1024)
    assert kv_bytes(V4_FLASH, 131072) == 513 * block + 2 * slot
    assert kv_bytes(V4_FLASH, 1) == 2 * block + 2 * slot
    assert kv_bytes(V4_FLASH, 4096, 3) == (1 + 3 * 16) * block + 4 * slot


def test_bandwidth_bound_by_hand(weights, known):
    """Distillation plan: 6 × 43 experts of 3.449 GB and the dense part over 1.4 TB/s: 174 tokens/s in D4, 131 in D8."""
    card, ask = known["atlas-350-112g"], Ask(1)
    rates = {}
    for dense in ("D4", "D8"):
        budget = fit(weights[dense, "fp8"], card, ask)
        limit = bound(weights[dense, "fp8"], card, budget, 1)
        assert limit.expert_bytes == 6 * 43 * EXPERT
        tables = 3 * 129280 * 6 * 8  # of tid2eid a token reads one row
        assert limit.dense_bytes == sum(budget.device[kind] for kind in KINDS if kind in budget.device
                                        and kind not in ("routed", "embed", "draft")) - tables  # fmt: skip
        read = limit.expert_bytes + limit.dense_bytes + limit.kv_bytes
        assert limit.tokens_per_s == limit.tokens_per_s_all_hits == pytest.approx(1.4e12 / read)
        rates[dense] = limit.tokens_per_s
    assert rates["D8"] == pytest.approx(131, abs=1)
    assert 174 <= rates["D4"] <= 178  # the indexer's query is in our D4: 83 MB less
    assert kv_read_bytes(V4_FLASH, 131072) == 43 * 128 * 584 + 21 * (512 * 584 + 32768 * 68) + 20 * 1024 * 584


def test_misses_wait_for_the_host_link(weights, known):
    card, model = known["300i-a2-32g"], weights["D4", "fp8"]
    budget = fit(model, card, Ask(131072, "tiered"))
    limit = bound(model, card, budget, 131072)
    resident = budget.experts_resident[0]
    assert limit.miss_bytes == pytest.approx(6 * 43 * EXPERT * (1 - resident / 256), rel=1e-9)
    read = limit.expert_bytes + limit.dense_bytes + limit.kv_bytes
    seconds = (read - limit.miss_bytes) / 8e11 + limit.miss_bytes / 31.5e9 / 2
    assert limit.tokens_per_s == pytest.approx(1 / seconds, rel=1e-2)  # PCIe 5.0 x16: twice 31.5 GB/s


# ---- refusals


def test_what_does_not_fit_is_refused_with_the_bytes_needed(weights, known):
    model = weights["D8", "bf16"]
    small = dataclasses.replace(known["300i-a2-32g"], device_memory_bytes=12 * 10**9)
    with pytest.raises(SpaceError) as caught:
        fit(model, small, Ask(1 << 20))
    fixed = sum(model.dense.values()) + kv_bytes(V4_FLASH, 1 << 20) + 25 * 10**8 + 72 * 10**7
    needed = fixed + 43 * 6 * (EXPERT + 8192) + 40 * 6 * 4
    assert f"needs {needed:,} bytes ({fixed:,} of them without experts)" in str(caught.value)
    assert "has 12,000,000,000" in str(caught.value)
    with pytest.raises(SpaceError, match="tiered with no expert resident"):
        fit(model, small, Ask(1 << 20, "tiered"))
    with pytest.raises(SpaceError, match="pruned to 200 experts a layer"):
        fit(model, known["atlas-350-112g"], Ask(131072, keep=200))


@pytest.mark.parametrize(("ask", "message"), [
    (Ask(0), "--context 0: expected 1 to 1048576"), (Ask((1 << 20) + 1), "--context 1048577"),
    (Ask(4096, keep=5), r"--keep 5: expected 6 \(experts per token\) to 256"), (Ask(4096, keep=257), "--keep 257"),
    (Ask(4096, "tiered", keep=8), "--keep and --mode tiered"), (Ask(4096, sequences=0), "--sequences 0"),
])  # fmt: skip
def test_wrong_asks_are_named(weights, known, ask, message):
    with pytest.raises(UsageError, match=message):
        fit(weights["D4", "fp8"], known["atlas-350-112g"], ask)


def test_a_disk_that_is_too_small(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    card = tiny_card(tmp_path, 10**9)
    line = ["plan", str(tiny_checkpoint), "--card", str(card), "--context", "4k", "--disk", str(tmp_path)]
    assert main(line) == 0
    bundle = int(re.search(r"bundle: ([\d,]+) bytes", capsys.readouterr().out)[1].replace(",", ""))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=bundle))
    assert main(line) == 0
    capsys.readouterr()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=bundle - 1))
    assert main([*line, "--out", str(tmp_path / "plan.json")]) == 8
    assert f"the bundle needs {bundle:,} bytes and {bundle - 1:,} are free" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()
    assert main([*line[:-1], str(tmp_path / "nowhere")]) == 2


# ---- cards


def test_every_number_of_a_card_has_a_source(known):
    assert set(known) == {"atlas-350-112g", "atlas-350-84g", "300i-a2-64g", "300i-a2-32g", "300i-duo-96g"}
    for card in known.values():
        assert set(card.sources) == {"soc", "fp4", "devices", "device_memory_bytes", "bandwidth_bytes_per_s",
                                     "host_link_bytes_per_s", "free_percent", "workspace_bytes"}  # fmt: skip
        assert all(len(source) > 10 for source in card.sources.values())
        assert set(card.unverified) == set(card.sources)  # no card was here
        assert card.free_bytes == card.device_memory_bytes * 6 // 100
    duo = known["300i-duo-96g"]
    assert (duo.devices, duo.device_memory_bytes) == (2, 48 * 10**9)
    assert "the other stays unused" in duo.notes[0]


@pytest.mark.parametrize(("changes", "message"), [
    ({"devices": 1}, "devices: expected {value, source, verified}"),
    ({"devices": {"value": 0, "source": "x", "verified": True}}, "devices: found 0, expected an integer from 1"),
    ({"devices": {"value": True, "source": "x", "verified": True}}, "devices: found True"),
    ({"fp4": {"value": "maybe", "source": "x", "verified": True}}, "fp4: found 'maybe', expected native or storage"),
    ({"soc": {"value": "x", "source": 1, "verified": True}}, "soc: source must be text"),
    ({"extra": 1}, "extra is not known"), ({"id": "A B"}, "id: found 'A B'"), ({"notes": [1]}, "name and notes"),
])  # fmt: skip
def test_a_wrong_card_is_named(tmp_path, changes, message):
    path = tiny_card(tmp_path, 10**6, **changes)
    with pytest.raises(UsageError, match=re.escape(f"{path}: {message}")):
        cards.load(str(path))


def test_card_files_that_are_none(tmp_path):
    with pytest.raises(UsageError, match="--card gpu: not known; choose 300i-a2-32g"):
        cards.load("gpu")
    (tmp_path / "a.yaml").write_text("a: [")
    (tmp_path / "b.yaml").write_text("- 1")
    for name, message in (("a", "not YAML"), ("b", "found a list"), ("c", "cannot be read")):
        with pytest.raises(UsageError, match=message):
            cards.load(str(tmp_path / f"{name}.yaml"))


# ---- plan.json, the command, the bundle


def test_a_toy_card_keeps_five_of_eight(tiny_checkpoint, tmp_path, capsys):
    memory = tiny_memory(Checkpoint.open(tiny_checkpoint), keep=5)
    out = tmp_path / "plan.json"
    line = ["plan", str(tiny_checkpoint), "--card", str(tiny_card(tmp_path, memory)), "--context", "4k"]
    assert main([*line, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "5 of 8 a layer, 8 in the 3 routed by token id" in shown
    plan = Plan.read(out)
    assert plan.experts_kept == (8, 8, 8, 5, 5, 5, 5) == planned_experts(out, TINY)
    assert (plan.id, plan.headroom_bytes, plan.dense, plan.head) == ("toy-4k", 0, "D4", "fp8")
    assert plan.to_dict() == json.loads(out.read_text())
    assert set(plan.gates) >= {"kl_mean", "kl_p99", "top1"}
    assert plan.gates["kl_mean"] == 0.05
    one_less = tiny_card(tmp_path, memory - 1)
    assert make_plan(Checkpoint.open(tiny_checkpoint), cards.load(str(one_less)), Ask(4096)).experts_kept[-1] == 4


def test_the_sample_model_on_its_imaginary_card(tmp_path):
    folder = Path(__file__).parents[2] / "packaging/sample-model"
    checkpoint = Checkpoint.open(folder / "checkpoint")
    plan = make_plan(checkpoint, cards.load(str(folder / "card.yaml")), Ask(4096))
    half = checkpoint.config.n_routed_experts // 2
    hashed = checkpoint.config.num_hash_layers
    assert plan.experts_kept == (2 * half,) * hashed + (half,) * (checkpoint.config.num_hidden_layers - hashed)
    assert plan.id == "sample-5mb-4k"


def test_gates_of_a_whole_and_of_a_pruned_model(tiny_checkpoint, tmp_path):
    """Distillation plan: D4 alone KL ≤ .02, p99 ≤ .3, top-1 ≥ .96; pruned and healed KL ≤ .05, top-1 ≥ .93."""
    checkpoint, card = Checkpoint.open(tiny_checkpoint), cards.load(str(tiny_card(tmp_path, 10**9)))
    whole = make_plan(checkpoint, card, Ask(4096))
    pruned = make_plan(checkpoint, card, Ask(4096, keep=4))
    tiered = make_plan(checkpoint, card, Ask(4096, "tiered"))
    assert [whole.gates[g] for g in ("kl_mean", "kl_p99", "top1")] == [0.02, 0.3, 0.96]
    assert [pruned.gates[g] for g in ("kl_mean", "top1")] == [0.05, 0.93]
    assert tiered.gates == whole.gates
    assert (whole.verdict, pruned.verdict) == ("whole", "prune, long recovery")


def test_plan_json_is_checked_when_it_is_read(tiny_checkpoint, tmp_path):
    plan = make_plan(Checkpoint.open(tiny_checkpoint), cards.load(str(tiny_card(tmp_path, 10**9))), Ask(4096))
    for field, value, message in (
        ("format", 2, "format 2, expected 1"), ("dense", "D5", "id, dense or head"), ("card", 3, "card: found '3'"),
        ("experts_kept", [1, "a"], "experts_kept"), ("bytes", {}, "'device' is missing"),
        ("context_tokens", True, "context_tokens: found 'True'"), ("code", None, "code: found 'None'"),
    ):  # fmt: skip
        path = tmp_path / f"{field}.json"
        path.write_text(json.dumps({**plan.to_dict(), field: value}))
        with pytest.raises(CheckpointError, match=message):
            Plan.read(path)
    with pytest.raises(UsageError, match="--id Bad: expected"):
        make_plan(Checkpoint.open(tiny_checkpoint), cards.load("300i-a2-32g"), Ask(4096), plan_id="Bad")


def test_the_bundle_is_as_large_as_planned(tiny_checkpoint, tiny_bundle, tmp_path):
    plan = make_plan(Checkpoint.open(tiny_checkpoint), cards.load("300i-a2-32g"), Ask(4096), dense="D8", head="bf16")
    checkpoint = Checkpoint.open(tiny_checkpoint)
    plain = [n for n in checkpoint.names if not n.startswith("mtp.") and ".ffn.experts." not in n]
    counts = Counter(checkpoint.read(name).tobytes() for name in plain)
    repeated = sum(len(data) * (count - 1) for data, count in counts.items())  # equal tensors are stored once
    assert repeated < 1000  # scales of a byte or two; the real model has none so small
    manifest = Manifest.from_bytes((tiny_bundle / "manifest.json").read_bytes())
    assert plan.bundle_bytes["base objects"] - repeated == sum(entry.size_bytes for entry in manifest.objects)
    assert plan.bundle_bytes["profile objects"] == 0
    small = sum(p.stat().st_size for p in tiny_bundle.rglob("*") if p.is_file() and "objects" not in p.parts)
    assert small < plan.bundle_bytes["small files (allowance)"]


def test_profile_objects_are_those_build_plans(tiny_checkpoint, tmp_path):
    """Attention, the indexer's query and shared experts in MXFP4, an FP8 head: what `build` adds for them."""
    checkpoint = Checkpoint.open(tiny_checkpoint)
    plan = make_plan(checkpoint, cards.load(str(tiny_card(tmp_path, 10**9))), Ask(4096, keep=5))
    whole = View(checkpoint)
    cut = View(checkpoint, experts_kept=plan.experts_kept)
    cut = overlaid(cut, tmp_path / "d4", [*random_fp4_linears(cut), *fp8_head(cut)])
    assert plan.bundle_bytes["base objects"] == sum(entry.size_bytes for entry in base_plans(whole))
    assert plan.bundle_bytes["profile objects"] == sum(entry.size_bytes for entry in profile_plans(cut, plan.id))


def test_the_command_on_the_real_model(preview, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert main(["plan", str(preview), "--card", "300i-duo-96g", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "the card has 2 devices with a memory each: one is planned, the others are unused" in shown
    assert "unverified on hardware: devices, device_memory_bytes" in shown
    assert re.search(r"atlas-350-112g +164 +163 +157 +175  prune and heal; tiered: 170 resident, 49.44 GB", shown)
    assert re.search(r">300i-duo-96g +66\* +65\* +59\* +26  tiered mode advised", shown)
    assert Plan.read(out).experts_kept == (65,) * 43
    assert Plan.read(out).kv_bytes.keys() == {"4096", "131072", "1048576"}


def test_a_refusal_shows_what_fits_where(tiny_checkpoint, tmp_path, capsys):
    card = tiny_card(tmp_path, 200_000)
    assert main(["plan", str(tiny_checkpoint), "--card", str(card), "--context", "4k"]) == 8
    found = capsys.readouterr()
    assert found.out == ""
    assert "atlas-350-112g" in found.err
    assert re.search(r">toy +- +- +does not fit pruned", found.err)
    assert "toy: pruned to 2 experts a layer, 1 x 4,096 tokens, needs" in found.err


def test_json_output(tiny_checkpoint, tmp_path, capsys):
    card = str(tiny_card(tmp_path, 10**9))
    assert main(["plan", str(tiny_checkpoint), "--card", card, "--context", "4k", "--mode", "tiered", "--json"]) == 0
    raw = json.loads(capsys.readouterr().out)
    assert (raw["mode"], raw["experts_kept"], raw["bytes"]["host"]["cold experts"]) == ("tiered", [8] * 7, 0)


def test_contexts():
    assert [command.parse_context(text) for text in ("4k", "128K", "1m", "5000")] == [4096, 131072, 1 << 20, 5000]
    assert [context_name(tokens) for tokens in (4096, 131072, 1 << 20, 5000)] == ["4k", "128k", "1m", "5000"]
    for text in ("k", "0", "-1", "1.5m", "4kk", ""):
        with pytest.raises(Exception, match="expected a number of tokens"):
            command.parse_context(text)


def test_bars_and_sizes():
    assert [bar(share).count("█") for share in (0, 1e-9, 0.5, 1, 1.2)] == [0, 1, BAR_CHARS // 2, BAR_CHARS, BAR_CHARS]
    assert {len(bar(share)) for share in (0, 0.3, 1, 2)} == {BAR_CHARS}
    sizes = [gigabytes(size) for size in (0, 999, 1000, 13_369_344, 159_609_485_896)]
    assert sizes == ["0 B", "999 B", "1.00 kB", "13.37 MB", "159.61 GB"]


def test_a_terminal_without_blocks_gets_ascii():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    command._show(["a █░ b"], stream)
    stream.seek(0)
    assert stream.read() == "a #. b\n"
