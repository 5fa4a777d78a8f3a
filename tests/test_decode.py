"""`decode_attention`: the battery's rules on the table of decoding calls, and its own promises."""

import functools
import re

import battery
import decode_battery
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DECODE

from jax_flash2 import attention, decode_attention

PLATFORMS = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]
FORMATS = battery.FORMATS["cpu"]  # float32 is computed as float32 everywhere


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_battery(case, fmt, platform):
    if platform == "gpu" and fmt.dtype == "float64":
        pytest.skip("float64 is for the CPU")
    decode_battery.check(case, fmt, jax.devices(platform)[0])


@pytest.mark.parametrize("case", DECODE, ids=str)
def test_the_plain_definition(case):
    decode_battery.check(case, FORMATS[-1], jax.devices("cpu")[0], implementation="xla")


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


B, T, S, N, K, H = 3, 2, 96, 4, 2, 16
QUERY, KEYS, VALUES = normal(B, T, N, H), normal(B, S, K, H, seed=1), normal(B, S, K, H, seed=2)
LENGTHS = jnp.array([96, 40, 0], jnp.int32)


@pytest.mark.parametrize("window", [None, 20])
def test_it_is_attention_at_the_end(window):
    got = decode_attention(
        QUERY, KEYS, VALUES, LENGTHS, local_window_size=window, return_residual=True
    )
    expected = attention(
        QUERY,
        KEYS,
        VALUES,
        is_causal=True,
        query_offset=LENGTHS - T,
        key_value_seq_lengths=LENGTHS,
        local_window_size=window,
        return_residual=True,
    )
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, 1e-5, 1e-5)


def test_new_lengths_compile_nothing():
    step = jax.jit(lambda *x: decode_attention(*x))  # a cache of its own
    for lengths in (LENGTHS, LENGTHS + 1, LENGTHS * 0):
        step(QUERY, KEYS, VALUES, lengths)
    assert step._cache_size() == 1


def test_sequences_share_pages():
    pages = normal(5, 16, K, H, seed=3), normal(5, 16, K, H, seed=4)
    table = jnp.array([[0, 1, 2], [0, 1, 3], [4, 1, 0]], jnp.int32)
    lengths = jnp.array([40, 48, 17], jnp.int32)
    got = decode_attention(QUERY, *pages, lengths, page_table=table)
    dense = [x[table].reshape(B, 48, K, H) for x in pages]
    np.testing.assert_array_equal(got, decode_attention(QUERY, *dense, lengths))


def test_there_is_no_derivative():
    for function in (jax.grad, functools.partial(jax.jacfwd)):
        with pytest.raises(NotImplementedError, match=r"decode_attention: it has no derivative"):
            function(lambda q: decode_attention(q, KEYS, VALUES, LENGTHS).sum())(QUERY)
    # Nothing is asked of it where nothing depends on it.
    stopped = jax.grad(
        lambda q: (q * decode_attention(jax.lax.stop_gradient(q), KEYS, VALUES, LENGTHS)).sum()
    )(QUERY)
    np.testing.assert_allclose(stopped, decode_attention(QUERY, KEYS, VALUES, LENGTHS))


def test_the_caches_are_not_copied():
    """A step that writes its token and attends: XLA updates the donated caches where they lie."""

    def step(keys, values, lengths, query, key, value):
        at = (jnp.arange(B)[:, None], lengths[:, None] + jnp.arange(T))
        keys, values = keys.at[at].set(key), values.at[at].set(value)
        return keys, values, decode_attention(query, keys, values, lengths + T)

    new = normal(B, T, K, H, seed=5), normal(B, T, K, H, seed=6)
    operands = KEYS, VALUES, jnp.array([3, 40, 90], jnp.int32), QUERY, *new
    text = jax.jit(step, donate_argnums=(0, 1)).lower(*operands).compile().as_text()
    assert text.count("jax_flash2_decode") >= 1
    shape = rf"f32\[{B},{S},{K},{H}\]"
    assert not re.search(rf"= {shape}\S* copy\(", text)


