"""Attention by its definition, in jax.numpy: O(T * S) memory, differentiated by JAX.

This is `implementation="xla"` and the yardstick of `python -m jax_flash2`. It shares no code with
the kernels or with what feeds them, or a shared mistake would pass.
"""

import jax.numpy as jnp
from jax import lax


def attention(
    query,
    key,
    value,
    *,
    scale,
    is_causal=False,
    query_offset=0,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    precision=None,
):
    """The output [*B, T, N, Hv] and the log-sum-exp [*B, T, N].

    `query_offset` is an int or an int array [*B], `local_window_size` None or (left, right).
    Computes in float32, or float64 for float64 inputs.
    """
    *batch, t, n, _ = query.shape
    s, kv_heads = key.shape[-3:-1]
    mask = _mask(
        batch,
        t,
        s,
        is_causal,
        query_offset,
        query_seq_lengths,
        key_value_seq_lengths,
        local_window_size,
    )
    # 0 * NaN is NaN: what no row sees, and rows that see nothing, must not enter a product, neither
    # here nor in the gradient.
    some_key, some_query = mask.any(-1), mask.any(-2)
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    q = jnp.where(some_key[..., None, None], query, 0).astype(dtype)
    k = jnp.where(some_query[..., None, None], key, 0).astype(dtype)
    v = jnp.where(some_query[..., None, None], value, 0).astype(dtype)

    q = q.reshape(*batch, t, kv_heads, n // kv_heads, q.shape[-1])
    logits = scale * jnp.einsum("...tkgh,...skh->...tkgs", q, k, precision=precision)
    logits = jnp.where(mask[..., :, None, None, :], logits, -jnp.inf)
    row_max = lax.stop_gradient(logits.max(-1, initial=-jnp.inf, keepdims=True))
    row_max = jnp.where(row_max == -jnp.inf, 0, row_max)
    weights = jnp.exp(logits - row_max)
    row_sum = weights.sum(-1, keepdims=True)
    some = some_key[..., None, None, None]
    row_sum = jnp.where(some, row_sum, 1)
    out = jnp.einsum("...tkgs,...skh->...tkgh", weights / row_sum, v, precision=precision)
    out = jnp.where(some, out, 0)
    lse = jnp.where(some, row_max + jnp.log(row_sum), -jnp.inf)
    return (
        out.reshape(*batch, t, n, value.shape[-1]).astype(query.dtype),
        lse.reshape(*batch, t, n),
    )


def _mask(batch, t, s, is_causal, offset, query_lengths, kv_lengths, window):
    """bool [*B, T, S], True where query i sees key j."""
    i, j = jnp.arange(t)[:, None], jnp.arange(s)[None, :]
    position = i + jnp.asarray(offset)[..., None, None]
    mask = jnp.ones((*batch, t, s), bool)
    if is_causal:
        mask &= j <= position
    if window is not None:
        left, right = window
        mask &= (position - left <= j) & (j <= position + right)
    if query_lengths is not None:
        mask &= i < query_lengths[..., None, None]
    if kv_lengths is not None:
        mask &= j < kv_lengths[..., None, None]
    return mask
