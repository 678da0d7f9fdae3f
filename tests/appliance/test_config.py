"""config.yaml: defaults, limits, and the line that says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.config import Config, home
from appliance.errors import UsageError

PATH = Path("config.yaml")


def test_defaults_without_a_file(tmp_path):
    config = Config.load(tmp_path)
    assert (config.server.host, config.server.port, config.server.queue_depth) == ("127.0.0.1", 8017, 8)
    assert config.server.max_body_bytes == 48 * 1024 * 1024
    assert config.server.drain_s == 30
    assert config.generation.max_tokens_default == 1024
    assert (config.kv.enabled, config.kv.max_bytes) == (True, 8 * 1024**3)
    assert 1 <= config.engine.threads <= 2
    assert config.engine.context_tokens == 8192
    assert config.engine.profile == "full"
    assert config.sources == {}


def test_a_file_changes_what_it_names_and_says_so(tmp_path):
    (tmp_path / "config.yaml").write_text("server:\n  port: 9000\nkv: {enabled: false}\n")
    config = Config.load(tmp_path)
    assert (config.server.port, config.kv.enabled, config.server.host) == (9000, False, "127.0.0.1")
    rows = {row["key"]: row for row in config.rows()}
    assert rows["server.port"]["source"] == str(tmp_path / "config.yaml")
    assert rows["server.port"]["default"] == 8017
    assert rows["server.host"]["source"] == "default"
    assert all(set(row) == {"key", "value", "unit", "default", "source", "about"} for row in rows.values())
    assert len(rows) == 19


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "kv:\n  # nothing\n", "server:\n  host: ::1\n", "server: {host: localhost}\n"]
)
def test_accepted(text):
    assert Config.from_bytes(text.encode(), PATH).server.port == 8017


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sever: {}\n", "unknown key 'sever'; known are server"),
        ("server:\n  prot: 1\n", "unknown key server.prot; known are host, port"),
        ("server: 5\n", "server holds settings"),
        ("- a\n", "holds list, not settings"),
        ("server:\n  port: '80'\n", "server.port is '80'; allowed is an integer"),
        ("server:\n  port: true\n", "server.port is True; allowed is an integer"),
        ("server:\n  port: 0\n", "server.port is 0; allowed is 1 to 65,535 port"),
        ("kv:\n  enabled: 1\n", "kv.enabled is 1; allowed is true or false"),
        ("kv:\n  max_bytes: 1.5\n", "kv.max_bytes is 1.5; allowed is an integer"),
        ("engine:\n  threads: -1\n", "engine.threads is -1; allowed is 1 to 256 threads"),
        ("engine:\n  profile: ../up\n", "engine.profile is '../up'; allowed is text of the form"),
        ("engine:\n  profile: ''\n", "engine.profile is ''; allowed is text of the form"),
        ("engine:\n  profile: 5\n", "engine.profile is 5; allowed is text"),
        ("server:\n  host: 0.0.0.0\n", "until TLS exists"),
        ("server:\n  host: example.org\n", "until TLS exists"),
        ("server:\n  host: null\n", "server.host is None; allowed is text"),
        ("server:\n  port: 1\n  port: 2\n", "'port' is written twice"),
        ("server: {port: 1}\nserver: {port: 2}\n", "'server' is written twice"),
        ("a: [1\n", "not valid YAML"),
        ("!!python/object/apply:os.system ['id']\n", "not valid YAML"),
        ("x: \x00\n", "not valid YAML"),
        ('server: {port: !!bool "x"}\n', "not valid YAML"),
        ('server: {port: !!timestamp "x"}\n', "not valid YAML"),
        ("#" * 70_000, "longer than 65,536 bytes"),
    ],
)
def test_refused_naming_file_key_and_what_is_allowed(text, words):
    with pytest.raises(UsageError) as caught:
        Config.from_bytes(text.encode(), PATH)
    assert words in str(caught.value)
    assert str(caught.value).startswith("config.yaml")
    assert "\n" not in str(caught.value)


def test_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SOLOCARD_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("SOLOCARD_HOME")
    monkeypatch.setattr("appliance.config.os.geteuid", lambda: 0)
    assert home() == Path("/var/lib/solocard")
    monkeypatch.setattr("appliance.config.os.geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path / ".local" / "share" / "solocard"
