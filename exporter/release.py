"""One release and how it becomes a bundle: objects, graphs, golden tokens, manifest, in a folder that can be resumed.

``OUT.partial`` holds recipe.json (every input by digest), journal.jsonl, ``unfinished/`` and ``bundle/``, which is
renamed to OUT when its manifest is complete. The bundle is the same for any number of workers and kills.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.bundle_writer import BundleWriter, sync_directory
from appliance.errors import SpaceError, UsageError
from appliance.manifest import REQUIRED_FILES, FileEntry, Manifest, ObjectEntry
from appliance.model import Golden, ModelConfig, ModelSpec, Profile, state_tensors
from exporter.build_profiles import BuildProfile, quality_json
from exporter.goldens import MIN_MARGIN, find_goldens
from exporter.graph import StoredTensor, build_graph
from exporter.journal import Journal
from exporter.object_plan import ObjectPlan, base_plans, profile_plans
from exporter.progress import Progress
from exporter.provenance import provenance, source_digest
from exporter.stage import RECIPE, StageFolder, code_version, digest, partial_folder
from exporter.view import View
from exporter.writer import ObjectWriter, disk_error, kept_bytes, stored

JOURNAL = "journal.jsonl"
SPARE_BYTES = 64 << 20  # for graphs, small files and the file system
FindGoldens = Callable[[Path, ModelConfig, Sequence[Sequence[int]], str], tuple[Golden, ...]]


@dataclass(frozen=True, slots=True)
class Release:
    """Everything a bundle is made of. ``profiles``: ``full`` first."""

    name: str
    version: str
    counter: int
    encoding: str
    numerics: str
    profiles: tuple[BuildProfile, ...]
    tokenizer: bytes | None
    golden_prompts: Sequence[Sequence[int]] = ()

    @property
    def base_view(self) -> View:
        """The whole model in rank order."""
        return self.profiles[0].view

    @property
    def config(self) -> ModelConfig:
        return self.base_view.config

    def recipe(self) -> dict[str, Any]:
        """Every input by digest, one field each, so that a refusal can name the field."""
        view = self.base_view
        sources = [[s.path.name, s.size_bytes, s.path.stat().st_mtime_ns] for s in view.base.sources]
        found: dict[str, Any] = {
            "stage": "build", "source_sha256": view.source_sha256, "source_files": digest(sources),
            "ranking_sha256": view.ranking.sha256, "name": self.name, "release_version": self.version,
            "release_counter": self.counter, "encoding": self.encoding, "numerics": self.numerics,
            "tokenizer_sha256": hashlib.sha256(self.tokenizer).hexdigest() if self.tokenizer else "none",
            "golden_prompts_sha256": digest(self.golden_prompts), **code_version(),
        }  # fmt: skip
        for profile in self.profiles:
            found |= {f"profile {profile.id} {field}": value for field, value in profile.recipe().items()}
        return found

    def plans(self) -> tuple[ObjectPlan, ...]:
        """Every object: those all profiles share, then each profile's own."""
        own = [profile_plans(profile.view, profile.id) for profile in self.profiles[1:]]
        return (*base_plans(self.base_view), *(plan for plans in own for plan in plans))


def write_bundle(
    release: Release, out: Path, *, workers: int = 2, find: FindGoldens = find_goldens
) -> Manifest:  # fmt: skip
    """Write or go on writing ``out``. UsageError: OUT is there, or OUT.partial is of another recipe, field by name.

    SpaceError tells the bytes missing. ``find`` may give no golden tokens at all, for benchmarks of the writing alone.
    """
    partial = partial_folder(out)
    _check_out(out, partial)
    _check_listed(release)
    plans, recipe = release.plans(), release.recipe()
    total_bytes = sum(plan.size_bytes for plan in plans)
    check_space(out, total_bytes - kept_bytes(partial))
    try:
        (partial / f"{RECIPE}.partial").unlink(missing_ok=True)
        StageFolder(partial, recipe)
        with closing(Journal(partial / JOURNAL, digest(recipe))) as journal:
            manifest = _Bundling(release, partial, journal, workers, find).run(plans)
        (partial / "bundle").rename(out)
        sync_directory(out.resolve().parent)
        shutil.rmtree(partial)
    except OSError as error:
        raise disk_error(error, partial, total_bytes) from None
    return manifest


def check_space(out: Path, needed_bytes: int) -> None:
    """SpaceError when the disk of ``out`` has not ``needed_bytes`` more."""
    free = shutil.disk_usage(out.resolve().parent).free
    if free < needed_bytes * 1.02 + SPARE_BYTES:
        raise SpaceError(f"{out} needs {needed_bytes:,} bytes and {free:,} are free on its disk; free some or move it")


