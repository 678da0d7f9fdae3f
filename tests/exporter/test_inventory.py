"""The list of tensors: the real model's totals, and what a checkpoint is refused for."""

import dataclasses
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from appliance.errors import CheckpointError
from exporter import inventory
from exporter.checkpoint import Checkpoint
from exporter.presets import TINY, V4_FLASH
from exporter.safetensors_file import NUMPY_DTYPES, write_file
from exporter.sample import RandomWeights, write_random, write_sample

TINY_Q = Path(__file__).parents[1] / "golden/tiny-q"


def size_bytes(entries):
    """By hand, not by the product's sum."""
    return sum(math.prod(shape) * np.dtype(NUMPY_DTYPES[dtype]).itemsize for shape, dtype in entries.values())


def test_totals_of_the_real_model():
    found = inventory.expected_tensors(V4_FLASH, mtp=1)
    assert len(found) == 69_187
    assert size_bytes(found) == 159_609_485_896
    assert Counter(dtype for _, dtype in found.values()) == {
        "BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34_167, "I8": 33_792, "I64": 3,
    }


def test_totals_of_the_refresh():
    """0731: 156,015,698,140 bytes of backbone as before, 10,862,838,300 of DSpark in place of the MTP block."""
    found = inventory.expected_tensors(V4_FLASH, dspark=inventory.DSpark())
    draft = {name: entry for name, entry in found.items() if name.startswith("mtp.")}
    assert (len(found), size_bytes(found)) == (72_317, 166_878_536_440)
    assert size_bytes(draft) == 10_862_838_300
    assert size_bytes({n: e for n, e in found.items() if n not in draft}) == 156_015_698_140
    assert found["mtp.0.main_proj.scale"] == ((32, 96), "F8_E8M0")
    assert found["mtp.2.confidence_head.proj.weight"] == ((1, 4352), "BF16")


def test_draft_stages_are_told_apart(tmp_path):
    for draft, expected in (("none", (0, None)), ("mtp", (1, None)), ("dspark", (0, inventory.DSpark()))):
        write_sample(tmp_path / draft, "tiny", draft=draft)
        checkpoint = Checkpoint.open(tmp_path / draft)
        inventory.check(checkpoint)
        assert inventory.draft_of(checkpoint) == expected
        mtp, dspark = expected
        assert set(checkpoint.names) == set(inventory.expected_tensors(TINY, mtp=mtp, dspark=dspark))


def test_parts_of_the_real_model():
    found = inventory.expected_tensors(V4_FLASH, mtp=1)
    mtp = {name: entry for name, entry in found.items() if name.startswith("mtp.0.")}
    assert (len(mtp), size_bytes(mtp)) == (1_575, 3_593_787_756)
    for layer, tensors, layer_bytes in ((0, 1_565, 3_566_148_952), (2, 1_576, 3_596_055_640),
                                        (3, 1_569, 3_568_596_312), (4, 1_576, 3_589_851_224)):
        part = {name: entry for name, entry in found.items() if name.startswith(f"layers.{layer}.")}
        assert (len(part), size_bytes(part)) == (tensors, layer_bytes)
    experts = {n: e for n, e in found.items() if ".experts." in n and n.startswith("layers.0.ffn.experts.7.")}
    assert size_bytes(experts) == 13_369_344


def test_official_fixture_is_complete():
    checkpoint = Checkpoint.open(TINY_Q)
    inventory.check(checkpoint)
    assert set(checkpoint.names) == set(inventory.expected_tensors(checkpoint.config, mtp=1))


def rewritten(folder, change):
    """A tiny checkpoint in one file, its list of (name, dtype, array) changed by ``change``."""
    write_random(folder, TINY, mtp=0)
    whole = Checkpoint.open(folder)
    tensors = {name: (whole.info(name).dtype, whole.read(name)) for name in whole.names}
    change(tensors)
    for file in [*folder.glob("model-*"), folder / "model.safetensors.index.json"]:
        file.unlink()
    write_file(folder / "model.safetensors", [(name, *value) for name, value in tensors.items()])
    return Checkpoint.open(folder)


def fp8_experts(tensors):
    name = "layers.4.ffn.experts.3.w2.weight"
    tensors[name] = ("F8_E4M3", tensors[name][1])


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("layers.2.attn.indexer.wq_b.scale"),
     r"model\.safetensors: tensor layers\.2\.attn\.indexer\.wq_b\.scale is missing, expected F8_E8M0 \[16, 1\]"),
    (fp8_experts, r"layers\.4\.ffn\.experts\.3\.w2\.weight: found F8_E4M3 \[128, 32\], expected I8 \[128, 32\]"),
    (lambda t: t.update({"embed.weight": ("BF16", t["embed.weight"][1][:700])}),
     r"embed\.weight: found BF16 \[700, 128\], expected BF16 \[768, 128\]"),
    (lambda t: t.update({"layers.0.ffn.gate.tid2eid": ("I32", t["layers.0.ffn.gate.tid2eid"][1])}),
     r"gate\.tid2eid: found I32"),
    (lambda t: t.update({"model.norm.weight": t["norm.weight"]}), r"tensor model\.norm\.weight does not belong"),
])
def test_refused(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message) as failure:
        inventory.check(rewritten(tmp_path / "one", change))
    assert str(failure.value).startswith(str(tmp_path / "one"))


def test_mtp_and_draft_stages_are_tolerated(tmp_path):
    extra = {"mtp.2.markov_w1.weight": ("BF16", np.zeros((8, 4), np.uint16))}
    checkpoint = rewritten(tmp_path / "one", lambda tensors: tensors.update(extra))
    inventory.check(checkpoint)
    assert checkpoint.has("mtp.2.markov_w1.weight")


def test_wrong_scale_shape_is_named_when_read(tmp_path):
    name = "layers.0.attn.wq_a.scale"
    checkpoint = rewritten(tmp_path / "one", lambda t: t.update({name: ("F8_E8M0", np.zeros((2, 2), np.uint8))}))
    with pytest.raises(CheckpointError, match=r"wq_a\.scale: found F8_E8M0 \[2, 2\], expected F8_E8M0 \[1, 1\]"):
        checkpoint.float32("layers.0.attn.wq_a.weight")


def test_config_of_another_size_is_noticed(tmp_path):
    write_sample(tmp_path / "tiny", "tiny")
    checkpoint = Checkpoint.open(tmp_path / "tiny")
    other = dataclasses.replace(checkpoint, config=dataclasses.replace(TINY, num_hidden_layers=6,
                                                                       compress_ratios=TINY.compress_ratios[:6]))
    with pytest.raises(CheckpointError, match=r"tensor layers\.6\..* does not belong"):
        inventory.check(other)


def test_random_weights_depend_on_seed_and_name():
    draw = RandomWeights(TINY, 0).tensor("a.weight", (4, 4), "BF16")
    assert np.array_equal(draw, RandomWeights(TINY, 0).tensor("a.weight", (4, 4), "BF16"))
    assert not np.array_equal(draw, RandomWeights(TINY, 1).tensor("a.weight", (4, 4), "BF16"))
    assert not np.array_equal(draw, RandomWeights(TINY, 0).tensor("b.weight", (4, 4), "BF16"))
