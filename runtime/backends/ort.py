"""onnxruntime on the CPU: runs ``model.onnx`` with the function bodies it carries; nothing else is needed."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from appliance.errors import EngineError
from appliance.model import BLOCK_TOKENS
from runtime.backends.base import Arrays
from runtime.kv.fingerprint import Arithmetic, isa_class

KERNELS = "bodies-1"  # the function bodies of op set version 1


class OrtBackend:
    """One session of one graph. Raises EngineError naming the file when onnxruntime refuses it."""

    def __init__(self, graph_path: Path, *, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.enable_mem_reuse = False  # else planning is quadratic in the inlined bodies' unnamed dims
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leaves cores to HTTP and console
        try:
            self._session = ort.InferenceSession(str(graph_path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own kinds without a common base
            detail = str(error).splitlines()[0][:300]
            raise EngineError(f"{graph_path}: onnxruntime {ort.__version__} refuses the graph: {detail}") from error
        found = self._session.get_providers()
        if found != ["CPUExecutionProvider"]:
            raise EngineError(f"{graph_path}: onnxruntime chose {found}, wanted the CPU provider alone")
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._threads = threads

    @property
    def description(self) -> str:
        return f"onnxruntime {ort.__version__} on CPU, function bodies, {self._threads} thread(s)"

    @property
    def device(self) -> str:
        return "CPU"

    @property
    def arithmetic(self) -> Arithmetic:
        threads = f"intra={self._threads} inter=1"
        return Arithmetic("ort", ort.__version__, KERNELS, isa_class(), threads, BLOCK_TOKENS)

    def run(self, feeds: Arrays) -> Arrays:
        try:
            results = self._session.run(self._outputs, dict(feeds))
        except Exception as error:  # as above
            raise EngineError(f"onnxruntime failed: {str(error).splitlines()[0][:300]}") from error
        return dict(zip(self._outputs, results, strict=True))
