"""The key/value cache of the Flax modules: written in place, and read where it lies."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash2 import _checks
from jax_flash2._attention import attention
from jax_flash2._decode import decode_attention

STEP_TOKENS = 16  # up to here a call is a step of decoding, beyond it a prefill


class Cache(NamedTuple):
    """The keys and values of earlier tokens, and how many tokens each sequence has had.

    Position p lies in slot p. A layer with a window of `left` tokens needs no more than left + 1
    slots, what its newest token sees: a ring, where position p lies in slot p % (left + 1).
    """

    key: jax.Array  # [*B, slots, K, H]
    value: jax.Array  # [*B, slots, K, H]
    lengths: jax.Array  # int32 [*B]


def slots(max_length, window) -> int:
    """How many a cache for sequences of `max_length` has; `window` is None or (left, right)."""
    return max_length if window is None else min(max_length, window[0] + 1)


def attend(query, key, value, cache: Cache, new_lengths, window, precision):
    """(output [*B, T, N, H], cache) of T new tokens, of which the first `new_lengths` [*B] count.

    Each sees the tokens before it and itself, within the window. The rest is padding: output 0,
    and nothing in the cache. So are tokens that no slot is left for; a ring has one always.
    """
    *batch, tokens, _, _ = key.shape
    ring = window is not None and cache.key.shape[-3] == window[0] + 1
    new_lengths = _checks.lengths("query_seq_lengths", new_lengths, tuple(batch))
    _check(query, key, cache, new_lengths, ring)
    count = jnp.full_like(cache.lengths, tokens) if new_lengths is None else new_lengths

    def with_one_batch_axis(x):
        return x.reshape(math.prod(batch), *x.shape[len(batch) :])

    query, key, value, count, *old = map(with_one_batch_axis, (query, key, value, count, *cache))
    append = _append_to_ring if ring else _append
    out, new = append(query, key, value, jnp.clip(count, 0, tokens), Cache(*old), window, precision)
    cache = Cache(*(x.reshape(like.shape) for x, like in zip(new, cache, strict=True)))
    return out.reshape(*batch, *out.shape[1:]), cache


def _append(query, key, value, count, cache, window, precision):
    room = cache.key.shape[1] - cache.lengths
    count = jnp.minimum(count, jnp.maximum(room, 0))
    new = _write(cache, key, value, count)
    return _read(query, new.key, new.value, cache.lengths, count, window, precision), new


def _append_to_ring(query, key, value, count, cache, window, precision):
    new = _write(cache, key, value, count)
    left = window[0]
    if key.shape[1] == 1:  # sees every slot, and softmax does not ask for their order
        before = jnp.minimum(cache.lengths, left)
        return _read(query, new.key, new.value, before, count, None, precision), new
    before, keys = _in_order(cache.key, key, cache.lengths, left)
    _, values = _in_order(cache.value, value, cache.lengths, left)
    return _read(query, keys, values, before, count, window, precision), new


def _write(cache, key, value, count):
    """The cache with the first `count` [B] new tokens; for a ring, the last of them that fit."""
    size, token, count = cache.key.shape[1], jnp.arange(key.shape[1]), count[:, None]
    stored = (count - size <= token) & (token < count)
    position = cache.lengths[:, None] + token
    # Slots past the end are dropped. They differ, for XLA is told that no two are the same.
    slot = jnp.where(stored, position % size, size + token)

    @jax.vmap
    def write(old, new, slot):
        return old.at[slot].set(new, mode="drop", unique_indices=True)

    lengths = cache.lengths + count[:, 0]
    return Cache(write(cache.key, key, slot), write(cache.value, value, slot), lengths)


def _read(query, key, value, before, count, window, precision):
    """The output of `count` [B] new tokens, whose keys follow the first `before` [B]."""
    tokens = query.shape[1]
    lengths = jnp.where(count > 0, before + count, 0)
    if tokens > STEP_TOKENS:
        return attention(
            query,
            key,
            value,
            is_causal=True,
            query_offset=before,
            query_seq_lengths=count,
            key_value_seq_lengths=lengths,
            local_window_size=window,
            precision=precision,
        )
    if tokens == 1:
        return decode_attention(query, key, value, lengths, local_window_size=window)
    # decode_attention has the newest token last, and padding stands behind it here.
    roll = jax.vmap(functools.partial(jnp.roll, axis=0))
    query = roll(query, tokens - count)
    out = decode_attention(query, key, value, lengths, local_window_size=window)
    counts = jnp.arange(tokens) < count[:, None]
    return jnp.where(counts[..., None, None], roll(out, count - tokens), 0)


def _in_order(ring, new, lengths, left):
    """How many of the last `left` tokens there are, [B]; those and the new ones, [B, left + T, ...]
    from index 0 on."""
    before = jnp.minimum(lengths, left)
    place = jnp.arange(left + new.shape[1])
    from_ring = (lengths - before)[:, None] + place
    from_new = jnp.minimum(place - before[:, None], new.shape[1] - 1)
    size = ring.shape[1]
    source = jnp.where(place < before[:, None], from_ring % size, size + from_new)
    take = jax.vmap(functools.partial(jnp.take, axis=0))
    return before, take(jnp.concatenate([ring, new], axis=1), source)


def _check(query, key, cache, new_lengths, ring):
    *batch, tokens, kv_heads, head_dim = key.shape
    size = cache.key.shape[-3]
    if query.shape[-3] != tokens:
        raise _checks.wrong(
            ValueError,
            "inputs_k in decode",
            f"of inputs_q's tokens, {query.shape[-3]}",
            tokens,
            "Cross attention to a sequence that does not grow needs no cache.",
        )
    expected = (*batch, size, kv_heads, head_dim)
    if cache.key.shape != expected:
        raise _checks.wrong(ValueError, "the cache", f"{list(expected)}", list(cache.key.shape))
    if cache.key.dtype != key.dtype:
        raise _checks.wrong(
            TypeError,
            "the cache's dtype",
            f"that of the keys, {key.dtype.name}",
            cache.key.dtype.name,
            "Give it where the cache is made.",
        )
    if ring:
        return
    way_out = "Make the cache for longer sequences."
    if new_lengths is None and tokens > size:
        raise _checks.wrong(
            ValueError, "the new tokens", f"at most the cache's {size}", tokens, way_out
        )
    counts = (cache.lengths, tokens if new_lengths is None else new_lengths)
    if not all(_is_known(x) for x in counts):
        return  # documented: what does not fit is padding
    longest = int(np.max(np.add(*map(np.asarray, counts)), initial=0))
    if longest > size:
        raise _checks.wrong(
            ValueError, "cached and new tokens together", f"at most {size}", longest, way_out
        )


def _is_known(x):
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
