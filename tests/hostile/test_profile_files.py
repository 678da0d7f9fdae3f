"""Graphs of profiles, named by whoever made the bundle: every odd name, digest or count is refused by its field."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from bundle_support import Machine, files_of, spec

from appliance.bundle import BuiltBundle, VerifiedBundle
from appliance.bundle_writer import BundleWriter
from appliance.errors import BundleError, StoreError, UsageError
from appliance.manifest import FileEntry, Manifest, file_limit_bytes, graph_file, profile_of
from appliance.model import Golden, ModelSpec, Profile
from exporter.signing import new_keys, sign

SHA = "ab" * 32
ODD_NAMES = [
    "model.full.onnx", "model..onnx", "model.-a.onnx", "model.A.onnx", "model.a b.onnx", "model.a.b.onnx",
    "model.../../x.onnx", "../model.a.onnx", "model.a.onnx/", "model.a.onnx\n", "objects/model.a.onnx", "model.a",
    f"model.{'a' * 41}.onnx", "model.é.onnx", "model.a_b.onnx", "Model.a.onnx", "quality.json ", "quality.md", "",
]  # fmt: skip


def graph(profile: str, counter: int) -> bytes:
    return f"not a graph of {profile}, {counter}".encode()


def model(counter: int, *ids: str, own: str = "") -> ModelSpec:
    """model.json of a bundle with these profiles besides full; ``own`` is the first one's object."""
    profiles = [Profile("full", "any", (4, 4, 4), (), sha(graph("full", counter)))]
    for profile in ids:
        profiles.append(Profile(profile, "a card", (4, 3, 2), (own,) if own else (), sha(graph(profile, counter))))
    goldens = tuple(Golden(profile.id, (0, 5), (7,), 0.5) for profile in profiles)
    return dataclasses.replace(spec(), profiles=tuple(profiles), goldens=goldens)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def built(out: Path, counter: int = 1, ids: tuple[str, ...] = ("big-card", "small"), **changes: object) -> Path:
    """An unsigned bundle with a graph for each of ``ids`` and an object that only the first maps."""
    writer = BundleWriter(out)
    writer.add_object([bytes([7]) * 3000])
    own = writer.add_object([bytes([counter]) * 100]).sha256
    for profile in ("full", *ids):
        writer.add_file(graph_file(profile), graph(profile, counter))
    writer.add_file("tokenizer.json", b'{"version":"1.0"}')
    writer.add_file("quality.json", b'{"format":1,"profiles":{}}')
    described = dataclasses.replace(model(counter, *ids, own=own), **changes)
    writer.add_file("model.json", described.to_json().encode())
    writer.finish("sample", f"1.{counter}", counter, {})
    return out


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_no_files_of_a_bundle(name: str, tmp_path: Path) -> None:
    assert file_limit_bytes(name) is None
    assert profile_of(name) is None
    files = (FileEntry("model.json", SHA, 3), FileEntry("model.onnx", SHA, 4), FileEntry(name, SHA, 5))
    with pytest.raises(BundleError, match="is not one of"):
        Manifest("sample", "1", 1, files, ())
    with pytest.raises(BundleError, match="not one of"):
        BundleWriter(tmp_path / "b").add_file(name, b"x")
    assert files_of(tmp_path) == []


