"""The import rules as they come out at run time: fresh interpreters, and what is in their sys.modules.

import-linter reads the sources; this also sees what libraries and imports inside functions pull in.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NUMERIC = {"numpy", "torch", "onnx", "onnxruntime", "tokenizers", "transformers", "ml_dtypes", "safetensors"}
SCREEN, WEB = {"textual", "rich"}, {"starlette", "uvicorn"}
PROBE = """
import json, sys
{code}
print("\\nMODULES " + json.dumps(sorted(sys.modules)))
"""
HELP = """
from {module} import main
try:
    main({arguments!r})
except SystemExit as end:
    assert end.code == 0
"""


def loaded(code: str) -> set[str]:
    """Names in sys.modules of a new interpreter after ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(code=code)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.rpartition("\nMODULES ")[2]))


def test_the_appliance_needs_no_numbers_no_web_and_no_screen():
    modules = loaded("import appliance.cli, appliance.install, appliance.trial")
    assert "tuf.api.metadata" in modules
    assert not modules & (NUMERIC | SCREEN | WEB | {"exporter", "runtime", "ui"})


@pytest.mark.parametrize(
    ("module", "arguments", "forbidden"),
    [
        ("appliance.cli", ["install", "--help"], NUMERIC | SCREEN | WEB | {"exporter", "runtime", "ui"}),
        ("exporter.__main__", ["build", "--help"], {"torch", "transformers", "runtime", "ui", "onnxruntime"} | SCREEN),
        ("exporter.__main__", ["sign", "--help"], {"torch", "transformers", "runtime", "ui", "onnxruntime"} | SCREEN),
        ("runtime.__main__", ["serve", "--help"], {"torch", "onnx", "transformers", "exporter", "ui"} | SCREEN | WEB),
        ("ui.__main__", ["--help"], NUMERIC | SCREEN | WEB | {"exporter", "runtime"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_help_comes_without_heavy_imports(module, arguments, forbidden):
    modules = loaded(HELP.format(module=module, arguments=arguments))
    assert module in modules
    assert not modules & forbidden


def test_building_a_bundle_needs_no_torch_and_no_engine():
    modules = loaded("import exporter.build, exporter.sample, exporter.graph, exporter.goldens, exporter.signing")
    assert "onnx" in modules
    assert not modules & {"torch", "transformers", "onnxruntime", "onnxscript", "onnx_ir", "runtime", "ui"}


def test_serving_needs_no_torch_no_onnx_and_no_exporter():
    modules = loaded("import runtime.serving, runtime.trial, runtime.logits, runtime.backends.ort")
    assert {"onnxruntime", "starlette"} <= modules
    assert not modules & ({"torch", "onnx", "transformers", "exporter", "ui"} | SCREEN)


def test_the_console_sees_only_errors_wire_and_config_of_the_appliance():
    names = {name for name in loaded("import ui.app, ui.backend, ui.command") if name.startswith("appliance.")}
    assert names <= {"appliance.errors", "appliance.wire", "appliance.config"}


@pytest.mark.parametrize("folder", ["ui", "runtime/server"])
def test_screens_and_http_name_only_errors_wire_and_config_of_the_appliance(folder):
    sources = "\n".join(path.read_text("utf-8") for path in (ROOT / folder).rglob("*.py"))
    named = set(re.findall(r"^\s*(?:from|import) appliance\.?(\w*)", sources, re.MULTILINE))
    assert named <= {"errors", "wire", "config"}
    assert "errors" in named
