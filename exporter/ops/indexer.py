"""LightningIndexer: which entries a token of a CSA layer attends to (V4 spec §2, Indexer).

score[t, s] = Σ_h w[t, h]·ReLU(q[t, h]·k[s]) in fp32; the K highest visible entries, lower index first on a tie.
"""

from __future__ import annotations

import numpy as np

from exporter.ops.body import INT32, Body, OpFunction, function
from exporter.ops.paging import entries, tokens, unpack, visible_entries

NO_ENTRY = np.iinfo(np.int64).max  # sorts behind every real column, then becomes −1


def lightning_indexer(
    *, heads: int, dim: int, topk: int, ratio: int, rows: int, row: int,
    pack: OpFunction | None, codec: OpFunction | None,
) -> OpFunction:  # fmt: skip
    """LightningIndexer: q f32 [b, m, Hi, d] (after Rope), w f32 [b, m, Hi], pool [blocks, R, row], block_table,
    fresh [b, c, row], pos → sel i32 [b, m, K] ascending, −1 at the end.

    In kv-v4 the query takes the keys' own round trip (Hadamard and FP4); in kv-f32 neither side does.
    """

    def build(body: Body) -> list[str]:
        query = body.reshape("q", -1, dim)
        if pack is not None and codec is not None:
            query = body.call(codec, body.call(pack, query))
        query = body.op("Reshape", query, body.op("Concat", body.op("Shape", "q", end=1), body.ints(-1, dim), axis=0))
        keys = entries(body, "pool", "block_table", "fresh", "pos", rows=rows, width=row, ratio=ratio)
        keys = unpack(body, codec, keys, row, dim)  # [b, E, d]
        dots = body.op("Relu", body.op("MatMul", query, body.op("Transpose", keys, perm=[0, 2, 1])))
        shape = body.op("Concat", body.op("Shape", "q", end=3), body.ints(-1), axis=0)
        dots = body.op("Reshape", dots, shape)  # [b, m, Hi, E]
        scores = body.op("Squeeze", body.op("MatMul", body.unsqueeze("w", 2), dots), body.ints(2))
        at = tokens(body, "pos", body.dim("q", 1))
        seen = visible_entries(body, at, body.arange(body.dim(keys, 1)), ratio)
        scores = body.op("Where", seen, scores, body.f32(-np.inf))
        scores = body.op("Pad", scores, body.ints(0, 0, 0, 0, 0, topk), body.f32(-np.inf))  # K may exceed E
        best, column = body.op("TopK", scores, body.ints(topk), n=2, axis=-1, largest=1, sorted=1)
        column = body.op("Where", body.op("Equal", best, body.f32(-np.inf)), body.i64(NO_ENTRY), column)
        column, _ = body.op("TopK", column, body.ints(topk), n=2, axis=-1, largest=0, sorted=1)
        column = body.op("Where", body.op("Equal", column, body.i64(NO_ENTRY)), body.i64(-1), column)
        return [body.cast(column, INT32)]

    overload = f"h{heads}d{dim}k{topk}r{ratio}" + ("" if codec else "_f32")
    inputs = ["q", "w", "pool", "block_table", "fresh", "pos"]
    return function("LightningIndexer", overload, inputs, {"topk": topk, "ratio": ratio}, build, ["sel"])
