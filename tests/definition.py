"""Attention and its gradient written out over whole matrices, in numpy.

With EXACT it is the truth, in float64. With any other format it is the naive computation that a
kernel is held against: the same formulas, each intermediate rounded to the format.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Format:
    """How numbers are kept in memory, and how many bits of them a matrix product sees."""

    name: str
    dtype: str
    precision: str | None = None
    operand_bits: int | None = None  # None: all

    def __str__(self):
        return self.name

    @property
    def work(self):
        return np.float64 if self.dtype == "float64" else np.float32

    def stored(self, x):
        return x.astype(jnp.dtype(self.dtype)).astype(self.work)

    def operand(self, x):
        if self.operand_bits is None:
            return x
        mantissa, exponent = np.frexp(x)
        unit = 2.0**self.operand_bits
        return np.ldexp(np.round(mantissa * unit) / unit, exponent).astype(self.work)


EXACT = Format("exact", "float64")


def mask_of(case):
    """bool [*B, T, S], True where query i sees key j."""
    i, j = np.arange(case.t)[:, None], np.arange(case.s)

    def over_batch(x):
        return np.reshape(x, case.batch)[..., None, None]

    offset = case.query_offset or 0
    distance = j - i - (over_batch(offset) if isinstance(offset, tuple) else offset)
    mask = np.ones((*case.batch, case.t, case.s), bool)
    if case.is_causal:
        mask &= distance <= 0
    if case.local_window_size is not None:
        left, right = np.broadcast_to(case.local_window_size, 2)
        mask &= (-left <= distance) & (distance <= right)
    if case.query_seq_lengths is not None:
        mask &= i < over_batch(case.query_seq_lengths)
    if case.key_value_seq_lengths is not None:
        mask &= j < over_batch(case.key_value_seq_lengths)
    return mask


def attention(q, k, v, dout=None, dlse=None, *, mask, scale, fmt=EXACT):
    """{"out", "lse"} of inputs in the public layout, and of cotangents {"dq", "dk", "dv"} too; lse
    is [*B, T, N]."""
    group = q.shape[-2] // k.shape[-2]
    stored = fmt.stored

    def product(a, b):
        return fmt.operand(a) @ fmt.operand(b)

    def transpose(x):
        return np.swapaxes(x, -1, -2)

    def heads_first(x, seen, repeats=1):  # [*B, L, heads, D] -> [*B, N, L, D], unseen tokens 0
        x = np.where(seen[..., None, None], x, 0).astype(fmt.work)
        return np.repeat(np.swapaxes(x, -2, -3), repeats, axis=-3)

    def heads_last(x, repeats=1):  # and back, summed over the heads of a group
        x = x.reshape(*x.shape[:-3], x.shape[-3] // repeats, repeats, *x.shape[-2:]).sum(-3)
        return stored(np.swapaxes(x, -2, -3))

    rows, keys = mask.any(-1), mask.any(-2)
    q = heads_first(q, rows)
    k, v = heads_first(k, keys, group), heads_first(v, keys, group)
    if dout is not None:
        dout, dlse = heads_first(dout, rows), heads_first(dlse[..., None], rows)
    mask, rows = mask[..., None, :, :], rows[..., None, :, None]

    s = fmt.work(scale) * product(q, transpose(k))
    row_max = np.where(mask, s, -np.inf).max(-1, initial=-np.inf, keepdims=True)
    row_max = np.where(rows, row_max, 0)

    def softmax(s):
        p = np.where(mask, np.exp(np.where(mask, s, 0) - row_max), 0)
        row_sum = np.where(rows, p.sum(-1, keepdims=True), 1)
        return p / row_sum, row_sum

    lse = np.where(rows, row_max + np.log(softmax(s)[1]), -np.inf)
    p = stored(softmax(stored(s))[0])
    out = stored(product(p, v))
    results = {"out": heads_last(out), "lse": np.swapaxes(lse[..., 0], -1, -2)}
    if dout is None:
        return results
    d = (dout * out).sum(-1, keepdims=True) - dlse
    dp = stored(product(dout, transpose(v)))
    ds = stored(p * (dp - d))
    return results | {
        "dq": heads_last(fmt.work(scale) * product(ds, k)),
        "dk": heads_last(fmt.work(scale) * product(transpose(ds), q), group),
        "dv": heads_last(product(transpose(p), dout), group),
    }
