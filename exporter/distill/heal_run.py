"""Layer-wise healing: a cut model's routers fitted, layer by layer, to what the full layers give.

One layer is in memory; the streams of the calibration texts lie on disk between layers, so that a killed run goes on
after the last whole layer and ends with the same bytes. A layer is changed only if that lowers its error on texts
that were held out from fitting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from appliance.errors import UsageError
from exporter import codec
from exporter.calibration import Text
from exporter.distill.heal_layer import LayerTask, StudentReference
from exporter.distill.router_fit import Quadratics, Router, fit
from exporter.layer_reference import LayerReference
from exporter.layerwise import Batch, Walk, default_batch_tokens
from exporter.overlay import OVERLAY, Overlay, OverlayWriter
from exporter.stage import read_json, write_json
from exporter.view import View

HELD_EVERY = 5  # every fifth text (or block of tokens, where there are few texts) is held out
HELD_BLOCK_TOKENS = 64
Inputs = Literal["student", "teacher"]


@dataclass(frozen=True, slots=True)
class HealOptions:
    """``inputs``: whose streams the layers see. ``fit_tokens``: most tokens one layer is fitted on."""

    texts_sha256: str
    stats_sha256: str = ""
    inputs: Inputs = "student"
    fit_tokens: int = 32768
    device: str = "cpu"


def heal(view: View, texts: Sequence[Text], out: Path, work: Path, options: HealOptions) -> Overlay:
    """Write the overlay "heal" of ``view`` to ``out``; its notes hold each layer's error before and after.

    UsageError if nothing is cut, or an overlay of ``view`` has changed what healing compares.
    """
    cut = cut_layers(view)
    tokens, least = sum(len(text.ids) for text in texts), HELD_EVERY * HELD_BLOCK_TOKENS
    if len(texts) < HELD_EVERY and tokens < least:
        raise UsageError(f"heal: {tokens} tokens in {len(texts)} texts leave none to hold out; give {least} or more")
    writer = OverlayWriter(out, "heal", view.recipe_sha256, {**asdict(options), "sequences": len(texts)})
    if (out / OVERLAY).is_file():
        return Overlay.open(out)
    run = _Heal(view, texts, work, options)
    for layer in range(run.walk.start(), run.walk.layers):
        if layer in cut:
            healed = run.cut_layer(layer)
            if healed is not None:
                writer.add(f"layer_{layer:03d}", _tensors(layer, healed))
        else:
            run.whole_layer(layer)
        run.close(layer)
    found = writer.finish(notes={"layers": [read_json(work / f"layer_{layer:03d}.json") for layer in cut]})
    run.walk.discard()
    return found


def cut_layers(view: View) -> tuple[int, ...]:
    """The layers with a learned router that miss experts; UsageError if there are none or overlays changed them."""
    config = view.config
    learned = range(config.num_hash_layers, config.num_hidden_layers)
    cut = tuple(layer for layer in learned if view.experts_kept[layer] < config.n_routed_experts)
    if not cut:
        raise UsageError("heal: no layer with a learned router is cut; give --keep K or --plan FILE")
    for overlay in view.overlays:
        for name in overlay.tensors:
            if ".ffn_norm." in name or ".ffn.experts." in name or name.endswith(("gate.weight", "gate.bias")):
                raise UsageError(f"{overlay.path}: has changed {name}; heal first, then train and quantize")
    return cut


def _tensors(layer: int, router: Router) -> list[tuple[str, str, Any]]:
    gate = f"layers.{layer}.ffn.gate"
    return [(f"{gate}.weight", "BF16", codec.bf16_encode(router.gate.cpu().numpy())),
            (f"{gate}.bias", "F32", router.bias.cpu().numpy())]  # fmt: skip


class _Heal:
    """The walk of one run: the student's layers where they are whole, fitted ones where they are cut."""

    def __init__(self, view: View, texts: Sequence[Text], work: Path, options: HealOptions) -> None:
        self._options, self._work = options, work
        self._teacher = LayerReference(View(view.base, ranking=view.ranking), kv_sim=True, device=options.device)
        self._student = StudentReference(view, self._teacher, device=options.device)
        self._sequences = len(texts)
        tokens = max(1, default_batch_tokens(view.config) // 2)  # the candidates' outputs lie beside the streams
        self.walk = Walk(
            self._student, [text.ids for text in texts], work, batch_tokens=tokens, label=f"heal on {options.inputs}"
        )

    def close(self, layer: int) -> None:
        """``layer`` is done: its streams go out, its weights are forgotten."""
        self._student.release()
        self._teacher.release()
        self.walk.spill.close(layer + 1)

    def whole_layer(self, layer: int) -> None:
        """A layer that keeps all experts."""
        for batch, streams in self._attended(layer):
            self._reference.experts_rows(layer, streams, batch.ids)
            self._store(layer, batch, streams)

    def cut_layer(self, layer: int) -> Router | None:
        """Fit the router of ``layer``; None if nothing better than the plain cut was found."""
        task, before = LayerTask(self._teacher, self._student, layer), self._student.router(layer)
        look = _Look(self.walk, task, self._sequences, self._options.fit_tokens)
        for batch, streams in self._attended(layer):
            full = look.add(batch, streams)
            if self._options.inputs == "teacher":
                self._teacher.ffn_output(layer, streams, full)
                self._store(layer, batch, streams)
            else:
                _save(self._middle(batch), streams)
        self._teacher.release_stored()  # fitting needs no expert, and room for its tokens
        train, held = look.parts()
        after = fit(before, train, held, self._student.config)
        errors = [look.true_error(router) for router in (before, after)]
        better = after is not before and errors[1] < errors[0]
        self._student.set_router(layer, after if better else before)
        self._note(layer, errors[0], errors[1] if better else errors[0], better, len(train))
        if self._options.inputs == "student":
            for batch in self.walk.batches:
                streams = _load(self._middle(batch))
                self._student.experts_rows(layer, streams, batch.ids)
                self._store(layer, batch, streams)
                self._middle(batch).unlink()
        return after if better else None

    @property
    def _reference(self) -> LayerReference:
        return self._teacher if self._options.inputs == "teacher" else self._student

    def _attended(self, layer: int) -> Iterator[tuple[Batch, torch.Tensor]]:
        self.walk.reference = self._reference
        return self.walk.attended(layer)

    def _store(self, layer: int, batch: Batch, streams: torch.Tensor) -> None:
        self.walk.spill.write(layer + 1, batch.index, streams)
        self.walk.progress.add(f"layer {layer}", batch.tokens)

    def _middle(self, batch: Batch) -> Path:
        return self._work / f"attended_{batch.index:05d}.npy"

    def _note(self, layer: int, before: float, after: float, changed: bool, tokens: int) -> None:
        write_json(self._work / f"layer_{layer:03d}.json", {
            "layer": layer, "relative_error_before": before, "relative_error_after": after, "changed": changed,
            "fitted_on_tokens": tokens,
        })  # fmt: skip


class _Look:
    """A layer's tokens as they pass: quadratics of those it is fitted on, inputs and targets of those held out."""

    def __init__(self, walk: Walk, task: LayerTask, sequences: int, most: int) -> None:
        self._task, self._by_text = task, sequences >= HELD_EVERY
        self._most, total = most, sum(batch.tokens for batch in walk.batches)
        self._stride, self._passed = -(-total // most), 0
        self._train: list[Quadratics] = []
        self._held: list[Quadratics] = []
        self._targets: list[torch.Tensor] = []

    def add(self, batch: Batch, streams: torch.Tensor) -> torch.Tensor:
        """One batch after the attention; returns the full layer's output [n, D]."""
        task, layer = self._task, self._task.layer
        x = task.student.ffn_norm(layer, task.student.ffn_input(layer, streams))
        full, found, target = task.look(x, importance(task.student, layer, streams))
        index = torch.arange(self._passed, self._passed + batch.tokens)
        self._passed += batch.tokens
        kept = index % self._stride == 0
        block = batch.sequence_of if self._by_text else index // HELD_BLOCK_TOKENS
        held = block % HELD_EVERY == HELD_EVERY - 1
        self._train.append(found.take(torch.nonzero(kept & ~held)[:, 0]))
        rows = torch.nonzero(kept & held)[:, 0]
        self._held.append(found.take(rows))
        self._targets.append(target[rows])
        return full

    def parts(self) -> tuple[Quadratics, Quadratics]:
        """What is fitted on, what is held out."""
        self._train, self._held = [Quadratics.joined(self._train)], [Quadratics.joined(self._held)]
        for part, use in ((self._held[0], "hold out"), (self._train[0], "fit on")):
            if not len(part):
                raise UsageError(f"heal: --fit-tokens {self._most}: leaves no token to {use}; give more")
        return self._train[0], self._held[0]

    def true_error(self, router: Router) -> float:
        """Relative error of the routed output on the held-out tokens, by running the kept experts."""
        task, (held,), target = self._task, self._held, torch.cat(self._targets)
        task.student.set_router(task.layer, router)
        with task.student.device, torch.no_grad():
            shared = task.shared(held.x)
            y = task.student.moe(task.layer, held.x, torch.zeros(len(held), dtype=torch.int64)) - shared
            wrong = ((y - target).square().sum(-1) * held.importance).sum()
            return float(wrong / (target.square().sum(-1) * held.importance).sum())


def importance(reference: LayerReference, layer: int, streams: torch.Tensor) -> torch.Tensor:
    """[n]: how much an error of the experts' output moves the streams, Σ post² / Σ streams², its mean 1."""
    found = []
    with reference.device, torch.no_grad():
        for rows in streams.split(256):
            held = rows.to(reference.device)
            _, post, _ = reference._hc_pre(f"layers.{layer}.hc_ffn", held)
            found.append(post.square().sum(-1) / held.square().sum((1, 2)).clamp_min(1e-30))
    weights = torch.cat(found)
    return weights / weights.mean()


def _save(path: Path, streams: torch.Tensor) -> None:
    np.save(path, streams.numpy())


def _load(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(path))

