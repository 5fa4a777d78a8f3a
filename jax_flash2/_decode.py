"""`decode_attention`: a few new tokens against a cache of keys and values, forward only."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_flash2 import _checks, _ffi, _partition, _partition_decode, _reference
from jax_flash2._spec import DecodeSpec, fold_scale, make_decode_spec

_CACHES = ("key_cache", "value_cache")


@_checks.speaks_as("decode_attention")
def decode_attention(
    query: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike,
    lengths: ArrayLike,
    *,
    scale: float | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    page_table: ArrayLike | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    r"""Attention of the last T tokens of every sequence over a cache that holds all of them.

    The same numbers as

        attention(query, key_cache, value_cache, is_causal=True, query_offset=lengths - T,
                  key_value_seq_lengths=lengths)

    at the speed at which the caches can be read: the keys of a sequence are shared out among as
    many workers as there are, whatever the lengths of the sequences, and the query heads of a
    group share one read of their keys and values. Write the keys and values of the new tokens
    into the caches first; then query i stands at position lengths - T + i and sees the keys up to
    its own position. A query at a negative position sees nothing: output 0, log-sum-exp -inf.
    What lies at or past a sequence's length may hold anything, NaN too, and is not read.

    Letters as in `attention`: *B any number of batch axes, none too; T query length, at its best
    from 1 to the few tokens of a speculative block; S what a sequence has room for; N query heads
    and K key/value heads, query head n reading key/value head n // (N // K).

    Args:
      query: [*B, T, N, H], float16, bfloat16 or float32; float64 on the CPU. H at most 256.
      key_cache: [*B, S, K, H] of query's dtype; with a page_table [pages, page size, K, H].
      value_cache: [*B, S, K, Hv] of query's dtype; with a page_table [pages, page size, K, Hv].
        Head dims that are no multiple of 8 cost a padded copy of the caches.
      lengths: int32 [*B], traced or not: each sequence's tokens in the caches, the new ones
        included. Taken as 0 below 0, and as S above S.
      scale: a Python number that multiplies the logits; None is 1 / sqrt(H).
      local_window_size: (left, right), or an int w for (w, w): query at position p sees key j only
        if p - left <= j. What lies to the right is hidden anyway. Keys outside every window are
        not read.
      page_table: int32 [*B, P], traced or not: key j of a sequence stands in page
        page_table[..., j // page size], at j % page size, so that S is P * page size. The page
        size is a multiple of 16. Sequences may share pages. An id that is no page's, below 0 or
        not below the number of pages, is allowed: its keys are hidden and nothing is read.
      implementation: None is the best kernel that the platform has; "xla" the plain definition in
        jax.numpy, which reads all S keys, for comparison.
      return_residual: returns (output, LSE) instead of output.

    Returns:
      The output, [*B, T, N, Hv] in query's dtype; with return_residual also the natural
      log-sum-exp of the logits, [*B, T, N] in float32 (float64 for float64 inputs). Float32 is
      computed as float32 on every platform.

    Raises:
      ValueError: the shapes or values are wrong.
      TypeError: a dtype or a Python type is wrong.
      NotImplementedError: the call is right, and there is no kernel for it; or its derivative is
        asked for.

    Source: "Flash-Decoding for long-context inference", https://crfm.stanford.edu/2023/10/12/
    flashdecoding.html; pages: Kwon et al., "Efficient Memory Management for Large Language Model
    Serving with PagedAttention", https://arxiv.org/abs/2309.06180.
    """
    query, key_cache, value_cache = map(jnp.asarray, (query, key_cache, value_cache))
    arrays = query, key_cache, value_cache
    if page_table is None:
        _checks.arrays(*arrays, _CACHES)
    else:
        page_table = _checks.paged_arrays(*arrays, page_table, _CACHES)
    lengths = _checks.required_lengths("lengths", lengths, query.shape[:-3])
    scale = _checks.scale(scale, default=1 / math.sqrt(query.shape[-1]))
    window = _checks.window(local_window_size)
    _checks.choice("implementation", implementation, (None, "xla"))
    return_residual = _checks.flag("return_residual", return_residual)

    if implementation == "xla":
        out, lse = _reference.decode_attention(
            *arrays,
            lengths,
            scale=scale,
            local_window_size=window,
            page_table=page_table,
            precision="highest",
        )
    else:
        _checks.limits(*arrays, _ffi.MAX_HEAD_DIM, _CACHES, page_table)
        factor, scale = fold_scale(scale)
        spec = make_decode_spec(scale=scale, window=window)
        call = _partition.in_auto_axes(functools.partial(_padded, spec), query)
        query = query if factor == 1 else query * factor
        out, lse = call(query, key_cache, value_cache, lengths, page_table)
    return (out, lse) if return_residual else out


# Under jit an eager call too is one compiled program.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _padded(spec: DecodeSpec, query, key_cache, value_cache, lengths, page_table):
    """(output [*B, T, N, Hv], LSE [*B, T, N]) for any head dims."""
    padded = map(_ffi.pad_head_dim, (query, key_cache, value_cache))
    out, lse = _decode(spec, *_partition.vary_alike(*padded, lengths, page_table))
    return out[..., : value_cache.shape[-1]], jnp.swapaxes(lse, -1, -2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _decode(spec: DecodeSpec, query, key_cache, value_cache, lengths, page_table):
    """(output [*B, T, N, Hv], LSE [*B, N, T])."""
    return _partition_decode.decode(query, key_cache, value_cache, lengths, page_table, spec)


@_decode.defjvp
def _no_derivative(spec, primals, tangents):
    raise NotImplementedError(
        "jax_flash2.decode_attention: it has no derivative. Train with jax_flash2.attention, or "
        'use implementation="xla".'
    )
