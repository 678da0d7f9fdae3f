"""HcPre, HcPost, HcHead: the manifold-constrained hyper-connections around every block (V4 spec §2, mHC).

Sinkhorn runs on the 4×4 mixing matrix flattened to 16 columns: a product with a constant 16×16 matrix of ones
sums rows or columns and adds eps in the same node, so one half iteration is two nodes.
"""

from __future__ import annotations

import numpy as np

from exporter.ops.body import Body, OpFunction, function

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float32]]


def _mixes(body: Body, n: int, hidden: int, eps: float) -> str:
    """h [T, n, D] · fnᵀ with the streams' joint RMS: m = (X·fnᵀ)·rsqrt(mean(X²) + eps), X = flatten(h)."""
    x = body.reshape("h", 0, n * hidden)
    mean = body.op("ReduceMean", body.op("Mul", x, x), body.ints(-1), keepdims=1)
    root = body.op("Sqrt", body.op("Add", mean, body.f32(eps)))
    return str(body.op("Div", body.op("MatMul", x, body.op("Transpose", "fn", perm=[1, 0])), root))


def _merge(body: Body, pre: str, n: int, hidden: int) -> str:
    """Σ_j pre_j·h_j: [T, 1, n]·[T, n, D] → [T, D]; one row per product, so T does not touch its bits."""
    return body.reshape(body.op("MatMul", body.unsqueeze(pre, 1), "h"), 0, hidden)


def _sums(n: int, over_rows: bool) -> Matrix:
    """S [n², n²]: (c·S)[j,k] = Σ_j' c[j',k] (columns) or Σ_k' c[j,k'] (rows), for c flattened row-major."""
    ones, eye = np.ones((n, n), np.float32), np.eye(n, dtype=np.float32)
    return np.kron(eye, ones) if over_rows else np.kron(ones, eye)


def sinkhorn(body: Body, logits: str, n: int, iterations: int, eps: float) -> str:
    """logits [T, n·n] row-major → doubly normalised [T, n·n]: softmax rows + eps, columns, then rows and columns."""
    flat = body.op("Softmax", body.reshape(logits, 0, n, n), axis=-1)
    comb = body.op("Add", body.reshape(flat, 0, n * n), body.f32(eps))
    for step in range(2 * iterations - 1):
        sums = body.op("Gemm", comb, body.const(_sums(n, over_rows=step % 2 == 1)), body.f32(eps))
        comb = body.op("Div", comb, sums)
    return str(comb)


def hc_pre(n: int, hidden: int, iterations: int, hc_eps: float, norm_eps: float) -> OpFunction:
    """HcPre: h f32 [T, n, D], fn [2n + n², n·D], base [2n + n²], scale [3] → x [T, D], post [T, n], comb [T, n, n]."""

    def build(body: Body) -> list[str]:
        spread = np.repeat(np.arange(3), (n, n, n * n))
        scale = body.op("Gather", "scale", body.const(spread, np.int64), axis=0)
        mixes = body.op("Add", body.op("Mul", _mixes(body, n, hidden, norm_eps), scale), "base")
        pre, post, comb = body.split(mixes, (n, n, n * n))
        pre = body.op("Add", body.op("Sigmoid", pre), body.f32(hc_eps))
        post = body.op("Mul", body.op("Sigmoid", post), body.f32(2))
        comb = body.reshape(sinkhorn(body, comb, n, iterations, hc_eps), 0, n, n)
        return [_merge(body, pre, n, hidden), post, comb]

    attrs = {"iterations": iterations, "hc_eps": hc_eps, "norm_eps": norm_eps}
    return function("HcPre", f"n{n}d{hidden}", ["h", "fn", "base", "scale"], attrs, build, ["x", "post", "comb"])


def hc_post(n: int, hidden: int) -> OpFunction:
    """HcPost: y [T, D], h [T, n, D], post [T, n], comb [T, n, n] → h'_k = post_k·y + Σ_j comb[j,k]·h_j."""

    def build(body: Body) -> list[str]:
        mixed = body.op("MatMul", body.op("Transpose", "comb", perm=[0, 2, 1]), "h")
        added = body.op("Mul", body.unsqueeze("post", 2), body.unsqueeze("y", 1))
        return [body.op("Add", added, mixed)]

    return function("HcPost", f"n{n}d{hidden}", ["y", "h", "post", "comb"], {}, build, ["out"])


def hc_head(n: int, hidden: int, hc_eps: float, norm_eps: float) -> OpFunction:
    """HcHead: h [T, n, D], fn [n, n·D], base [n], scale [1] → x [T, D]; like HcPre without post and Sinkhorn."""

    def build(body: Body) -> list[str]:
        mixes = body.op("Add", body.op("Mul", _mixes(body, n, hidden, norm_eps), "scale"), "base")
        return [_merge(body, body.op("Add", body.op("Sigmoid", mixes), body.f32(hc_eps)), n, hidden)]

    attrs = {"hc_eps": hc_eps, "norm_eps": norm_eps}
    return function("HcHead", f"n{n}d{hidden}", ["h", "fn", "base", "scale"], attrs, build, ["x"])
