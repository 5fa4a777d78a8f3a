"""Attention by its definition, in jax.numpy: O(T * S) memory, differentiated by JAX.

This is `implementation="xla"` and the yardstick of `python -m jax_flash2`. It shares no code with
the kernels or with what feeds them, or a shared mistake would pass.
"""

import jax.numpy as jnp
from jax import lax


def attention(query, key, value, *, scale, precision=None, **masks):
    """The output [*B, T, N, Hv] and the log-sum-exp [*B, T, N].

    Computes in float32, or float64 for float64 inputs. Masks are those of `_mask`.
    """
    return _attend(query, key, value, _mask(query, key, **masks), scale, precision)


def decode_attention(
    query, key, value, lengths, *, scale, local_window_size=None, page_table=None, precision=None
):
    """The same of the last T of `lengths` [*B] tokens, which are clamped to [0, S].

    With a page table [*B, P], key is [pages, page size, K, H] and value as long, and S is P times
    the page size.
    """
    is_there = True
    if page_table is not None:
        pages, page_size = key.shape[:2]
        found = (page_table >= 0) & (page_table < pages)
        page_table = jnp.where(found, page_table, pages)  # one page more, of zeros
        key, value = (
            jnp.pad(x, [(0, 1), (0, 0), (0, 0), (0, 0)])[page_table].reshape(
                *page_table.shape[:-1], -1, *x.shape[-2:]
            )
            for x in (key, value)
        )
        is_there = jnp.repeat(found, page_size, axis=-1)[..., None, :]
    lengths = jnp.clip(lengths, 0, key.shape[-3])
    mask = _mask(
        query,
        key,
        is_causal=True,
        query_offset=lengths - query.shape[-3],
        key_value_seq_lengths=lengths,
        local_window_size=local_window_size,
    )
    return _attend(query, key, value, mask & is_there, scale, precision)


def _attend(query, key, value, mask, scale, precision):
    """Output and log-sum-exp under a mask, bool [*B, T, S]."""
    _, _, v, logits = _logits(query, key, value, mask, scale, precision)
    row_max = lax.stop_gradient(logits.max(-1, initial=-jnp.inf, keepdims=True))
    row_max = jnp.where(row_max == -jnp.inf, 0, row_max)
    weights = jnp.exp(logits - row_max)
    row_sum = weights.sum(-1, keepdims=True)
    some = mask.any(-1)[..., None, None, None]
    row_sum = jnp.where(some, row_sum, 1)
    out = jnp.einsum("...tkgs,...skh->...tkgh", weights / row_sum, v, precision=precision)
    out = jnp.where(some, out, 0)
    lse = jnp.where(some, row_max + jnp.log(row_sum), -jnp.inf)
    rows = query.shape[:-1]
    return out.reshape(*rows, value.shape[-1]).astype(query.dtype), lse.reshape(rows)


def gradients(query, key, value, out, lse, dout, dlse, *, scale, precision=None, **masks):
    """(dquery, dkey, dvalue) from `attention`'s results and their cotangents.

    The results may be those of more keys than these: then the shares of these keys.
    """
    mask = _mask(query, key, **masks)
    q, k, v, logits = _logits(query, key, value, mask, scale, precision)
    some = mask.any(-1)

    def of_rows(x, *tail):
        x = jnp.where(some.reshape(*some.shape, *[1] * (x.ndim - some.ndim)), x, 0)
        return x.astype(q.dtype).reshape(*q.shape[:-1], *tail)

    out, dout = (of_rows(x, value.shape[-1]) for x in (out, dout))
    weights = jnp.exp(logits - of_rows(lse, 1))
    delta = (dout * out).sum(-1, keepdims=True) - of_rows(dlse, 1)

    def product(subscripts, a, b):
        return jnp.einsum(subscripts, a, b, precision=precision)

    dlogits = weights * (product("...tkgh,...skh->...tkgs", dout, v) - delta)
    dq = scale * product("...tkgs,...skh->...tkgh", dlogits, k)
    dk = scale * product("...tkgs,...tkgh->...skh", dlogits, q)
    dv = product("...tkgs,...tkgh->...skh", weights, dout)
    return (
        dq.reshape(query.shape).astype(query.dtype),
        dk.astype(key.dtype),
        dv.astype(value.dtype),
    )


def _logits(query, key, value, mask, scale, precision):
    """Wide q [*B, T, K, N // K, H], k and v, and the logits [*B, T, K, N // K, S]."""
    # 0 * NaN is NaN: what no row sees, and rows that see nothing, must not enter a product, neither
    # here nor in the gradient.
    some_key, some_query = mask.any(-1), mask.any(-2)
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    q = jnp.where(some_key[..., None, None], query, 0).astype(dtype)
    k = jnp.where(some_query[..., None, None], key, 0).astype(dtype)
    v = jnp.where(some_query[..., None, None], value, 0).astype(dtype)
    kv_heads = key.shape[-2]
    q = q.reshape(*q.shape[:-2], kv_heads, q.shape[-2] // kv_heads, q.shape[-1])
    logits = scale * jnp.einsum("...tkgh,...skh->...tkgs", q, k, precision=precision)
    return q, k, v, jnp.where(mask[..., :, None, None, :], logits, -jnp.inf)


def _mask(
    query,
    key,
    *,
    is_causal=False,
    query_offset=0,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
):
    """bool [*B, T, S], True where query i sees key j.

    `query_offset` is an int or an int array [*B], `local_window_size` None or (left, right).
    """
    *batch, t, _, _ = query.shape
    s = key.shape[-3]
    i, j = jnp.arange(t)[:, None], jnp.arange(s)[None, :]
    position = i + jnp.asarray(query_offset)[..., None, None]
    mask = jnp.ones((*batch, t, s), bool)
    if is_causal:
        mask &= j <= position
    if local_window_size is not None:
        left, right = local_window_size
        mask &= (position - left <= j) & (j <= position + right)
    if query_seq_lengths is not None:
        mask &= i < query_seq_lengths[..., None, None]
    if key_value_seq_lengths is not None:
        mask &= j < key_value_seq_lengths[..., None, None]
    return mask
