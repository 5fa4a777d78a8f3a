"""The cache against attention over whole sequences: what is stored where, and what is seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash2 import _cache, attention

N, K, H = 4, 2, 8
STEP = jax.jit(_cache.attend, static_argnums=(5, 6))  # window and precision
# Calls in a row: tokens of a call, and how many of them count in each of the two sequences.
CALLS = {
    "prefill": [(20, (20, 20))],
    "prefill and steps": [(20, (9, 9)), *[(1, (1, 1))] * 6, (4, (4, 4))],
    "steps alone": [(1, (1, 1))] * 12,
    "blocks of a few": [(4, (4, 4)), (4, (4, 4)), (4, (4, 4)), (4, (4, 4)), (1, (1, 1))],
    "ragged": [(20, (11, 3)), (1, (1, 1)), (1, (0, 1)), (4, (2, 0)), (4, (0, 4)), (4, (1, 2))],
    "nothing new": [(20, (0, 6)), (1, (0, 0)), (4, (0, 0)), (4, (2, 1))],
}
LINEAR = 24  # slots
WINDOWS = {"all": None, "wide": (30, 0), "window": (2, 0), "long window": (13, 0)}


def stream(seed, heads):
    values = np.random.default_rng(seed).standard_normal((2, LINEAR, heads, H))
    return values.astype(np.float32)


QUERIES, KEYS, VALUES = stream(0, N), stream(1, K), stream(2, K)


def empty(window, batch=(2,), max_length=LINEAR):
    """Slots that were never written hold NaN."""
    shape = (*batch, _cache.slots(max_length, window), K, H)
    return _cache.Cache(*[jnp.full(shape, jnp.nan)] * 2, jnp.zeros(batch, jnp.int32))


def new_tokens(lengths, tokens, count):
    """The next `count` tokens of each sequence, and NaN behind them."""
    out = []
    for source in (QUERIES, KEYS, VALUES):
        x = np.full((2, tokens, *source.shape[2:]), np.nan, np.float32)
        for b, (start, n) in enumerate(zip(lengths, count, strict=True)):
            x[b, :n] = source[b, start : start + n]
        out.append(x)
    return out


def stored(lengths, source, window):
    """What the slots hold: the position p in slot p, or in slot p % slots."""
    slots = _cache.slots(LINEAR, window)
    expected = np.full((2, slots, K, H), np.nan, np.float32)
    for b, n in enumerate(lengths):
        for position in range(max(0, n - slots), n):
            expected[b, position % slots] = source[b, position]
    return expected


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("calls", CALLS)
def test_calls_in_a_row(calls, window):
    window = WINDOWS[window]
    whole = attention(
        QUERIES, KEYS, VALUES, is_causal=True, local_window_size=window, implementation="xla"
    )
    cache, lengths = empty(window), np.zeros(2, int)
    for tokens, count in CALLS[calls]:
        new = new_tokens(lengths, tokens, count)
        out, cache = STEP(*new, cache, jnp.array(count), window, None)
        for b, (start, n) in enumerate(zip(lengths, count, strict=True)):
            np.testing.assert_allclose(out[b, :n], whole[b, start : start + n], 2e-5, 2e-5)
            assert not np.any(out[b, n:]), "padding"
        lengths += count
        np.testing.assert_array_equal(cache.lengths, lengths)
        np.testing.assert_array_equal(cache.key, stored(lengths, KEYS, window))
        np.testing.assert_array_equal(cache.value, stored(lengths, VALUES, window))


@pytest.mark.parametrize("batch", [(), (1, 2), (2, 1)])
def test_batch_axes(batch):
    def like(x):
        return jnp.asarray(x[:, :5] if batch else x[0, :5]).reshape(*batch, 5, *x.shape[2:])

    query, key, value = map(like, (QUERIES, KEYS, VALUES))
    out, cache = STEP(query, key, value, empty(None, batch), None, None, None)
    np.testing.assert_allclose(out, attention(query, key, value, is_causal=True), 2e-5, 2e-5)
    assert cache.lengths.shape == batch
    np.testing.assert_array_equal(cache.key[..., :5, :, :], key)


@pytest.mark.parametrize("tokens", [1, 4, 20])
def test_what_finds_no_slot_is_padding(tokens):
    """Traced: nothing outside is written, nor anything written before."""
    lengths = np.array([LINEAR - 2, LINEAR])
    key, value = stored(lengths, KEYS, None), stored(lengths, VALUES, None)
    full = _cache.Cache(key, value, jnp.array(lengths, jnp.int32))
    new = [stream(seed, heads)[:, :tokens] for seed, heads in ((3, N), (4, K), (5, K))]
    out, cache = STEP(*new, full, None, None, None)
    fit = min(tokens, 2)
    key[0, LINEAR - 2 :][:fit], value[0, LINEAR - 2 :][:fit] = new[1][0, :fit], new[2][0, :fit]
    np.testing.assert_array_equal(cache.key, key)
    np.testing.assert_array_equal(cache.value, value)
    np.testing.assert_array_equal(cache.lengths, [LINEAR - 2 + fit, LINEAR])
    seen = slice(0, LINEAR - 2 + fit)
    expected = attention(
        new[0][:1, :fit], key[:1, seen], value[:1, seen], is_causal=True, query_offset=LINEAR - 2
    )
    np.testing.assert_allclose(out[:1, :fit], expected, 2e-5, 2e-5)
    assert not np.any(out[0, fit:]) and not np.any(out[1])


def test_counts_beyond_the_tokens_are_held_to_them():
    new = [x[:, :4] for x in (QUERIES, KEYS, VALUES)]
    got = STEP(*new, empty(None), jnp.array([-3, 99]), None, None)
    expected = STEP(*new, empty(None), jnp.array([0, 4]), None, None)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def call(tokens=1, held=0, counts=None, window=None, query_tokens=None, **changes):
    query, key, value = (
        jnp.zeros((2, n, heads, H))
        for n, heads in ((query_tokens or tokens, N), (tokens, K), (tokens, K))
    )
    cache = empty(window, max_length=8)._replace(lengths=jnp.full(2, held, jnp.int32), **changes)
    return _cache.attend(query, key, value, cache, counts, window, None)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"tokens": 9}, ValueError, ["new tokens", "cache's 8", "got 9"]),
        ({"tokens": 2, "held": 7}, ValueError, ["together", "at most 8", "got 9"]),
        ({"held": 8, "counts": jnp.array([0, 1])}, ValueError, ["together", "at most 8", "got 9"]),
        ({"key": jnp.zeros((2, 8, 1, H))}, ValueError, ["cache", "[2, 8, 2, 8]", "[2, 8, 1, 8]"]),
        ({"key": jnp.zeros((3, 8, K, H))}, ValueError, ["cache", "[2, 8, 2, 8]", "[3, 8, 2, 8]"]),
        ({"key": jnp.zeros((2, 8, K, H), "bfloat16")}, TypeError, ["float32", "bfloat16"]),
        ({"tokens": 3, "query_tokens": 1}, ValueError, ["inputs_k in decode", "1", "got 3"]),
        ({"counts": jnp.array([1])}, ValueError, ["query_seq_lengths", "[2]", "[1]"]),
        ({"counts": jnp.array([1.0, 1.0])}, TypeError, ["query_seq_lengths", "int32", "float32"]),
    ],
)
def test_errors(arguments, kind, words):
    with pytest.raises(kind) as caught:
        call(**arguments)
    assert all(word in str(caught.value) for word in words), caught.value


def test_known_lengths_raise_inside_jit_too():
    cache = empty(None, max_length=8)._replace(lengths=jnp.array([7, 3]))
    new = [jnp.zeros((2, 2, heads, H)) for heads in (N, K, K)]
    with pytest.raises(ValueError, match="together should be at most 8, got 9"):
        jax.jit(lambda *new: _cache.attend(*new, cache, None, None, None))(*new)


def test_what_fits_raises_nothing():
    call(tokens=9, counts=jnp.array([8, 0]))
    call(held=1000, window=(3, 0))
