"""API keys: shown once, stored hashed, revoked by name."""

from __future__ import annotations

import hashlib

import pytest

from appliance.errors import StoreError, UsageError
from appliance.keys import find_key, list_keys, new_key, revoke_key


def test_a_key_is_stored_as_its_digest_only(tmp_path):
    token = new_key(tmp_path, "my-app")
    path = tmp_path / "keys" / "my-app.json"
    assert token.startswith("sk-solo-")
    assert len(token) > 40
    assert token not in path.read_text()
    assert hashlib.sha256(token.encode()).hexdigest() in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_keys_are_found_by_their_text_and_gone_when_revoked(tmp_path):
    assert list_keys(tmp_path) == []
    first, second = new_key(tmp_path, "a"), new_key(tmp_path, "b")
    assert first != second
    assert [key.name for key in list_keys(tmp_path)] == ["a", "b"]
    assert find_key(tmp_path, second).name == "b"
    assert find_key(tmp_path, second[:-1]) is None
    assert find_key(tmp_path, "") is None
    assert find_key(tmp_path, "\ud800") is None
    revoke_key(tmp_path, "b")
    assert find_key(tmp_path, second) is None
    assert find_key(tmp_path, first).name == "a"


@pytest.mark.parametrize("name", ["", "../x", "A", "a b", "x" * 33, ".hidden", "a/b", "a\n"])
def test_bad_names(tmp_path, name):
    with pytest.raises(UsageError, match="key name"):
        new_key(tmp_path, name)
    with pytest.raises(UsageError, match="no key named"):
        revoke_key(tmp_path, name)


def test_a_key_names_its_tenant(tmp_path):
    new_key(tmp_path, "a")
    new_key(tmp_path, "b", "lab-2")
    assert [key.tenant for key in list_keys(tmp_path)] == ["default", "lab-2"]


@pytest.mark.parametrize("tenant", ["", "../x", "A", "a b", "x" * 33, "a/b", "a\n", "shared"])
def test_bad_tenants(tmp_path, tenant):
    with pytest.raises(UsageError, match="tenant"):
        new_key(tmp_path, "app", tenant)
    assert list_keys(tmp_path) == []


def test_a_key_from_before_tenants_is_the_default_tenants(tmp_path):
    new_key(tmp_path, "app")
    path = tmp_path / "keys" / "app.json"
    path.write_text(path.read_text().replace(',"tenant":"default"', ""))
    assert list_keys(tmp_path)[0].tenant == "default"


def test_a_name_is_used_once(tmp_path):
    new_key(tmp_path, "app")
    with pytest.raises(UsageError, match="exists"):
        new_key(tmp_path, "app")


@pytest.mark.parametrize("text", [
    "", "{}", "[]", '{"created":"x","name":"app","sha256":"short"}',
    '{"created":"x","name":"app","sha256":"' + "0" * 64 + '","tenant":"shared"}',
    '{"created":"x","name":"app","sha256":"' + "0" * 64 + '","tenant":5}',
])  # fmt: skip
def test_a_damaged_key_file_is_named(tmp_path, text):
    token = new_key(tmp_path, "app")
    (tmp_path / "keys" / "app.json").write_text(text)
    with pytest.raises(StoreError, match=r"app\.json is damaged"):
        find_key(tmp_path, token)
