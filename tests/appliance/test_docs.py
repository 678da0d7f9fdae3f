"""The two manuals name every command, setting, limit and exit code there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance import errors, manifest, store, trust
from appliance.cli import build_parser
from appliance.config import _SECTIONS, Config
from appliance.errors import SolocardError

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def operations() -> str:
    return (DOCS / "operations.md").read_text()


@pytest.fixture(scope="module")
def bundle_format() -> str:
    return (DOCS / "bundle-format.md").read_text()


def commands() -> list[str]:
    found = []
    for name, command in build_parser()._subparsers._group_actions[0].choices.items():
        groups = command._subparsers
        inner = groups._group_actions[0].choices if groups else {"": None}
        found += [f"{name} {action}".strip() for action in inner]
    return found


@pytest.mark.parametrize("command", commands())
def test_every_command_is_described(operations, command):
    assert f"solocard {command}" in " ".join(operations.split())


@pytest.mark.parametrize("row", Config().rows(), ids=lambda row: row["key"])
def test_every_setting_is_in_the_table_with_default_and_limits(operations, row):
    (line,) = [line for line in operations.splitlines() if line.startswith(f"| `{row['key']}`")]
    section, name = row["key"].split(".")
    limits = next(f.metadata for f in _SECTIONS[section].__dataclass_fields__.values() if f.name == name)
    if limits.get("low") is not None:
        assert f"{limits['low']:,}–{limits['high']:,}" in line
    default = str(row["default"]).lower() if isinstance(row["default"], bool) else str(row["default"])
    assert f"| {default} |" in line
    assert f"| {row['unit']} |" in line or not row["unit"]


def test_every_limit_of_the_format_is_written_down(bundle_format):
    numbers = [
        manifest.MAX_MANIFEST_BYTES, manifest.MAX_OBJECTS, manifest.MAX_CHUNKS, manifest.MAX_OBJECT_BYTES,
        manifest.MAX_BUNDLE_BYTES, manifest.MAX_PROVENANCE_BYTES, manifest.MAX_RELEASE_COUNTER,
        *manifest.FILE_LIMITS_BYTES.values(), *trust.MAX_METADATA_BYTES.values(),
    ]  # fmt: skip
    missing = [number for number in numbers if f"{number:,}" not in bundle_format]
    assert missing == []
    assert f"at most {trust.MAX_ROOT_ROTATIONS} roots" in bundle_format
    assert f"{store.MARGIN_BYTES >> 20} MiB" in bundle_format
    for pattern in (manifest._NAME, manifest._VERSION):
        assert f"`{pattern.pattern}`" in bundle_format


def test_every_exit_code_of_these_commands_is_explained(operations):
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SolocardError)]
    elsewhere = {errors.CheckpointError, errors.EngineError, errors.RequestError, errors.SolocardError}
    for kind in set(kinds) - elsewhere:
        assert f"\n| {kind.exit_code} |" in operations
