"""Grows the nodes of one ONNX function body or graph: plain ai.onnx ops, opset 18, IR 8.

A :class:`Body` is a list of nodes with generated value names. Values are strings; ``op`` returns the name (or names)
of what the node computes. Constants are Constant nodes, one per distinct array. An :class:`OpFunction` is a finished
body of the ``solocard`` domain; its ``overload`` tells bodies apart whose structure depends on an attribute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from appliance.model import OP_DOMAIN, OP_VERSION

OPSET = 18
IR_VERSION = 8
Array = np.ndarray[Any, Any]
FLOAT, UINT8, INT32, INT64, BFLOAT16 = (
    onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8, onnx.TensorProto.INT32, onnx.TensorProto.INT64,
    onnx.TensorProto.BFLOAT16,
)  # fmt: skip


class Body:
    """Nodes in the order they were added, and the solocard functions they call."""

    def __init__(self, *, nested: bool = False) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.functions: dict[tuple[str, str], OpFunction] = {}
        self._nested, self._count = nested, 0
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def fresh(self, stem: str = "v") -> str:
        self._count += 1
        return f"{stem}{self._count}"

    def op(self, op_type: str, *inputs: str, n: int = 1, domain: str = "", **attrs: Any) -> Any:
        """Append one node; ``n`` outputs give one name, or a list of names when n > 1."""
        outputs = [self.fresh(op_type.lower()) for _ in range(n)]
        name = self.fresh(f"{op_type}_")
        self.nodes.append(helper.make_node(op_type, list(inputs), outputs, name=name, domain=domain, **attrs))
        return outputs[0] if n == 1 else outputs

    def const(self, value: Any, dtype: Any = None) -> str:
        array = np.asarray(value, dtype=dtype)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name = self.fresh("c")
            tensor = numpy_helper.from_array(array, name)
            self.nodes.append(helper.make_node("Constant", [], [name], name=f"{name}_const", value=tensor))
            self._constants[key] = name
        return self._constants[key]

    def ints(self, *values: int) -> str:
        return self.const(values, np.int64)

    def f32(self, value: float) -> str:
        return self.const(value, np.float32)

    def i64(self, value: int) -> str:
        return self.const(value, np.int64)

    def call(self, function: OpFunction, *inputs: str, n: int = 1) -> Any:
        """Append a node of the solocard domain and remember its body; inside another body, inline it instead.

        (onnxruntime 1.31 does not find an overload that is called from within a function.)
        """
        if self._nested:
            return self._inline(function, inputs, n)
        known = self.functions.setdefault((function.op, function.overload), function)
        if known.attrs != function.attrs:
            raise ValueError(f"two bodies named {function.op}:{function.overload}")
        outputs = [self.fresh(function.op.lower()) for _ in range(n)]
        node = helper.make_node(
            function.op, list(inputs), outputs, name=self.fresh(f"{function.op}_"), domain=OP_DOMAIN, **function.attrs
        )
        node.overload = function.overload
        self.nodes.append(node)
        return outputs[0] if n == 1 else outputs

    def _inline(self, function: OpFunction, inputs: Sequence[str], n: int) -> Any:
        names = dict(zip(function.inputs, inputs, strict=True))
        for node in function.nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            for output in node.output:
                names[output] = self.fresh(f"{function.op.lower()}_")
            for field, values in ((copy.input, node.input), (copy.output, node.output)):
                del field[:]
                field.extend(names[value] for value in values)
            copy.name = self.fresh(f"{node.op_type}_")
            self.nodes.append(copy)
        results = [names[output] for output in function.outputs]
        return results[0] if n == 1 else results

    # -- the few phrases every body uses -------------------------------------------------------------------------

    def reshape(self, x: str, *shape: int) -> str:
        """0 keeps a dim, −1 infers one, as ONNX has it."""
        return str(self.op("Reshape", x, self.ints(*shape)))

    def slice(self, x: str, axis: int, start: int, stop: int) -> str:
        return str(self.op("Slice", x, self.ints(start), self.ints(stop), self.ints(axis)))

    def split(self, x: str, sizes: Sequence[int], axis: int = -1) -> list[str]:
        return list(self.op("Split", x, self.ints(*sizes), n=len(sizes), axis=axis))

    def cast(self, x: str, to: int) -> str:
        return str(self.op("Cast", x, to=to))

    def dim(self, x: str, axis: int) -> str:
        """The size of one axis, i64 scalar."""
        return str(self.op("Squeeze", self.op("Shape", x, start=axis, end=axis + 1)))

    def arange(self, stop: str) -> str:
        return str(self.op("Range", self.i64(0), stop, self.i64(1)))

    def unsqueeze(self, x: str, *axes: int) -> str:
        return str(self.op("Unsqueeze", x, self.ints(*axes)))

    def rows_per_sequence(self, table: str, index: str, width: int, rank: int) -> str:
        """table [b, n, width], index i64 [b, …] of ``rank`` dims → [b, …, width]: each sequence its own rows."""
        offset = self.op("Mul", self.arange(self.dim(table, 0)), self.dim(table, 1))
        offset = self.reshape(offset, -1, *([1] * (rank - 1)))
        return str(self.op("Gather", self.reshape(table, -1, width), self.op("Add", index, offset), axis=0))

    def rms_norm(self, x: str, weight: str | None, eps: float) -> str:
        """x·rsqrt(mean(x²) + eps)·weight over the last axis, fp32 (V4 spec: RMSNorm)."""
        mean = self.op("ReduceMean", self.op("Mul", x, x), self.ints(-1), keepdims=1)
        y = self.op("Div", x, self.op("Sqrt", self.op("Add", mean, self.f32(eps))))
        return str(y if weight is None else self.op("Mul", y, weight))


@dataclass(frozen=True)
class OpFunction:
    """One function body of the solocard domain: its op, overload, value names, attributes and nodes."""

    op: str
    overload: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: dict[str, Any]
    nodes: tuple[onnx.NodeProto, ...]

    def to_proto(self) -> onnx.FunctionProto:
        proto = helper.make_function(
            OP_DOMAIN, self.op, list(self.inputs), list(self.outputs), list(self.nodes), opset_imports(),
            attributes=sorted(self.attrs),
        )  # fmt: skip
        proto.overload = self.overload
        return proto


def opset_imports() -> list[onnx.OperatorSetIdProto]:
    return [helper.make_opsetid("", OPSET), helper.make_opsetid(OP_DOMAIN, OP_VERSION)]


def function(
    op: str, overload: str, inputs: Sequence[str], attrs: dict[str, Any], build: Callable[[Body], Sequence[str]],
    outputs: Sequence[str],
) -> OpFunction:  # fmt: skip
    """Build a body: ``build`` adds nodes and returns the values to hand out under the names ``outputs``."""
    body = Body(nested=True)
    results = build(body)
    for value, name in zip(results, outputs, strict=True):
        body.nodes.append(helper.make_node("Identity", [value], [name], name=f"{name}_out"))
    return OpFunction(op, overload, tuple(inputs), tuple(outputs), dict(attrs), tuple(body.nodes))
