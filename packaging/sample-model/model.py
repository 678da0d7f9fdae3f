"""The trainable module under the names that the scripts here use: it lives in `exporter/trainable`."""

from __future__ import annotations

from typing import Any

from appliance.model import ModelConfig
from exporter.spec import parse_config
from exporter.trainable.model import TrainableModel as SampleModel
from exporter.trainable.rounding import round_fp4_groups, round_fp8_blocks

__all__ = ["Config", "SampleModel", "round_fp4_groups", "round_fp8_blocks"]


class Config:
    """The numbers of config.json that the maths needs."""

    @staticmethod
    def from_json(raw: dict[str, Any]) -> ModelConfig:
        """From the config of `train.py`, or an official one."""
        return parse_config({"model_type": "deepseek_v4", "n_shared_experts": 1, **raw}, "config of the sample model")
