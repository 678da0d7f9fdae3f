"""SparseAttnSharedkv: attention of S, C and H layers over one shared K = V row per token or entry (V4 spec §2).

Keys stand in canonical columns, so that a row's sums group alike however a prompt is chunked: window tokens in blocks
of 128 aligned to absolute positions, entry s in column s; products with the two parts are added at the end.
Masked columns get −inf before the softmax and weigh exactly 0.
"""

from __future__ import annotations

import numpy as np

from exporter.ops.body import INT64, Body, OpFunction, function
from exporter.ops.paging import entries, history, tokens, unpack, visible_entries

ALIGN = 128  # columns per block: onnxruntime's matrix product sums in blocks of 128


def _window(body: Body, codec: OpFunction | None, window: int, row: int, dim: int) -> tuple[str, str]:
    """→ keys f32 [b, Cw, D] in aligned columns, mask bool [b, m, Cw] (t − W < token ≤ t)."""
    m = body.dim("fresh", 1)
    old = history(body, "window", "slots", "pos", window, row)
    known = unpack(body, codec, body.op("Concat", old, "fresh", axis=1), row, dim)  # tokens pos − W … pos + m − 1
    oldest = body.op("Sub", "pos", body.i64(window - 1))
    start = body.op("Sub", oldest, body.op("Mod", oldest, body.i64(ALIGN)))  # [b]
    span = body.op("Add", m, body.i64(window - 1 + 2 * ALIGN - 2))
    columns = body.op("Mul", body.op("Div", span, body.i64(ALIGN)), body.i64(ALIGN))
    token = tokens(body, start, columns)  # [b, Cw]
    offset = body.op("Add", body.op("Sub", token, body.unsqueeze("pos", 1)), body.i64(window))
    last = body.op("Add", m, body.i64(window - 1))
    index = body.op("Max", body.op("Min", offset, last), body.i64(0))
    keys = body.rows_per_sequence(known, index, dim, 2)
    at, key = body.unsqueeze(tokens(body, "pos", m), 2), body.unsqueeze(token, 1)
    inside = body.op("And", body.op("LessOrEqual", key, at), body.op("Less", body.op("Sub", at, key), body.i64(window)))
    return keys, str(body.op("And", inside, body.op("GreaterOrEqual", key, body.i64(0))))


def _selected(body: Body, columns: str) -> str:
    """sel i32 [b, m, K], columns i64 [] = E → bias f32 [b, m, E]: 0 where selected, −inf elsewhere."""
    sel = body.cast("sel", INT64)
    target = body.op("Where", body.op("Less", sel, body.i64(0)), columns, sel)  # −1 goes to a spare column E
    wide = body.op("Unsqueeze", body.op("Add", columns, body.i64(1)), body.ints(0))
    shape = body.op("Concat", body.op("Shape", "sel", end=2), wide, axis=0)
    base = body.op("Expand", body.f32(-np.inf), shape)
    zeros = body.op("Expand", body.f32(0), body.op("Shape", "sel"))
    bias = body.op("ScatterElements", base, target, zeros, axis=2)
    return body.slice(bias, 2, 0, -1)


def _bias(body: Body, mask: str) -> str:
    return str(body.op("Where", mask, body.f32(0), body.f32(-np.inf)))


def _scores(body: Body, query: str, keys: str, bias: str, shape: str) -> str:
    """query [b, m·H, D], keys [b, C, D], bias [b, m, C] → [b, m, H, C]."""
    dots = body.op("MatMul", query, body.op("Transpose", keys, perm=[0, 2, 1]))
    return str(body.op("Add", body.op("Reshape", dots, shape), body.unsqueeze(bias, 2)))


def _total(body: Body, weights: str, block: int) -> str:
    """Σ over the columns, [b, m, H, C] → [b, m, H, 1]: fixed blocks, then in order, so zeros behind change nothing."""
    shape = body.op("Concat", body.op("Shape", weights, end=3), body.ints(-1, block), axis=0)
    blocks = body.op("ReduceSum", body.op("Reshape", weights, shape), body.ints(-1), keepdims=0)
    return body.slice(body.op("CumSum", blocks, body.i64(-1)), 3, -1, np.iinfo(np.int64).max)


def sparse_attention(
    *, kind: str, heads: int, dim: int, window: int, row: int, ratio: int, rows: int, codec: OpFunction | None
) -> OpFunction:
    """SparseAttnSharedkv: q f32 [b, m, H, D], window [slots, W, row], slots, fresh [b, m, row], (pool [blocks, R, row],
    block_table, candidates [b, c, row], (sel i32 [b, m, K])), sink f32 [H], pos → o f32 [b, m, H, D].

    kind S has no entries, C takes the selected ones, H all that are closed. Softmax's denominator holds exp(sink).
    """  # fmt: skip
    scale = np.float32(dim**-0.5)

    def build(body: Body) -> list[str]:
        q_shape = body.op("Shape", "q")
        shape = body.op("Concat", body.op("Shape", "q", end=3), body.ints(-1), axis=0)
        query = body.op("Mul", "q", body.const(scale))
        query = body.op("Reshape", query, body.op("Concat", body.op("Shape", "q", end=1), body.ints(-1, dim), axis=0))
        keys, mask = _window(body, codec, window, row, dim)
        parts = [(keys, _scores(body, query, keys, _bias(body, mask), shape), ALIGN)]
        if kind != "S":
            keys = entries(body, "pool", "block_table", "candidates", "pos", rows=rows, width=row, ratio=ratio)
            keys = unpack(body, codec, keys, row, dim)
            if kind == "C":
                bias = _selected(body, body.dim(keys, 1))
            else:
                at = tokens(body, "pos", body.dim("fresh", 1))
                bias = _bias(body, visible_entries(body, at, body.arange(body.dim(keys, 1)), ratio))
            parts.append((keys, _scores(body, query, keys, bias, shape), rows))
        sink = body.reshape("sink", 1, 1, heads, 1)
        highest = [body.op("ReduceMax", scores, body.ints(-1), keepdims=1) for _, scores, _ in parts]
        top = body.op("Max", sink, *highest)
        output, total = "", body.op("Exp", body.op("Sub", sink, top))
        flat = body.op("Concat", body.op("Shape", "q", end=1), body.op("Mul", body.op("Shape", "q", start=1, end=2),
                       body.ints(heads)), body.ints(-1), axis=0)  # fmt: skip
        for keys, scores, block in parts:
            weights = body.op("Exp", body.op("Sub", scores, top))
            total = body.op("Add", total, _total(body, weights, block))
            product = body.op("MatMul", body.op("Reshape", weights, flat), keys)
            output = product if not output else body.op("Add", output, product)
        return [body.op("Div", body.op("Reshape", output, q_shape), total)]

    inputs = ["q", "window", "slots", "fresh"]
    if kind != "S":
        inputs += ["pool", "block_table", "candidates"] + (["sel"] if kind == "C" else [])
    overload = f"{kind}{ratio}h{heads}d{dim}w{window}" + ("" if codec else "_f32")
    attrs = {"window": window, "ratio": ratio, "scale": float(scale)}
    return function("SparseAttnSharedkv", overload, [*inputs, "sink", "pos"], attrs, build, ["o"])
