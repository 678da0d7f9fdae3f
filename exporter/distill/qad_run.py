"""End-to-end training of a view against a teacher cache, and the overlay it leaves."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from appliance.errors import UsageError
from exporter.distill.batches import Batches
from exporter.distill.cache import TeacherCache
from exporter.distill.processes import Processes
from exporter.distill.training import Options, Trainer
from exporter.overlay import OVERLAY, OverlayWriter
from exporter.progress import Progress
from exporter.stage import code_version
from exporter.trainable.device import open_device
from exporter.trainable.loading import load, official_names
from exporter.trainable.stored import Stored, encoded, stored_dtype
from exporter.view import View

WORK, STATE = "training", "state.safetensors"


def distill(
    view: View, sequences: Sequence[Sequence[int]], cache: TeacherCache, out: Path, stage: str, options: Options, *,
    dense: str | None = None, device: str = "cpu", save_every: int = 25,
) -> str | None:
    """Train and write the overlay ``out``; returns what a person wants to know (None on processes but the first).

    ``dense``: "d4" or "d8" writes attention and shared experts in MXFP4 or FP8; None keeps the view's formats. A run
    that was killed goes on from its last saved state, to the same bytes with the same number of threads.
    """
    processes = Processes.join(device)
    try:
        _check(view, sequences, cache, options, dense, processes)
        recipe = {"teacher_sha256": cache.sha256, "texts_sha256": cache.texts_sha256, "dense": dense or "as it is",
                  "processes": processes.world, **dataclasses.asdict(options)}
        writer, refused = _opened(out, stage, view.recipe_sha256, recipe) if processes.rank == 0 else (None, None)
        refused = processes.told(refused)  # all of them stop, or none: the first alone would leave the others waiting
        if refused is not None:
            raise UsageError(refused)
        finished = processes.told("yes" if writer is not None and (out / OVERLAY).is_file() else None)
        if finished is not None:
            shutil.rmtree(out / WORK, ignore_errors=True)
            return "nothing to do, it is finished" if processes.rank == 0 else None
        return _train(view, sequences, cache, out, options, processes, writer, dense, device, save_every)
    finally:
        processes.leave()


def _opened(
    out: Path, stage: str, base_sha256: str, recipe: dict[str, object]
) -> tuple[OverlayWriter | None, str | None]:
    """The overlay to write, or why it is refused."""
    try:
        return OverlayWriter(out, stage, base_sha256, recipe), None
    except UsageError as error:
        return None, str(error)


def _check(
    view: View, sequences: Sequence[Sequence[int]], cache: TeacherCache, options: Options, dense: str | None,
    processes: Processes,
) -> None:
    if [len(ids) for ids in sequences] != list(cache.lengths):
        raise UsageError(f"{cache.path}: the teacher cut the texts into other lengths; run distill teacher again")
    if options.batch < processes.world:
        raise UsageError(f"--batch {options.batch}: fewer texts a step than processes ({processes.world})")
    rotated = [n for n in view.names if n.endswith(".weight") and view.rotation(n.removesuffix(".weight"))]
    if dense == "d8" and rotated:
        raise UsageError(f"--dense d8: {rotated[0]} is stored rotated, which only MXFP4 linears are; give --dense d4")


def _train(
    view: View, sequences: Sequence[Sequence[int]], cache: TeacherCache, out: Path, options: Options,
    processes: Processes, writer: OverlayWriter | None, dense: str | None, device: str, save_every: int,
) -> str | None:
    net = load(view, open_device(device, processes.local_rank))
    dtypes = {n: stored_dtype(view, n, p, dense) for n, p in net.named_parameters()}
    trainer = Trainer(net, dtypes, options, processes)
    state = out / WORK / STATE
    trainer.restore(state)
    batches = Batches(len(sequences), options.batch, options.seed)
    progress = Progress("distill", options.steps, "steps")
    progress.resume(trainer.step)
    while trainer.step < options.steps:
        loss = trainer.update(sequences, cache, batches)
        if writer is None:
            continue
        progress.add(f"KL {loss:.4f} at lr {options.rate(trainer.step - 1):.1e}", 1)
        if trainer.step % save_every == 0 or trainer.step == options.steps:
            trainer.save(state)
    return None if writer is None else _write(view, trainer, writer, out)


def _write(view: View, trainer: Trainer, writer: OverlayWriter, out: Path) -> str:
    shards: dict[str, list[str]] = {}
    for name in trainer.parameters:
        parts = name.split(".")
        shards.setdefault(f"layer_{int(parts[1]):03d}" if parts[0] == "layers" else "head", []).append(name)
    for shard, names in shards.items():
        if not writer.has(shard):
            writer.add(shard, [stored for name in names for stored in _changed(view, trainer, name)])
    losses = [round(loss, 6) for loss in trainer.losses]
    overlay = writer.finish(
        rotated=_rotated(view, out, shards), notes={"kl_per_step": losses, "code": code_version()}
    )
    shutil.rmtree(out / WORK, ignore_errors=True)
    few = max(1, min(10, len(losses) // 2))
    first, last = float(np.mean(losses[:few])), float(np.mean(losses[-few:]))
    return f"{len(overlay.tensors)} tensors, KL {first:.4f} → {last:.4f} on the texts (first and last {few} steps)"


def _changed(view: View, trainer: Trainer, name: str) -> Iterator[Stored]:
    """The official tensors of one parameter whose format or value is no longer the view's."""
    value, dtype = trainer.value(name).cpu(), trainer.formats[name]
    for part, official in official_names(name, value):
        array = part.numpy()
        if view.info(official).dtype != dtype or not np.array_equal(array, view.float32(official)):
            yield from encoded(official, array, dtype)


def _rotated(view: View, out: Path, shards: dict[str, list[str]]) -> dict[str, int]:
    """Linears of this overlay that stay rotated as the view has them."""
    names = [n.removesuffix(".weight") for members in shards.values() for n in members if n.endswith(".weight")]
    return {name: view.rotation(name) for name in names if view.rotation(name)}
