"""`attention`: defaults, checks, the spec, and the call in any head dim and placement."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_flash2 import _checks, _derivative, _ffi, _partition, _reference
from jax_flash2._spec import BACKWARD_MODES, FAMILIES, AttentionSpec, fold_scale, make_spec


def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_offset: int | ArrayLike | None = None,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    precision: str | jax.lax.Precision | None = None,
    backward: str = "auto",
    implementation: str | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    r"""Exact attention in memory linear in T + S, by FlashAttention-2.

    For each batch element and query head n, which reads key/value head n // (N // K),

        O = softmax(scale * Q K^T + M) V,    LSE = log(rowsum(exp(scale * Q K^T + M))),

    with M 0 where a query sees a key and -inf elsewhere. Masks combine by AND. A query that
    sees no key gives O = 0, LSE = -inf and gradients of 0. Tokens that every query has masked
    (padding among them) may hold anything, NaN too.

    The arguments that `jax.nn.dot_product_attention` has too mean the same there. Letters: *B
    any number of batch axes, none too; T, S the lengths of query and key; N, K the heads of
    query and key.

    Args:
      query: [*B, T, N, H], float16, bfloat16 or float32; float64 on the CPU. H at most 256.
      key: [*B, S, K, H] of query's dtype, with N a multiple of K.
      value: [*B, S, K, Hv] of query's dtype, Hv at most 256.
      scale: a Python number; None is 1 / sqrt(H).
      is_causal: query i sees key j only if j <= i + query_offset.
      query_offset: the position of query 0 among the keys. None is 0, as in jax.nn; S - T
        aligns the last query with the last key, as FlashAttention does. An int, or an int32
        array, traced or not, that is a scalar or [*B].
      query_seq_lengths: int32 [*B]; queries at or past the length are padding.
      key_value_seq_lengths: int32 [*B]; keys at or past the length are padding.
      local_window_size: (left, right), or an int w for (w, w): query i sees key j only if
        i + query_offset - left <= j <= i + query_offset + right. With is_causal, right is 0.
      precision: how products of float32 inputs are taken: None, "default", "high", "highest" or
        a jax.lax.Precision. None is jax.default_matmul_precision's, as elsewhere in JAX.
        Without effect on other dtypes, and on the CPU, where float32 is float32.
      backward: "fused" takes five matrix products, and on a GPU adds dQ by atomics, so that its
        last bits may differ between runs; "deterministic" takes five, in a fixed order; "split"
        takes seven, in no more memory than the gradients. "auto" is the fastest for the call.
        On Hopper a faster one that repeats as well may serve for it: see `which_kernels`.
      implementation: None is the best kernel that the platform has; "cuda_sm80" the CUDA kernels
        that every GPU since Ampere runs, where the GPU has faster ones too; "xla" the plain
        definition in jax.numpy, with O(T * S) memory. The last two are for comparison.
      return_residual: returns (output, LSE) instead of output.

    Returns:
      The output, [*B, T, N, Hv] in query's dtype; with return_residual also the natural
      log-sum-exp of the logits, [*B, T, N] in float32 (float64 for float64 inputs). Both are
      differentiable. Gradients are the kernels'; forward mode (`jax.jvp`) and derivatives of
      derivatives are the plain definition's, in O(T * S) memory.

    Raises:
      ValueError: the shapes or values are wrong.
      TypeError: a dtype or a Python type is wrong.
      NotImplementedError: the call is right, and there is no kernel for it.

    Source: Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691: the forward and causal
    masks in section 3.1.1, the backward and grouped heads in 3.1.2.
    """
    query, key, value = map(jnp.asarray, (query, key, value))
    return_residual = _checks.flag("return_residual", return_residual)
    arguments = checked(
        query,
        key,
        value,
        scale=scale,
        is_causal=is_causal,
        query_offset=query_offset,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        precision=precision,
        backward=backward,
        implementation=implementation,
    )
    if implementation == "xla":
        out, lse = _reference.attention(query, key, value, **arguments)
    else:
        spec, factor, operands = kernel_call(query, backward, implementation, **arguments)
        call = _partition.in_auto_axes(functools.partial(_padded_attention, spec), query)
        out, lse = call(query if factor == 1 else query * factor, key, value, *operands)
    return (out, lse) if return_residual else out


def checked(
    query,
    key,
    value,
    *,
    scale,
    is_causal,
    query_offset,
    query_seq_lengths,
    key_value_seq_lengths,
    local_window_size,
    precision,
    backward,
    implementation,
) -> dict:
    """The scale, the masks and the precision of `attention`, checked, with defaults filled in."""
    _checks.arrays(query, key, value)
    _checks.choice("backward", backward, ("auto", *BACKWARD_MODES))
    _checks.choice("implementation", implementation, (None, *FAMILIES, "xla"))
    if implementation != "xla":
        _checks.limits(query, key, value, _ffi.MAX_HEAD_DIM)
    batch = query.shape[:-3]
    return {
        "scale": _checks.scale(scale, default=1 / math.sqrt(query.shape[-1])),
        "is_causal": _checks.flag("is_causal", is_causal),
        "query_offset": _checks.query_offset(query_offset, batch),
        "query_seq_lengths": _checks.lengths("query_seq_lengths", query_seq_lengths, batch),
        "key_value_seq_lengths": _checks.lengths(
            "key_value_seq_lengths", key_value_seq_lengths, batch
        ),
        "local_window_size": _checks.window(local_window_size),
        "precision": _checks.precision(precision),
    }


def kernel_call(
    query,
    backward,
    implementation,
    *,
    scale,
    is_causal,
    query_offset,
    query_seq_lengths,
    key_value_seq_lengths,
    local_window_size,
    precision,
):
    """(spec, factor of the query, traced operands) of a checked call."""
    is_static = isinstance(query_offset, int)
    factor, scale = fold_scale(scale)
    spec = make_spec(
        scale=scale,
        is_causal=is_causal,
        window=local_window_size,
        offset=query_offset if is_static else 0,
        precision=precision,
        backward=backward,
        dtype=query.dtype,
        implementation=implementation,
    )
    traced_offset = None if is_static else query_offset
    return spec, factor, (traced_offset, query_seq_lengths, key_value_seq_lengths)


def _bounds(query, key, *columns):
    """int32 [*B, 3]: query offset, query length and key length; None if none of them is traced."""
    if all(x is None for x in columns):
        return None
    defaults = (0, query.shape[-3], key.shape[-3])
    columns = [
        jnp.full(query.shape[:-3], default, jnp.int32) if x is None else x
        for x, default in zip(columns, defaults, strict=True)
    ]
    return jnp.stack(columns, axis=-1)


# Under jit an eager call too is one compiled program. Inlined, so that the names stay in sight of
# jax.checkpoint.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _padded_attention(spec: AttentionSpec, query, key, value, *columns):
    """(output [*B, T, N, Hv], LSE [*B, T, N]) for any head dims; columns as in _bounds."""
    bounds = _bounds(query, key, *columns)
    padded = map(_ffi.pad_head_dim, (query, key, value))
    out, lse = _derivative.attention(spec, *_partition.vary_alike(*padded, bounds))
    return out[..., : value.shape[-1]], jnp.swapaxes(lse, -1, -2)
