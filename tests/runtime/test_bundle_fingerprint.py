"""F of a served bundle changes with everything its rows are computed from, the host's part included."""

import dataclasses
from types import SimpleNamespace

import pytest
from bundle_support import spec
from kv_support import ARITHMETIC

from appliance.manifest import FileEntry, ObjectEntry
from appliance.model import ModelSpec
from runtime.serving import bundle_fingerprint

FILES = tuple(FileEntry(name, f"{i}" * 64, 9) for i, name in enumerate(("model.json", "model.onnx", "tokenizer.json")))


def digest(model: ModelSpec) -> bytes:
    manifest = SimpleNamespace(files=FILES, objects=(ObjectEntry("a" * 64, 9, ()),))
    engine = SimpleNamespace(layout=SimpleNamespace(layout_id="f" * 64), backend=SimpleNamespace(arithmetic=ARITHMETIC))
    return bundle_fingerprint(SimpleNamespace(manifest=manifest, spec=model), engine).digest


@pytest.mark.parametrize("field", ["rope_theta", "compress_rope_theta", "rope_scaling"])
def test_tables_the_host_feeds_are_in_the_fingerprint(field):
    model = spec()
    value = getattr(model.config, field)
    other = value * 2 if isinstance(value, float) else dataclasses.replace(value, factor=value.factor * 2)
    changed = dataclasses.replace(model, config=dataclasses.replace(model.config, **{field: other}))
    assert digest(changed) != digest(model)  # graph and objects are the same: nothing else would tell


def test_goldens_and_names_do_not_matter():
    model = spec()
    assert digest(dataclasses.replace(model, name="renamed", goldens=())) == digest(model)
