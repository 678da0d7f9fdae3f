"""Keys and signing on the release desk."""

from __future__ import annotations

import argparse
import json

import pytest
from bundle_support import Desk, build, files_of

from appliance.bundle import BuiltBundle
from appliance.errors import BundleError, UsageError
from exporter.signing import add_commands, new_keys, sign


@pytest.fixture
def desk(tmp_path) -> Desk:
    return Desk(tmp_path / "desk")


def test_keys_are_private_and_never_overwritten(desk):
    for role in ("root", "targets", "snapshot", "timestamp"):
        assert (desk.keys / f"{role}.key").stat().st_mode & 0o777 == 0o600
    assert desk.keys.stat().st_mode & 0o777 == 0o700
    with pytest.raises(UsageError, match="never overwritten"):
        new_keys(desk.keys)


def test_signing_again_keeps_the_manifest_and_raises_versions(desk):
    stick = desk.release(1)
    before = BuiltBundle.open(stick).bundle_id
    first = set(files_of(stick))
    built, versions = sign(stick, desk.keys)
    assert built.bundle_id == before == BuiltBundle.open(stick).bundle_id
    assert (versions.targets, versions.snapshot, versions.timestamp) == (2, 2, 2)
    changed = {n.replace("1.targets", "2.targets").replace("1.snapshot", "2.snapshot") for n in first}
    assert set(files_of(stick)) == changed


def test_a_newer_release_gets_newer_versions(desk):
    desk.release(1)
    second = desk.release(2)
    assert (second / "metadata" / "2.snapshot.json").exists()
    assert json.loads((desk.keys / "versions.json").read_bytes()) == {"snapshot": 2, "targets": 2, "timestamp": 2}


def test_a_lost_version_file_cannot_repeat_what_the_bundle_carries(desk):
    stick = desk.release(1)
    sign(stick, desk.keys)
    (desk.keys / "versions.json").unlink()
    assert sign(stick, desk.keys)[1].timestamp == 3


def test_a_layout_of_metadata_targets_and_objects(desk):
    stick = desk.release(1)
    digest = BuiltBundle.open(stick).manifest.digest
    names = [n for n in files_of(stick) if not n.startswith("objects/")]
    assert names == [
        "metadata/1.root.json", "metadata/1.snapshot.json", "metadata/1.targets.json", "metadata/timestamp.json",
        "model.json", "model.onnx", f"targets/{digest}.manifest.json", "tokenizer.json",
    ]  # fmt: skip


def test_a_damaged_bundle_is_not_signed(desk, tmp_path):
    build(tmp_path / "bundle")
    (tmp_path / "bundle" / "model.json").write_bytes(b"{}")
    with pytest.raises(BundleError, match=r"model\.json"):
        sign(tmp_path / "bundle", desk.keys)
    assert not (tmp_path / "bundle" / "metadata").exists()


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_missing_or_foreign_keys_are_named(desk, tmp_path, role):
    build(tmp_path / "bundle")
    path = desk.keys / f"{role}.key"
    path.write_bytes((Desk(tmp_path / "other").keys / f"{role}.key").read_bytes())
    with pytest.raises(UsageError, match=rf"{role}\.key is not the {role} key"):
        sign(tmp_path / "bundle", desk.keys)
    path.write_bytes(b"not a key")
    with pytest.raises(UsageError, match=rf"{role}\.key is not an unencrypted PEM"):
        sign(tmp_path / "bundle", desk.keys)
    path.unlink()
    with pytest.raises(UsageError, match=rf"{role}\.key cannot be read"):
        sign(tmp_path / "bundle", desk.keys)
    assert (tmp_path / "bundle" / "manifest.json").exists()


def test_no_keys_and_damaged_versions(desk, tmp_path):
    build(tmp_path / "bundle")
    with pytest.raises(UsageError, match=r"no root\.json"):
        sign(tmp_path / "bundle", tmp_path / "nowhere")
    (desk.keys / "versions.json").write_text('{"targets":-1,"snapshot":1,"timestamp":1}')
    with pytest.raises(UsageError, match=r"versions\.json is damaged"):
        sign(tmp_path / "bundle", desk.keys)


def test_a_secure_counter_above_its_own_release_is_refused(desk, tmp_path):
    build(tmp_path / "bundle", counter=3)
    with pytest.raises(UsageError, match="0 to 3"):
        sign(tmp_path / "bundle", desk.keys, min_secure_counter=4)


def test_commands(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(required=True))

    def run(*words: str) -> int:
        args = parser.parse_args(list(words))
        code: int = args.func(args)
        return code

    assert run("keys", "new", str(tmp_path / "k")) == 0
    assert "fingerprint: " in capsys.readouterr().out
    bundle_id = build(tmp_path / "bundle").bundle_id
    assert run("sign", str(tmp_path / "bundle"), "--keys", str(tmp_path / "k"), "--expires-days", "30") == 0
    assert f"signed {bundle_id}" in capsys.readouterr().out
    expires = json.loads((tmp_path / "bundle" / "metadata" / "timestamp.json").read_bytes())["signed"]["expires"]
    assert expires.endswith("Z")
    with pytest.raises(SystemExit):
        run("sign", "x", "--keys", "k", "--expires-days", "0")
    assert "number of days" in capsys.readouterr().err
