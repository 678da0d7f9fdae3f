"""Where things lie below SOLOCARD_HOME. Names only; nothing is opened here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Layout:
    """Every path of one appliance; ``home`` is SOLOCARD_HOME."""

    home: Path

    @property
    def config(self) -> Path:
        return self.home / "config.yaml"

    @property
    def keys(self) -> Path:
        return self.home / "keys"

    @property
    def trust(self) -> Path:
        return self.home / "trust"

    @property
    def models(self) -> Path:
        """Bundles lie here beside ``objects/``: model.onnx may refer to files below its own folder only."""
        return self.home / "models"

    @property
    def state(self) -> Path:
        return self.models / "state.json"

    @property
    def journal(self) -> Path:
        return self.home / "journal.jsonl"

    @property
    def run(self) -> Path:
        return self.home / "run"

    @property
    def log(self) -> Path:
        return self.home / "log"

    @property
    def kv(self) -> Path:
        return self.home / "kv"

    @property
    def lock(self) -> Path:
        return self.run / "install.lock"

    @property
    def serve_pid(self) -> Path:
        return self.run / "serve.pid"

    def root(self, version: int) -> Path:
        """A trusted root, kept as it came."""
        return self.trust / f"{version}.root.json"

    def bundle_file(self, bundle_id: str, name: str) -> Path:
        """``name``: one of the bundle's small files (model.onnx, model.json …) or manifest.json, as installed."""
        return self.models / f"{bundle_id}.{name}"

    def metadata(self, bundle_id: str) -> Path:
        """The signed metadata an installed bundle came with."""
        return self.models / f"{bundle_id}.metadata"