@pytest.mark.parametrize("paged", [False, True])
def test_export(paged):
    target = "jax_flash2_decode_paged" if paged else "jax_flash2_decode"
    pages = [x.reshape(B * S // 16, 16, K, H) for x in (KEYS, VALUES)]
    table = jnp.arange(B * S // 16, dtype=jnp.int32).reshape(B, -1)
    call = jax.jit(decode_attention)
    operands = (QUERY, KEYS, VALUES, LENGTHS)
    if paged:
        call = jax.jit(lambda q, k, v, n, table: decode_attention(q, k, v, n, page_table=table))
        operands = (QUERY, *pages, LENGTHS, table)
    exported = jax.export.export(
        call,
        platforms=("cpu", "cuda"),
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(target)],
    )(*operands)
    np.testing.assert_array_equal(exported.call(*operands), call(*operands))


def mapped_arguments(paged):
    """Operands with an axis to map, 5 elements; pools of pages are small."""
    lengths = jnp.array([[96, 40, 0], [1, 2, 3], [96, 96, 96], [17, 5, 33], [0, 64, 16]], jnp.int32)
    if not paged:
        return normal(5, B, T, N, H), normal(5, B, S, K, H), normal(5, B, S, K, H), lengths
    table = np.random.default_rng(7).integers(-1, 8, (5, B, S // 16))
    pool = normal(5, 7, 16, K, H, seed=8), normal(5, 7, 16, K, H, seed=9)
    return normal(5, B, T, N, H), *pool, lengths, jnp.asarray(table, jnp.int32)


@pytest.mark.parametrize("mapped", ["q", "qn", "qk", "qkv", "kv", "n", "qkvn", "t", "qt", "qkvnt"])
@pytest.mark.parametrize("paged", [False, True])
def test_vmap(mapped, paged):
    names = "qkvnt" if paged else "qkvn"
    if not set(mapped) <= set(names):
        pytest.skip("no page table")

    def call(q, k, v, lengths, table=None):
        return decode_attention(q, k, v, lengths, page_table=table, return_residual=True)

    operands = mapped_arguments(paged)
    axes = [0 if name in mapped else None for name in names]
    operands = [x if a == 0 else x[1] for x, a in zip(operands, axes, strict=True)]
    got = jax.jit(jax.vmap(call, axes))(*operands)
    for i in range(5):
        one = call(*(x if a is None else x[i] for x, a in zip(operands, axes, strict=True)))
        for x, y in zip(got, one, strict=True):
            np.testing.assert_allclose(x[i], y, 1e-6, 1e-6)


def test_vmap_of_vmap():
    q, k, v, lengths = mapped_arguments(paged=False)
    got = jax.vmap(jax.vmap(decode_attention, (0, 0, 0, 0)), (0, None, None, None))(
        jnp.stack([q, 2 * q]), k, v, lengths
    )
    for x, y in zip(got, (q, 2 * q), strict=True):
        np.testing.assert_allclose(x, decode_attention(y, k, v, lengths), 1e-6, 1e-6)


def test_shared_keys_are_not_copied():
    """Queries that share a cache under vmap become more heads of it; and so do pools of pages."""
    q, k, v, lengths = mapped_arguments(paged=False)
    text = jax.jit(jax.vmap(decode_attention, (0, None, None, None))).lower(
        q, k[0], v[0], lengths[0]
    )
    assert re.search(rf"@jax_flash2_decode\(.*tensor<{B}x{S}x{K}x{H}xf32>", text.as_text())
    q, k, v, lengths, table = mapped_arguments(paged=True)
    call = lambda *x: decode_attention(*x[:4], page_table=x[4])  # noqa: E731
    text = jax.jit(jax.vmap(call, (0, None, None, 0, 0))).lower(q, k[0], v[0], lengths, table)
    assert re.search(rf"@jax_flash2_decode_paged\(.*tensor<7x16x{K}x{H}xf32>", text.as_text())
