"""``config.yaml`` below SOLOCARD_HOME: every setting, its default, unit and limits. Unknown keys are refused.

Each setting is declared once, as a field with :func:`_setting`; reading, checking and `solocard config show` follow.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from appliance.errors import UsageError
from appliance.wire import FULL, PROFILE_ID

MAX_CONFIG_BYTES = 64 << 10


def home() -> Path:
    """SOLOCARD_HOME; without it /var/lib/solocard for root, else ~/.local/share/solocard. Not created here."""
    named = os.environ.get("SOLOCARD_HOME")
    if named:
        return Path(named).absolute()
    return Path("/var/lib/solocard") if os.geteuid() == 0 else Path.home() / ".local" / "share" / "solocard"


def _setting(
    default: Any, unit: str, about: str, low: int | None = None, high: int | None = None, *,
    form: re.Pattern[str] | None = None,
) -> Any:  # fmt: skip
    metadata = {"unit": unit, "about": about, "low": low, "high": high, "form": form}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The HTTP server."""

    host: str = _setting("127.0.0.1", "address", "address to listen on; loopback only until TLS exists")
    port: int = _setting(8017, "port", "TCP port", 1, 65535)
    queue_depth: int = _setting(8, "requests", "requests that may wait; the next gets 429", 0, 1024)
    max_body_bytes: int = _setting(48 << 20, "bytes", "longest request body", 1 << 10, 1 << 30)
    drain_s: int = _setting(30, "s", "time running requests get before a stop", 0, 3600)


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """What a request gets when it does not say."""

    max_tokens_default: int = _setting(1024, "tokens", "answer length when a request names none", 1, 1 << 20)


@dataclass(frozen=True, slots=True)
class KvConfig:
    """The KV cache on disk."""

    enabled: bool = _setting(True, "", "keep prompt caches on disk across restarts")
    max_bytes: int = _setting(8 << 30, "bytes", "disk space of the cache", 16 << 20, 1 << 44)
    min_free_bytes: int = _setting(1 << 30, "bytes", "free space that the cache leaves on its disk", 0, 1 << 44)
    daily_write_bytes: int = _setting(0, "bytes", "most it writes in a day (UTC); 0: no limit", 0, 1 << 50)
    ttl_hours: int = _setting(72, "h", "how long an unused prompt is kept", 1, 87_600)
    answer_ttl_hours: int = _setting(24, "h", "how long an unused end of an answer is kept", 1, 87_600)
    replay_answers: bool = _setting(False, "", "take an earlier answer that is sent back as it was sampled")
    exact_tails: bool = _setting(False, "", "keep the exact end of every answer, not only of those a stop cuts short")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The model's engine."""

    profile: str = _setting(FULL, "", "profile of the model, one per card; `solocard list` names them", form=PROFILE_ID)
    threads: int = _setting(1, "threads", "CPU threads of one operator; 1 lets answers be reused as prompts", 1, 256)
    context_tokens: int = _setting(8192, "tokens", "longest prompt plus answer", 512, 1 << 20)


@dataclass(frozen=True, slots=True)
class InstallConfig:
    """Installing and switching models."""

    trial_timeout_s: int = _setting(600, "s", "time a new model has to give its golden tokens", 1, 86400)
    restart_timeout_s: int = _setting(180, "s", "time a running server has to come back with the new model", 1, 86400)


@dataclass(frozen=True, slots=True)
class Config:
    """All settings. ``sources`` names the file for every key read from one; the others are defaults."""

    server: ServerConfig = field(default_factory=ServerConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    kv: KvConfig = field(default_factory=KvConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    install: InstallConfig = field(default_factory=InstallConfig)
    sources: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def load(home: Path) -> Config:
        """``home/config.yaml``, or every default when there is none. UsageError names file, key and limits."""
        path = home / "config.yaml"
        try:
            with path.open("rb") as file:
                data = file.read(MAX_CONFIG_BYTES + 1)
        except FileNotFoundError:
            return Config()
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error.strerror})") from None
        return Config.from_bytes(data, path)

    @staticmethod
    def from_bytes(data: bytes, path: Path) -> Config:
        """As :meth:`load`, from bytes; ``path`` is named in errors and in ``sources``."""
        if len(data) > MAX_CONFIG_BYTES:
            raise UsageError(f"{path} is longer than {MAX_CONFIG_BYTES:,} bytes")
        raw = _yaml(data, path)
        sources: dict[str, str] = {}
        sections: dict[str, Any] = {}
        for name, values in raw.items():
            section = _SECTIONS.get(name)
            if section is None:
                raise UsageError(f"{path}: unknown key {name!r}; known are {', '.join(_SECTIONS)}")
            values = {} if values is None else values  # every line below it is a comment
            if not isinstance(values, dict):
                raise UsageError(f"{path}: {name} holds settings, one per line below it; found {values!r}")
            sections[name] = _section(section, name, values, path)
            sources |= {f"{name}.{key}": str(path) for key in values}
        return Config(**sections, sources=sources)

    def rows(self) -> list[dict[str, Any]]:
        """One dict per setting: key, value, unit, default, source, about."""
        rows = []
        for name, section in _SECTIONS.items():
            defaults = section()
            for item in dataclasses.fields(section):
                key = f"{name}.{item.name}"
                rows.append({
                    "key": key, "value": getattr(getattr(self, name), item.name), "unit": item.metadata["unit"],
                    "default": getattr(defaults, item.name), "source": self.sources.get(key, "default"),
                    "about": item.metadata["about"],
                })  # fmt: skip
        return rows


_SECTIONS: dict[str, Any] = {
    "server": ServerConfig, "generation": GenerationConfig, "kv": KvConfig, "engine": EngineConfig,
    "install": InstallConfig,
}  # fmt: skip


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is written twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _yaml(data: bytes, path: Path) -> dict[Any, Any]:
    try:
        raw = yaml.load(data, _StrictLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError, KeyError, AttributeError) as error:  # a wrong !!tag
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if raw is not None and not isinstance(raw, dict):
        raise UsageError(f"{path} holds {type(raw).__name__}, not settings; see `solocard config show`")
    return raw or {}


def _section(section: Any, name: str, values: dict[Any, Any], path: Path) -> Any:
    known = {item.name: item for item in dataclasses.fields(section)}
    for key, value in values.items():
        if key not in known:
            raise UsageError(f"{path}: unknown key {name}.{key}; known are {', '.join(known)}")
        _check(known[key], getattr(section(), key), value, f"{path}: {name}.{key}")
    return section(**values)


def _check(item: dataclasses.Field[Any], default: Any, value: Any, where: str) -> None:
    if type(value) is not type(default):
        kind = {bool: "true or false", int: "an integer", str: "text"}[type(default)]
        raise UsageError(f"{where} is {value!r}; allowed is {kind}")
    low, high = item.metadata.get("low"), item.metadata.get("high")
    if low is not None and not low <= value <= high:
        raise UsageError(f"{where} is {value:,}; allowed is {low:,} to {high:,} {item.metadata['unit']}")
    form = item.metadata.get("form")
    if form is not None and form.fullmatch(value) is None:
        raise UsageError(f"{where} is {value[:60]!r}; allowed is text of the form {form.pattern}")
    if item.name == "host":
        check_loopback(value, where)


def check_loopback(host: str, where: str) -> None:
    """UsageError calling it ``where`` unless ``host`` is localhost or a loopback address."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise UsageError(f"{where} is {host!r}; only a loopback address (127.0.0.1, ::1) is allowed until TLS exists")
