"""The training loop's state and one step: master weights, rounded working weights, optimizers, saved state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from appliance.errors import UsageError
from exporter.distill.batches import Batches, padded, pieces, share
from exporter.distill.cache import TeacherCache
from exporter.distill.losses import cached_kl
from exporter.distill.muon import ADAM_SHARE, Adam, Muon
from exporter.distill.processes import Processes
from exporter.safetensors_file import NUMPY_DTYPES, read_header, write_file
from exporter.stage import write_atomic
from exporter.trainable.model import TrainableModel
from exporter.trainable.stored import is_dense, rounded

CLIP_NORM = 1.0
LAST_RATE = 0.03  # of lr, at the end of the decay
_STACKS = ("ffn.w1", "ffn.w2", "ffn.w3")
_MATRICES = ("compressor.wkv.weight", "compressor.wgate.weight")


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is asked to do; ``lr`` is Muon's, AdamW takes half of it. ``batch`` counts joint sequences."""

    steps: int
    lr: float
    batch: int
    seed: int
    train: str  # all, experts, dense, router
    decay: str  # cosine, linear
    tokens_at_once: int = 4096

    def rate(self, step: int) -> float:
        """Learning rate of ``step`` (from 0), from lr down to LAST_RATE · lr."""
        share = step / self.steps
        fall = 0.5 * (1 + math.cos(math.pi * share)) if self.decay == "cosine" else 1 - share
        return self.lr * max(fall, LAST_RATE)


def is_expert(name: str) -> bool:
    """True for a stack of routed experts."""
    return name.endswith(_STACKS)


def is_router(name: str) -> bool:
    """True for what router KD trains: router rows and norms."""
    return name.endswith(("gate.weight", "norm.weight"))


CHOSEN = {"all": lambda name: True, "experts": is_expert, "dense": is_dense, "router": is_router}


def trained_names(net: TrainableModel, choice: str) -> list[str]:
    """Parameters that ``choice`` trains; never the indexer's: no gradient comes back through its top-k."""
    return [n for n, _ in net.named_parameters() if CHOSEN[choice](n) and ".indexer." not in n]


class Trainer:
    """See the module. ``formats``: dtype each parameter is written in; the module computes with those values."""

    def __init__(
        self, net: TrainableModel, formats: Mapping[str, str], options: Options, processes: Processes
    ) -> None:
        self.net, self.formats, self.options, self.processes = net, formats, options, processes
        self.parameters = dict(net.named_parameters())
        self.trained = trained_names(net, options.train)
        self.masters = {n: self.parameters[n].detach().clone() for n in self.trained}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in self.masters)
            parameter.data.copy_(rounded(parameter, formats[name]))
        matrices = [n for n in self.trained if is_expert(n) or is_dense(n) or n.endswith(_MATRICES)]
        self.muon = Muon({n: self.masters[n] for n in matrices})
        self.adam = Adam({n: p for n, p in self.masters.items() if n not in self.muon.momentum})
        self.losses: list[float] = []

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    def value(self, name: str) -> Tensor:
        """The stored value of a parameter: what the module computes with."""
        return rounded(self.masters.get(name, self.parameters[name]), self.formats[name])

    def update(self, sequences: Sequence[Sequence[int]], cache: TeacherCache, batches: Batches) -> float:
        """One step; returns the joint mean KL (losses.py) before it. UsageError when it is not finite."""
        members = batches.of(self.step)
        tokens = sum(cache.lengths[m] for m in members)
        mine = share(members, cache.lengths, self.processes.rank, self.processes.world)
        total = torch.zeros((), device=self.net.norm.weight.device)
        for piece in pieces(mine, cache.lengths, self.options.tokens_at_once):
            total += self._backward(piece, sequences, cache, tokens)
        gradients = self._gradients()
        self.processes.sum([*gradients.values(), total])
        loss, norm = float(total), self._clip(gradients)
        rate = self.options.rate(self.step)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UsageError(
                f"step {self.step + 1} at lr {rate:.2e}: loss {loss}, gradient norm {norm}; "
                "give a lower --lr and a new --out"
            )
        with torch.no_grad():
            self._move(gradients, rate)
        self.losses.append(loss)
        return loss

    def _backward(
        self, piece: Sequence[int], sequences: Sequence[Sequence[int]], cache: TeacherCache, tokens: int
    ) -> Tensor:
        """Gradients of Σ KL / ``tokens`` over the sequences of ``piece``, added to those there; returns the loss."""
        device = self.net.norm.weight.device
        ids, real = (torch.from_numpy(a).to(device) for a in padded([sequences[m] for m in piece]))
        targets = [cache.targets(m) for m in piece]
        chosen, *told = (torch.from_numpy(np.concatenate(part)).to(device) for part in zip(*targets, strict=True))
        hidden, _ = self.net(ids)
        logits = self.net.head(hidden.index_select(0, real))
        loss = cached_kl(logits, chosen.long(), *told).sum() / tokens
        loss.backward()
        return loss.detach()

    def _gradients(self) -> dict[str, Tensor]:
        found = {}
        for name in self.trained:
            parameter = self.parameters[name]
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = None
        return found

    def _clip(self, gradients: Mapping[str, Tensor]) -> float:
        norm = float(torch.stack([g.norm() for g in gradients.values()]).norm())
        if norm > CLIP_NORM:
            for gradient in gradients.values():
                gradient.mul_(CLIP_NORM / norm)
        return norm

    def _move(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        for name, gradient in gradients.items():
            if name in self.muon.momentum:
                self.muon.step(name, self.masters[name], gradient, rate)
            else:
                self.adam.step(name, self.masters[name], gradient, rate * ADAM_SHARE, self.step + 1)
            self.parameters[name].copy_(rounded(self.masters[name], self.formats[name]))

    def tensors(self) -> dict[str, Tensor]:
        """All that a run goes on from, but the losses."""
        groups = {
            "master": self.masters, "momentum": self.muon.momentum, "mean": self.adam.mean, "square": self.adam.square,
        }  # fmt: skip
        return {f"{group}:{name}": t for group, members in groups.items() for name, t in members.items()}

    def save(self, path: Path) -> None:
        """The state as one safetensors file, whole or not at all."""
        found = [("losses", "F32", np.array(self.losses, np.float32))]
        found += [(name, "F32", tensor.cpu().numpy()) for name, tensor in self.tensors().items()]
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, lambda partial: write_file(partial, found))

    def restore(self, path: Path) -> None:
        """Go on from ``path`` where process 0 has it; the others get its copy."""
        done = torch.zeros(self.options.steps + 1, dtype=torch.float32)
        if self.processes.rank == 0 and path.is_file():
            state = _read(path)
            losses = state.pop("losses")
            done[0], done[1 : len(losses) + 1] = len(losses), torch.from_numpy(losses)
            for name, tensor in self.tensors().items():
                tensor.copy_(torch.from_numpy(state[name]))
        done = done.to(self.net.norm.weight.device)
        self.processes.copy_from_first([done, *self.tensors().values()])
        self.losses = done[1 : int(done[0]) + 1].tolist()
        for name in self.trained:
            self.parameters[name].data.copy_(rounded(self.masters[name], self.formats[name]))


def _read(path: Path) -> dict[str, NDArray[Any]]:
    return {
        info.name: np.array(np.memmap(path, NUMPY_DTYPES[info.dtype], "r", info.offset, info.shape))
        for info in read_header(path)
    }
