"""From a View to the trainable module: official names and ranks to parameters, values exactly as stored."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from exporter.trainable.linear import Weight
from exporter.trainable.model import TrainableModel
from exporter.view import View

STACKS = ("w1", "w2", "w3")  # of ffn: one parameter for all experts of a layer


def load(view: View, device: torch.device | str = "cpu") -> TrainableModel:
    """The module with the weights of ``view``, f32, in rank order; CheckpointError names a tensor that is missing."""
    net = TrainableModel(view.config, view.experts_kept)
    with torch.no_grad():
        for name, target in [*net.named_parameters(), *router_buffers(net)]:
            for part, official in official_names(name, target):
                part.copy_(_value(view, official))
    for name, module in net.named_modules():
        if isinstance(module, Weight) and view.rotation(name):
            module.rotate_inputs(view.rotation(name))
    moved: TrainableModel = net.to(device)
    return moved


def router_buffers(net: TrainableModel) -> Iterator[tuple[str, Tensor]]:
    """(official name, buffer) of what routers hold besides weights: biases f32 [E] and tables i64 [V, k]."""
    return ((n, b) for n, b in net.named_buffers() if n.endswith((".gate.tid2eid", ".gate.bias")))


def official_names(name: str, parameter: Tensor) -> Iterator[tuple[Tensor, str]]:
    """(slice of ``parameter``, official tensor name) of one parameter: itself, or each expert of a stack."""
    layer, _, part = name.rpartition(".")
    if part not in STACKS:
        yield parameter, name
        return
    for rank in range(len(parameter)):
        yield parameter[rank], f"{layer}.experts.{rank}.{part}.weight"


def _value(view: View, name: str) -> Tensor:
    raw = view.read(name) if view.info(name).dtype == "I64" else view.float32(name)
    return torch.from_numpy(np.ascontiguousarray(raw))