def test_seventeen_profiles_besides_full_are_too_many() -> None:
    files = [FileEntry("model.json", SHA, 3), FileEntry("model.onnx", SHA, 4)]
    files += [FileEntry(f"model.p{i}.onnx", SHA, 5) for i in range(16)]
    manifest = Manifest("sample", "1", 1, tuple(files), ())
    assert manifest.profiles[:3] == ("full", "p0", "p1")
    assert len(Manifest.from_bytes(manifest.to_bytes()).profiles) == 17
    with pytest.raises(BundleError, match="17 graphs besides"):
        dataclasses.replace(manifest, files=(*files, FileEntry("model.p16.onnx", SHA, 5)))
    raw = json.loads(manifest.to_bytes())
    raw["files"] += [{"path": f"model.q{i}.onnx", "sha256": SHA, "size_bytes": 5} for i in range(20)]
    data = json.dumps(raw, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(BundleError, match="files is not a list of at most 20"):
        Manifest.from_bytes(data)


def test_a_graph_longer_than_allowed_is_refused() -> None:
    files = (FileEntry("model.json", SHA, 3), FileEntry("model.onnx", SHA, 4),
             FileEntry("model.a.onnx", SHA, (64 << 20) + 1))  # fmt: skip
    with pytest.raises(BundleError, match=r"model\.a\.onnx\.size_bytes"):
        Manifest("sample", "1", 1, files, ())


def with_profile(**changes: object) -> dict[str, object]:
    profiles = model(1, "small").profiles
    return {"profiles": (profiles[0], dataclasses.replace(profiles[1], **changes))}


BAD_SPECS = {
    "no profiles": ({"profiles": ()}, "profiles are not 'full'"),
    "full is not first": ({"profiles": model(1, "small").profiles[::-1]}, "profiles are not 'full'"),
    "twice": ({"profiles": (*model(1, "small").profiles, model(1, "small").profiles[1])}, "each once"),
    "id": (with_profile(id="../small"), "profile id '../small'"),
    "id is no text": (with_profile(id=5), "field"),
    "too few layers": (with_profile(experts_kept=(4, 4)), "small: experts_kept is not 3 counts of 2 to 4"),
    "too many experts": (with_profile(experts_kept=(4, 4, 5)), "small: experts_kept"),
    "fewer than routed": (with_profile(experts_kept=(4, 4, 1)), "small: experts_kept"),
    "half an expert": (with_profile(experts_kept=(4, 4, 2.5)), "small: experts_kept"),
    "golden of nobody": ({"goldens": (Golden("big", (0,), (1,), 0.5),)}, "golden tokens of a profile 'big'"),
    "another graph": (with_profile(graph_sha256=SHA), "profile small was made for another model.small.onnx"),
    "an object that is not there": (with_profile(overlay_objects=(SHA,)), "needs an object that is not listed"),
}


@pytest.mark.parametrize("case", BAD_SPECS)
def test_a_model_json_that_does_not_fit_is_refused_built_and_signed(case: str, tmp_path: Path) -> None:
    changes, words = BAD_SPECS[case]
    bundle = built(tmp_path / "bundle", ids=("small",), **{"goldens": (), **changes})
    with pytest.raises(BundleError, match=words):
        BuiltBundle.open(bundle)
    machine = Machine(tmp_path / "home", new_keys(tmp_path / "keys"))
    with pytest.raises(BundleError):
        sign(bundle, tmp_path / "keys")
    assert not machine.state.current


@pytest.mark.parametrize("listed", [("small",), ("big-card", "other", "small")])
def test_list_and_model_json_must_have_the_same_profiles(listed: tuple[str, ...], tmp_path: Path) -> None:
    odd = "big-card" if len(listed) == 1 else "other"
    bundle = built(tmp_path / "bundle", ids=listed, profiles=model(1, "big-card", "small").profiles, goldens=())
    with pytest.raises(BundleError, match=f"disagree about profile '{odd}'"):
        BuiltBundle.open(bundle)


def test_an_installed_profile_is_checked_listed_and_removed_with_its_bundle(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "home", new_keys(tmp_path / "keys"))
    for counter in (1, 2, 3):
        sign(built(tmp_path / f"release-{counter}", counter), tmp_path / "keys")
        machine.install(tmp_path / f"release-{counter}")
    first, second, third = sorted(tmp_path.glob("home/models/*.model.small.onnx"))
    bundle = VerifiedBundle.open_current(machine.home, full=True)
    assert bundle.graph("small") == third
    assert third.read_bytes() == graph("small", 3)
    assert bundle.graph_path.name == f"{bundle.bundle_id}.model.onnx"
    with pytest.raises(UsageError, match=r"profile 'tiny' is not in .*, which has full, big-card, small"):
        bundle.graph("tiny")
    assert machine.installer().rollback().bundle_id == second.name.removesuffix(".model.small.onnx")
    machine.installer().remove(first.name.removesuffix(".model.small.onnx"))
    assert not first.exists()
    assert [p.name for p in sorted(tmp_path.glob("home/models/*.big-card.onnx"))] == [
        path.name.replace("small", "big-card") for path in (second, third)
    ]
    second.chmod(0o644)
    second.write_bytes(graph("small", 9))
    with pytest.raises(StoreError, match=r"model\.small\.onnx is damaged"):
        VerifiedBundle.open_current(machine.home)


def test_a_flipped_byte_of_any_profile_on_the_stick_is_named(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "home", new_keys(tmp_path / "keys"))
    stick = built(tmp_path / "release-1")
    sign(stick, tmp_path / "keys")
    for name in ("model.big-card.onnx", "model.small.onnx", "quality.json"):
        good = (stick / name).read_bytes()
        (stick / name).write_bytes(bytes([good[0] ^ 1]) + good[1:])
        with pytest.raises(BundleError, match=name.replace(".", r"\.")):
            machine.install(stick)
        (stick / name).write_bytes(good)
    assert machine.install(stick).changed
