"""transformers' own loader on a student: no missing or unexpected key, and the logits of our reference of the view."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import hf_support  # noqa: E402
import parity_support as parity  # noqa: E402
from student_support import fp8_head, overlaid, rounded_fp4_linears  # noqa: E402

from exporter.checkpoint import Checkpoint  # noqa: E402
from exporter.presets import TINY  # noqa: E402
from exporter.ranking import Ranking  # noqa: E402
from exporter.reference import Reference  # noqa: E402
from exporter.student import write_student  # noqa: E402
from exporter.view import View  # noqa: E402

pytestmark = pytest.mark.torch
# transformers reads ratios 0, 4 and 128 from a config.json, no others.
TINY_CASE = hf_support.RandomConfig(replace(TINY, compress_ratios=(0, 0, 4, 128, 4, 128, 0)), seed=0, tokens=272)


@pytest.mark.parametrize(("preset", "keep", "dense"), [("tiny", 5, "D8"), ("tiny", 5, "D4"), ("wide", 4, "D4")])
def test_a_cut_and_ranked_model(tmp_path, preset, keep, dense):
    """Learned layers keep 5 of 8 (4 of 6) experts, in another order; D4 with an FP8 head on top."""
    from transformers import DeepseekV4ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    case = TINY_CASE if preset == "tiny" else hf_support.random_configs()[preset]
    base = hf_support.write_official(tmp_path / "source", case.config, case.seed)
    experts, layers, hashed = case.config.n_routed_experts, case.config.num_hidden_layers, case.config.num_hash_layers
    rng = np.random.Generator(np.random.PCG64(9))
    orders = tuple(tuple(map(int, rng.permutation(experts))) for _ in range(layers))
    kept = (experts,) * hashed + (keep,) * (layers - hashed)
    view = View(base, ranking=Ranking(base.source_sha256, "random", orders), experts_kept=kept)
    if dense == "D4":
        view = overlaid(view, tmp_path / "d4", [*rounded_fp4_linears(view), *fp8_head(view)])
    written = write_student(view, tmp_path / "student")
    assert written.empty_experts == (experts - keep) * (layers - hashed)

    model, report = DeepseekV4ForCausalLM.from_pretrained(
        tmp_path / "student", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    logits = hf_support.hf_logits(model.float(), case.ids)
    reference = Reference.from_view(view)
    expected = reference.forward(case.ids, reference.new_state()).numpy()
    assert np.abs(expected - logits).max() <= parity.P1_LIMIT
    again = Reference.from_checkpoint(Checkpoint.open(tmp_path / "student"))
    assert np.abs(expected - again.forward(case.ids, again.new_state()).numpy()).max() <= parity.P1_LIMIT

