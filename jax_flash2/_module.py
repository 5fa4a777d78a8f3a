"""What the Flax modules share and Flax has no part in: sizes, refusals, rotary positions."""

import jax.numpy as jnp

from jax_flash2 import _cache, _checks


def sizes(num_heads, num_kv_heads, head_dim, qkv_features, in_features, rope_theta):
    """(num_kv_heads, head_dim), by Flax's defaults where they are None."""
    if num_kv_heads is None:
        num_kv_heads = num_heads
    for name, size in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if size < 1:
            raise _checks.wrong(ValueError, name, "at least 1", size)
    if num_heads % num_kv_heads:
        raise _checks.wrong(
            ValueError, "num_kv_heads", f"a divisor of num_heads, {num_heads}", num_kv_heads
        )
    if head_dim is None:
        features = in_features if qkv_features is None else qkv_features
        if features % num_heads:
            raise _checks.wrong(
                ValueError,
                "qkv_features",
                f"a multiple of num_heads, {num_heads}",
                features,
                "Or give head_dim.",
            )
        head_dim = features // num_heads
    if qkv_features not in (None, num_heads * head_dim):
        raise _checks.wrong(
            ValueError,
            "qkv_features",
            f"num_heads * head_dim, {num_heads} * {head_dim}",
            qkv_features,
            "Leave one of qkv_features and head_dim out.",
        )
    if rope_theta is not None and head_dim % 2:
        raise _checks.wrong(ValueError, "head_dim", "even for rope_theta", head_dim)
    return num_kv_heads, head_dim


def refuse(*, mask=None, bias=None, weights=False, dropout=None, **einsums):
    """Raises for what Flax's attention does and no kernel here can, rather than leave it out."""
    not_dense = (
        "No kernel reads a dense one. What is_causal, local_window_size, query_seq_lengths and "
        "key_value_seq_lengths say needs none: GroupedQueryAttention takes them, and "
        "functools.partial(attention_fn, is_causal=True)."
    )
    whole = "The kernels never hold the attention weights."
    for name, x, expected, way_out in (
        ("mask", mask, None, not_dense),
        ("bias", bias, None, not_dense),
        ("sow_weights", weights, False, whole),
        ("dropout_rate", dropout, "0, or deterministic True", whole),
        *((name, x, None, whole) for name, x in einsums.items()),
    ):
        if x is not None and x is not False:
            raise _checks.wrong(NotImplementedError, name, expected, _checks.describe(x), way_out)


def no_cache(way_out):
    return _checks.wrong(ValueError, "the cache", "there for decode", None, way_out)


def keys_and_values(inputs_q, inputs_k, inputs_v):
    """What Flax does where they are left out."""
    if inputs_k is None and inputs_v is not None:
        raise _checks.wrong(ValueError, "inputs_k", "given where inputs_v is", None)
    inputs_k = inputs_q if inputs_k is None else inputs_k
    return inputs_k, inputs_k if inputs_v is None else inputs_v


def rotate_and_attend(
    query,
    key,
    value,
    cache: _cache.Cache | None = None,
    *,
    attend,
    is_causal,
    rope_theta,
    input_positions,
    query_seq_lengths,
    key_value_seq_lengths,
    local_window_size,
    precision,
    backward,
):
    """(output [*B, T, N, H], cache) from the projected and normalised heads."""
    if rope_theta is None and input_positions is not None:
        raise _checks.wrong(
            ValueError,
            "input_positions",
            "None without rope_theta",
            _checks.describe(input_positions),
            "They turn queries and keys, and mask nothing.",
        )
    if rope_theta is not None:
        pair = input_positions
        if not isinstance(pair, (tuple, list)):
            pair = (pair, pair)
        start = 0 if cache is None else cache.lengths[..., None]
        query, key = (
            rotate(x, _positions(given, x, start), rope_theta)
            for x, given in zip((query, key), pair, strict=True)
        )
    if cache is not None:
        if key_value_seq_lengths is not None:
            raise _checks.wrong(
                ValueError,
                "key_value_seq_lengths",
                "None in decode",
                _checks.describe(key_value_seq_lengths),
                "query_seq_lengths says how many of the tokens are new, and the cache the rest.",
            )
        window = _checks.window(local_window_size)
        return _cache.attend(query, key, value, cache, query_seq_lengths, window, precision)
    out = attend(
        query,
        key,
        value,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        precision=precision,
        backward=backward,
    )
    return out, None


def rotate(x, positions, theta):
    """x [*B, T, N, H], each pair of channels (c, c + H/2) turned by positions * theta^(-2c / H).

    Positions are [T] or [*B, T]. Angles and products are in float32, or float64 for float64.
    Source: Su et al., "RoFormer", https://arxiv.org/abs/2104.09864, section 3.2.2, with the pairs
    of GPT-NeoX, Llama and Flax's nnx.RoPE.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    half = x.shape[-1] // 2
    rates = theta ** (-jnp.arange(half, dtype=dtype) / half)
    angles = positions.astype(dtype)[..., None, None] * rates
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    low, high = jnp.split(x.astype(dtype), 2, axis=-1)
    turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return turned.astype(x.dtype)


def _positions(given, x, start):
    *batch, tokens, _, _ = x.shape
    if given is None:
        return start + jnp.arange(tokens)
    given = jnp.asarray(given)
    if given.shape not in ((tokens,), (*batch, tokens)):
        raise _checks.wrong(
            ValueError,
            "input_positions",
            f"[{tokens}] or {[*batch, tokens]}, or a pair: the queries' and the keys'",
            list(given.shape),
        )
    return given
