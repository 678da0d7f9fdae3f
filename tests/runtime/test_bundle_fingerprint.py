"""F of a served bundle changes with everything its rows are computed from, the host's part included."""

import dataclasses
from types import SimpleNamespace

import pytest
from bundle_support import spec
from kv_support import ARITHMETIC

from appliance.manifest import FileEntry, ObjectEntry
from appliance.model import ModelSpec
from runtime.kv.fingerprint import Fingerprint, difference
from runtime.serving import bundle_fingerprint

FILES = tuple(FileEntry(name, f"{i}" * 64, 9) for i, name in enumerate(("model.json", "model.onnx", "tokenizer.json")))


def digest(model: ModelSpec) -> bytes:
    return fingerprint_of(model).digest


def fingerprint_of(model: ModelSpec, graph: bytes = b"graph", profile: str = "full") -> Fingerprint:
    manifest = SimpleNamespace(files=FILES, objects=(ObjectEntry("a" * 64, 9, ()),))
    engine = SimpleNamespace(
        layout=SimpleNamespace(layout_id="f" * 64), backend=SimpleNamespace(arithmetic=ARITHMETIC), profile=profile
    )
    path = SimpleNamespace(read_bytes=lambda: graph)
    return bundle_fingerprint(SimpleNamespace(manifest=manifest, spec=model, graph=lambda _: path), engine)


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


def test_objects_are_those_the_graph_of_the_profile_maps():
    """External data is named objects/ab/<sha256> in the graph; what other profiles map is not in F."""
    own, shared = "ab" * 32, "cd" * 32
    graph = f"xx objects/ab/{own}\x1a objects/cd/{shared} objects/cd/short".encode()
    cut = fingerprint_of(spec(), graph, "small")
    assert cut.fields["objects"] == [own, shared]
    whole = fingerprint_of(spec(), f"objects/cd/{shared}".encode())
    assert whole.fields["objects"] == [shared]
    assert difference(whole, cut) == "graphs, objects, profile"
