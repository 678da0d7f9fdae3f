"""Everything that is measured on one student, piece by piece in a stage folder, so that a killed evaluation goes on.

Pieces: ``scores.safetensors`` (per token), ``layers.json``, ``generation.json``. ``WORK/teacher-…`` holds the
teacher's walk and answers: kept, it serves the next student on the same texts.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from exporter.calibration import Text
from exporter.evaluate import metrics
from exporter.evaluate.metrics import TokenScores
from exporter.evaluate.needle import Needle, recall
from exporter.safetensors_file import read_header
from exporter.stage import StageFolder, digest, read_json, write_json
from exporter.view import View

SCORES, LAYERS, GENERATION = "scores.safetensors", "layers.json", "generation.json"


@dataclass(frozen=True)
class Question:
    """What to measure: both models, the texts, longer texts, needles, answers to generate."""

    teacher: View
    student: View
    texts: Sequence[Text]
    long: Sequence[Text]
    needles: Sequence[Needle]
    answers: int
    answer_tokens: int
    device: str = "cpu"

    @cached_property
    def sequences(self) -> list[tuple[int, ...]]:
        """Texts, long texts, needles, in this order: one walk of each model serves all."""
        return [text.ids for text in (*self.texts, *self.long)] + [needle.ids for needle in self.needles]

    @property
    def text_tokens(self) -> int:
        return sum(len(text.ids) for text in self.texts)


class Measurement:
    """``question`` answered in ``folder``; what takes long lies under ``work`` until it is done."""

    def __init__(self, question: Question, folder: StageFolder, work: Path) -> None:
        self.question, self.folder = question, folder
        name = digest([list(ids) for ids in question.sequences])
        self.teacher_work = work / f"teacher-{digest([name, question.teacher.recipe_sha256])[:16]}"
        self.student_work = work / f"student-{digest([name, question.student.recipe_sha256])[:16]}"

    def metrics(self) -> dict[str, Any]:
        """All of quality.json's metrics; runs what is missing."""
        q, scores = self.question, self._scores()
        texts, longer = scores[: len(q.texts)], scores[len(q.texts) : len(q.texts) + len(q.long)]
        generation = self._generation()
        found: dict[str, Any] = {
            "total": metrics.summary(metrics.joined(texts)),
            "domains": metrics.by_domain([(t.domain, s) for t, s in zip(q.texts, texts, strict=True)]),
            "lengths": metrics.by_length(longer or texts), "layer_error": self._layers(),
            "needles": recall(q.needles, scores[len(q.texts) + len(q.long) :]),
            "generation": generation.get("measured"), "not_measured": {},
        }  # fmt: skip
        for name, reason in (
            ("lengths", f"no text has {metrics.SHORTEST_LENGTH} tokens"), ("needles", "none were asked for"),
            ("generation", generation.get("reason", "")),
        ):  # fmt: skip
            if not found[name]:
                found["not_measured"][name] = reason
        return found

    def discard_student(self) -> None:
        """Remove the student's work; the teacher's serves the next student."""
        shutil.rmtree(self.student_work, ignore_errors=True)

    def _scores(self) -> list[TokenScores]:
        if not self.folder.has(SCORES):
            from exporter.evaluate.walks import score

            scores = score(self._walk("teacher"), self._walk("student"), self.question.sequences)
            self.folder.write_tensors(SCORES, _packed(scores))
        return _unpacked(self.folder.path / SCORES, [len(ids) for ids in self.question.sequences])

    def _walk(self, role: str) -> Any:
        from exporter.evaluate.walks import run_walk

        q = self.question
        view, folder = (q.teacher, self.teacher_work) if role == "teacher" else (q.student, self.student_work)
        return run_walk(view, q.sequences, folder, text_tokens=q.text_tokens, label=role, device=q.device)

    def _layers(self) -> list[float]:
        """Relative error of the streams after each layer, over the sampled tokens."""
        path, layers = self.folder.path / LAYERS, self.question.teacher.config.num_hidden_layers
        if not path.is_file():
            from exporter.evaluate.walks import read_sample

            for role in ("teacher", "student"):
                self._walk(role)  # nothing to do, unless the work folder is gone
            errors = [
                metrics.relative_error(read_sample(self.teacher_work, layer), read_sample(self.student_work, layer))
                for layer in range(layers)
            ]
            write_json(path, {"layer_error": errors})
        return list(read_json(path)["layer_error"])

    def _generation(self) -> Mapping[str, Any]:
        """{"measured": numbers} or {"reason": why not}."""
        path = self.folder.path / GENERATION
        if not path.is_file():
            write_json(path, self._generated())
        return read_json(path)

    def _generated(self) -> dict[str, Any]:
        from exporter.evaluate import generation

        q = self.question
        beginnings = generation.prompts([text.ids for text in q.texts], q.answers)
        if not beginnings:
            return {"reason": "no text has 32 tokens to begin with" if q.answers else "none was asked for"}
        reason = generation.too_large(q.teacher)
        if reason is not None:
            return {"reason": reason}
        eos, teacher, student = q.teacher.config.eos_token_id, _model(q.teacher), _model(q.student)

        def teachers() -> dict[str, Any]:
            said = generation.answers(teacher, beginnings, q.answer_tokens, eos, "teacher")
            return {"said": said, "nll": generation.losses(teacher, beginnings, said)}

        cached = _cached(self.teacher_work / f"answers-{q.answers}-{q.answer_tokens}.json", teachers)
        said = generation.answers(student, beginnings, q.answer_tokens, eos, "student")
        ours = generation.losses(student, beginnings, cached["said"])
        return {"measured": generation.compared(cached["said"], said, cached["nll"], ours)}


def _cached(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    return read_json(path)


def _model(view: View) -> Any:
    from exporter.reference import Reference

    return Reference.from_view(view, kv_sim=True)


def _packed(scores: Sequence[TokenScores]) -> list[tuple[str, str, Any]]:
    joined = metrics.joined(scores)
    columns = zip((field.name for field in fields(TokenScores)), astuple(joined), strict=True)
    return [(name, "U8", values.astype(np.uint8)) if values.dtype == bool else (name, "F32", values)
            for name, values in columns]  # fmt: skip


def _unpacked(path: Path, sizes: Sequence[int]) -> list[TokenScores]:
    """One per sequence; CheckpointError names a damaged file."""
    columns = {}
    for info in read_header(path):
        kind = np.uint8 if info.dtype == "U8" else np.dtype("<f4")
        raw = np.fromfile(path, kind, int(np.prod(info.shape)), offset=info.offset)
        columns[info.name] = raw.astype(bool) if info.dtype == "U8" else raw
    ends = np.cumsum(sizes)[:-1]
    split = [np.split(columns[field.name], ends) for field in fields(TokenScores)]
    return [TokenScores(*row) for row in zip(*split, strict=True)]
