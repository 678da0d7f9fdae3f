"""``logits`` reads a file a person names: whatever lies in it, the answer is one line."""

import numpy as np
import pytest

from appliance.errors import UsageError
from runtime.logits import read_prompts

HUGE = b"{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999999,), }".ljust(117) + b"\n"
FILES = {"empty": b"", "zip": b"PK\x03\x04....", "huge": b"\x93NUMPY\x01\x00v\x00" + HUGE, "text": b"1 2 3"}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_npy_is_refused_by_name(name, tmp_path):
    path = tmp_path / f"{name}.npy"
    path.write_bytes(FILES[name])
    with pytest.raises(UsageError, match=rf"{name}\.npy: not a readable"):
        read_prompts(path)


def test_an_archive_is_refused(tmp_path):
    np.savez(tmp_path / "ids.npz", ids=np.arange(3))
    with pytest.raises(UsageError, match=r"ids\.npz: not a readable"):
        read_prompts(tmp_path / "ids.npz")
