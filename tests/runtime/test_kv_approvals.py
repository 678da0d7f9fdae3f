"""Approved system prompts: exact text, this machine's key, whole files."""

import hashlib
import hmac
import json

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from appliance.errors import StoreError
from runtime.kv.approvals import Approvals

KEY, TEXT = bytes(range(32)), "You are the help desk of Example Ltd.\nBe brief. é"


def test_only_the_exact_text_is_approved(tmp_path) -> None:
    approvals = Approvals(tmp_path / "shared", KEY)
    assert not approvals.is_approved(TEXT)
    path = approvals.approve(TEXT)
    assert path.name == hashlib.sha256(TEXT.encode()).hexdigest() + ".json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert "Example" not in path.read_text()
    assert approvals.is_approved(TEXT)
    for other in (TEXT + " ", TEXT[:-1], TEXT.lower(), ""):
        assert not approvals.is_approved(other)
    assert approvals.approve(TEXT) == path
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert approvals.remove(TEXT)
    assert not approvals.is_approved(TEXT)
    assert not approvals.remove(TEXT)


def test_the_file_is_an_hmac_under_a_key_of_its_own(tmp_path) -> None:
    raw = json.loads(Approvals(tmp_path, KEY).approve(TEXT).read_text())
    extracted = hmac.digest(bytes(32), KEY, "sha256")  # HKDF's first step without salt, RFC 5869
    key = HKDFExpand(hashes.SHA256(), 32, b"solocard kv 2 shared").derive(extracted)
    assert raw["hmac"] == hmac.digest(key, hashlib.sha256(TEXT.encode()).digest(), "sha256").hex()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"hmac": 5}', '{"hmac": "zz"}', '{"hmac": ""}',
                                  '{"hmac": "' + "00" * 32 + '"}', '{"hmac": null}'])  # fmt: skip
def test_a_damaged_or_forged_file_approves_nothing(tmp_path, text: str) -> None:
    approvals = Approvals(tmp_path, KEY)
    approvals.approve(TEXT).write_text(text)
    assert not approvals.is_approved(TEXT)


def test_an_approval_of_another_machine_or_text_does_not_count(tmp_path) -> None:
    approvals = Approvals(tmp_path, KEY)
    ours = approvals.approve(TEXT)
    assert not Approvals(tmp_path, bytes(32)).is_approved(TEXT)
    other = ours.with_name(hashlib.sha256(b"other").hexdigest() + ".json")
    other.write_bytes(ours.read_bytes())
    assert not approvals.is_approved("other")


def test_a_directory_that_cannot_be_written_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        Approvals(tmp_path / "file", KEY).approve(TEXT)
