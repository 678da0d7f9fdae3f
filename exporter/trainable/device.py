"""Where training runs: cpu, cuda, or npu (Ascend by torch_npu, imported only when asked for)."""

from __future__ import annotations

import ctypes
import importlib
import sys

import torch

from appliance.errors import UsageError

DEVICES = ("cpu", "cuda", "npu")


def open_device(name: str, local_rank: int = 0) -> torch.device:
    """The torch device ``name``; UsageError says what is missing. BF16 (CPU) or TF32 inside matrix products."""
    if name == "npu":
        try:
            importlib.import_module("torch_npu")
        except ImportError as error:
            raise UsageError(f"--device npu needs torch_npu ({error}); pip install solocard[ascend]") from None
    elif name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device; use --device cpu")
    elif name == "cpu":
        keep_memory()
    torch.set_float32_matmul_precision("medium")
    return torch.device(name) if name == "cpu" else torch.device(name, local_rank)


def keep_memory() -> None:
    """Let glibc keep freed memory instead of giving it back: page faults cost a fifth of a step."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