def _check_out(out: Path, partial: Path) -> None:
    if out.exists():
        if (partial / RECIPE).is_file() and not (partial / "bundle").exists():
            shutil.rmtree(partial)  # a kill came between the last rename and this
        raise UsageError(f"{out} exists; name a new folder or remove it")
    if not out.resolve().parent.is_dir():
        raise UsageError(f"{out.resolve().parent} is not a folder; create it first")


def _check_listed(release: Release) -> None:
    """What the manifest says of the release is checked before the work: BundleError or UsageError names the field."""
    zeros = "0" * 64
    files = tuple(FileEntry(name, zeros, 1) for name in REQUIRED_FILES)
    found = provenance(release.base_view, release.profiles, {"read_sha256": zeros})
    Manifest(release.name, release.version, release.counter, files, (), found)


class _Bundling:
    """The steps after the folder is claimed."""

    def __init__(
        self, release: Release, partial: Path, journal: Journal, workers: int, find: FindGoldens
    ) -> None:  # fmt: skip
        self.release, self.partial, self.folder = release, partial, partial / "bundle"
        self.journal, self.workers, self.find = journal, workers, find

    def run(self, plans: Sequence[ObjectPlan]) -> Manifest:
        progress = Progress("objects", sum(plan.size_bytes for plan in plans))
        objects = ObjectWriter(
            self.folder, self.partial / "unfinished", self.journal, workers=self.workers, report=progress.add,
            resumed=lambda what, size_bytes: progress.resume(size_bytes),
        )  # fmt: skip
        entries = objects.write(plans)
        writer = BundleWriter(self.folder, resume=True)
        for plan in plans:
            writer.adopt(entries[plan.key])
        profiles = [self._profile(profile, plans, entries, writer) for profile in self.release.profiles]
        if self.release.tokenizer is not None:
            writer.add_file("tokenizer.json", self.release.tokenizer)
        quality = quality_json(self.release.profiles)
        if quality is not None:
            text = json.dumps(quality, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
            writer.add_file("quality.json", (text + "\n").encode())
        return self._finish(writer, tuple(profiles), plans)

    def _profile(
        self, profile: BuildProfile, plans: Sequence[ObjectPlan], entries: Mapping[str, ObjectEntry],
        writer: BundleWriter,
    ) -> Profile:  # fmt: skip
        """The profile's graph over the shared objects and its own."""
        shared = {entries[plan.key].sha256 for plan in plans if plan.is_base}
        own = [plan for plan in plans if plan.key == f"{plan.tensor}@{profile.id}"]
        tensors: dict[str, StoredTensor] = {
            plan.tensor: stored(plan, entries[plan.key]) for plan in (*(p for p in plans if p.is_base), *own)
        }
        graph = build_graph(profile.view, self.release.numerics, tensors).SerializeToString(deterministic=True)
        writer.add_file(profile.graph_file, graph)
        overlay_objects = tuple(sorted({entries[plan.key].sha256 for plan in own} - shared))
        kept = profile.view.experts_kept
        return Profile(profile.id, profile.card, kept, overlay_objects, hashlib.sha256(graph).hexdigest())

    def _finish(
        self, writer: BundleWriter, profiles: tuple[Profile, ...], plans: Sequence[ObjectPlan]
    ) -> Manifest:  # fmt: skip
        release = self.release
        spec = ModelSpec(
            release.name, release.config, state_tensors(release.config, release.numerics), release.encoding,
            release.numerics, profiles, (), tokenizer=release.tokenizer is not None,
        )  # fmt: skip
        source = source_digest(plans, self.journal)
        listed = (
            release.name, release.version, release.counter, provenance(release.base_view, release.profiles, source)
        )  # fmt: skip
        writer.add_file("model.json", spec.to_json().encode())
        if not all(self.journal.fact("goldens", profile.id) for profile in profiles):
            writer.finish(*listed)  # a draft the engine can open; the golden tokens come from it
        goldens = tuple(golden for profile in profiles for golden in self._goldens(profile))
        writer.replace_file("model.json", dataclasses.replace(spec, goldens=goldens).to_json().encode())
        return writer.finish(*listed)

    def _goldens(self, profile: Profile) -> tuple[Golden, ...]:
        """The profile's golden tokens: those an earlier run found for this graph, else by the engine."""
        line = self.journal.fact("goldens", profile.id)
        if line is None or line["graph_sha256"] != profile.graph_sha256:
            print(f"golden tokens of {profile.id}: asking the engine", file=sys.stderr)
            found = self.find(self.folder, self.release.config, self.release.golden_prompts, profile.id)
            pairs = [[golden.prompt_ids, golden.expected_ids] for golden in found]
            self.journal.append("goldens", profile.id, graph_sha256=profile.graph_sha256, found=pairs)
            return found
        return tuple(
            Golden(profile.id, tuple(prompt), tuple(expected), MIN_MARGIN) for prompt, expected in line["found"]
        )  # fmt: skip
