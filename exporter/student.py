"""``solocard-export student CKPT … OUT``: a view as a checkpoint in DeepSeek's own format, for engines that span cards.

Values are the view's, exactly: kept tensors byte for byte, FP4 linears as FP8, an FP8 head as BF16. config.json has one
n_routed_experts, so shorter layers are filled with empty experts: zeros, stored as holes, and a bias of −1e9 keeps the
router off them. Shards are written one tensor at a time in OUT.partial; killed, the same command goes on.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from appliance.bundle_writer import sync_directory, write_synced
from appliance.errors import CheckpointError, SpaceError, UsageError
from exporter import inventory, official
from exporter.exact_cast import BLOCK, fp8_to_bf16, mxfp4_to_fp8
from exporter.progress import Progress
from exporter.safetensors_file import Piece, write_streamed
from exporter.stage import StageFolder, partial_folder, write_atomic
from exporter.view import View
from exporter.view_arguments import add_view_arguments, open_view

NEVER = np.float32(-1e9)  # the router's bias of an empty expert
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_DRAFT_RULES = {
    "kept": "kept, their own experts are as many as n_routed_experts", "none": "the source has none",
    "dropped": "dropped, n_routed_experts is no longer the number of theirs (num_nextn_predict_layers 0)",
}  # fmt: skip
_EXPERT = re.compile(r"layers\.(\d+)\.ffn\.experts\.(\d+)\.")
_GATE = re.compile(r"layers\.(\d+)\.ffn\.gate\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Written:
    """What came out. ``size_bytes`` counts holes, ``disk_bytes`` does not."""

    tensors: int
    size_bytes: int
    disk_bytes: int
    experts: int  # n_routed_experts
    empty_experts: int  # in all layers
    drafts: str  # "kept", "dropped", "none" where the source has none


def add_command(commands: Any) -> None:
    """Add ``student`` to the exporter's commands."""
    parser = commands.add_parser("student", help="a view as a checkpoint in the official format")
    add_view_arguments(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Exit 0 with the checkpoint at OUT; refusals name the tensor."""
    written = write_student(open_view(args), args.out, progress=True)
    print(f"wrote {args.out}: {written.tensors:,} tensors, {written.size_bytes:,} bytes")
    print(f"n_routed_experts {written.experts}")
    if written.empty_experts:
        holes = written.size_bytes - written.disk_bytes
        print(f"{written.empty_experts} empty experts fill the shorter layers: {holes:,} bytes of zeros that no router")
        print(f"chooses, holes in the files: {written.disk_bytes:,} bytes on disk (copy: cp --sparse=always, rsync -S)")
    print(f"draft stages (mtp.*): {_DRAFT_RULES[written.drafts]}")
    return 0


def write_student(view: View, out: Path, *, progress: bool = False) -> Written:
    """Write ``view`` to the new folder ``out``. CheckpointError or UsageError names a tensor without an exact form."""
    official.check_empty(out)
    partial = partial_folder(out)
    student = _Student(view)
    student.check()
    for overlay in view.overlays:
        overlay.check_bytes()
    _check_space(out, student.disk_bytes - _done_bytes(partial))
    folder = StageFolder(partial, {"stage": "student", "format": 1, "view_sha256": view.recipe_sha256})
    shown = Progress("student", student.disk_bytes) if progress else None
    for file, names in student.files.items():
        size_bytes = sum(student.stored_bytes(name) for name in names)
        if folder.has(file):
            if shown:
                shown.resume(size_bytes)
            continue
        entries = [(name, student.entries[name][1], student.entries[name][0]) for name in names]
        write_atomic(partial / file, lambda path, entries=entries: _write(path, entries, student))  # type: ignore[misc]
        if shown:
            shown.add(file, size_bytes)
    _finish(student, partial)
    partial.rename(out)
    sync_directory(out.parent)
    return student.written()


def _write(path: Path, entries: list[tuple[str, str, tuple[int, ...]]], student: _Student) -> None:
    write_streamed(path, entries, student.pieces)


def _finish(student: _Student, folder: Path) -> None:
    """The index, config.json and the files beside the weights; what a kill left goes."""
    view = student.view
    for torn in folder.glob("*.partial"):
        torn.unlink()
    official.write_index(folder, student.files, inventory.size_bytes(student.entries))
    official.write_json(folder / "config.json", student.config_json())
    for name in SIDE_FILES:
        source = view.path / name
        if source.is_file():
            write_synced(folder / name, source.read_bytes())


def _check_space(out: Path, needed_bytes: int) -> None:
    parent = out.resolve().parent
    if not parent.is_dir():
        raise UsageError(f"{parent} is not a folder; create it first")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes + (16 << 20):
        raise SpaceError(f"{out} needs {needed_bytes:,} bytes more and {free:,} are free; free some or move it")


def _done_bytes(partial: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in partial.glob("*.safetensors")) if partial.is_dir() else 0


class _Student:
    """The official tensors of one view: what each is made of."""

    def __init__(self, view: View) -> None:
        self.view = view
        config = view.config
        self.experts = max(view.experts_kept)
        self.config = replace(config, n_routed_experts=self.experts)
        mtp, dspark = inventory.draft_of(view.base)
        whole = self.experts == config.n_routed_experts
        self.drafts = "none" if mtp == 0 and dspark is None else "kept" if whole else "dropped"
        self.entries = inventory.expected_tensors(self.config)
        if self.drafts == "kept":
            drafts = (name for name in view.base.names if name.startswith(inventory.EXTRA_PREFIX))
            self.entries |= {name: (view.info(name).shape, view.info(name).dtype) for name in drafts}
        self.files = official.shard_files(self.entries)
        self._scales: dict[str, Any] = {}  # of FP4 linears whose weight was written, until their scale is

    def check(self) -> None:
        """Every tensor has an official form, as far as names, dtypes and shapes tell."""
        view = self.view
        for name in self.entries:
            if not self.is_empty(name):
                self._check_one(name)
        extra = set(view.names) - set(self.entries) - {"head.scale"}
        for name in sorted(name for name in extra if not name.startswith(inventory.EXTRA_PREFIX)):
            raise CheckpointError(f"{view.info(name).file}: {name} has no place in an official checkpoint")

    def _check_one(self, name: str) -> None:
        (shape, dtype), view = self.entries[name], self.view
        linear, _, tail = name.rpartition(".")
        if tail == "weight" and view.rotation(linear):
            raise UsageError(
                f"{name} is stored rotated (block {view.rotation(linear)}), which the official format cannot say; "
                "quantize without --mr-gptq, or ship the model as a bundle"
            )
        if (tail == "scale" and self._is_fp4_linear(linear)) or (name == "head.weight" and self._is_fp8_head()):
            return
        info = view.info(name)
        wanted = (shape[0], shape[1] // 2) if dtype == "F8_E4M3" and info.dtype == "I8" else shape
        gate = _GATE.fullmatch(name)
        if gate:
            wanted = (view.experts_kept[int(gate[1])], *shape[1:])
        if info.shape != wanted or (info.dtype != dtype and not self._is_fp4_linear(linear)):
            raise CheckpointError(
                f"{info.file}: {name}: found {info.dtype} {list(info.shape)}, an official checkpoint has {dtype} "
                f"{list(shape)}"
            )

    def is_empty(self, name: str) -> bool:
        """True if ``name`` belongs to an expert beyond those its layer keeps."""
        expert = _EXPERT.match(name)
        return expert is not None and int(expert[2]) >= self.view.experts_kept[int(expert[1])]

    def stored_bytes(self, name: str) -> int:
        """Bytes of ``name`` that take disk."""
        return 0 if self.is_empty(name) else inventory.size_bytes({name: self.entries[name]})

    @property
    def disk_bytes(self) -> int:
        return sum(self.stored_bytes(name) for name in self.entries)

    def pieces(self, name: str) -> Iterable[Piece] | None:
        """The bytes of ``name`` as the official format has them; None for an empty expert's."""
        if self.is_empty(name):
            return None
        linear, _, tail = name.rpartition(".")
        gate = _GATE.fullmatch(name)
        if gate:
            return [self._gate(name, int(gate[1]))]
        if name == "head.weight" and self._is_fp8_head():
            return self._head()
        if self._is_fp4_linear(linear):
            return [self._fp8(linear, tail)]
        return self.view.stream(name)

    def _gate(self, name: str, layer: int) -> memoryview:
        """Router rows, zeros for empty experts; biases, NEVER for them."""
        rows = self.view.read(name)
        fill = np.zeros((self.experts - self.view.experts_kept[layer], *rows.shape[1:]), rows.dtype)
        if name.endswith(".bias"):
            fill[:] = NEVER
        return np.concatenate([rows, fill]).reshape(-1).view(np.uint8).data

    def _fp8(self, linear: str, tail: str) -> memoryview:
        """Weight, then scale, of a linear the view has in FP4."""
        if tail == "weight" or linear not in self._scales:
            packed, scales = self.view.read(f"{linear}.weight"), self.view.read(f"{linear}.scale")
            codes, self._scales[linear] = mxfp4_to_fp8(f"{linear}.weight", packed, scales)
        found = codes if tail == "weight" else self._scales.pop(linear)
        return np.ascontiguousarray(found).reshape(-1).data

    def _head(self) -> Iterable[Piece]:
        """The FP8 head as BF16, a row of blocks at a time."""
        scales, columns = self.view.read("head.scale"), self.view.info("head.weight").shape[1]
        for index, piece in enumerate(self.view.stream("head.weight", BLOCK * columns)):
            codes = np.frombuffer(piece, np.uint8).reshape(-1, columns)
            yield fp8_to_bf16("head.weight", codes, scales[index : index + 1]).reshape(-1).view(np.uint8).data

    def _is_fp4_linear(self, linear: str) -> bool:
        """True if the view has ``linear`` in FP4 and an official checkpoint in FP8."""
        name = f"{linear}.weight"
        return self.entries.get(name, ((), ""))[1] == "F8_E4M3" and self.view.info(name).dtype == "I8"

    def _is_fp8_head(self) -> bool:
        return self.view.info("head.weight").dtype == "F8_E4M3"

    def config_json(self) -> dict[str, Any]:
        """The source's config.json with the experts kept; without draft stages where they are not written."""
        raw = {**self.view.raw_config, "n_routed_experts": self.experts, "expert_dtype": "fp4"}
        if self.drafts == "kept":
            return raw
        layers = self.config.num_hidden_layers
        raw = {key: value for key, value in raw.items() if not key.startswith("dspark_")}
        return raw | {"num_nextn_predict_layers": 0, "compress_ratios": list(raw["compress_ratios"][:layers])}

    def written(self) -> Written:
        empty = sum(self.experts - kept for kept in self.view.experts_kept)
        size = inventory.size_bytes(self.entries)
        return Written(len(self.entries), size, self.disk_bytes, self.experts, empty, self.drafts)
