"""The nnx module with its cache: against the whole sequence at once, and what is copied."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_modules import BATCH, WIDTH, T, assert_close, in_chunks, nnx_step, normal, run

from jax_flash2.nnx import GroupedQueryAttention

X = normal(BATCH, T, WIDTH)


def ours(*args, **kwargs):
    return GroupedQueryAttention(*args, rngs=nnx.Rngs(0), **kwargs)


@pytest.mark.parametrize("window", [None, 3], ids=["all", "window"])
def test_decode_equals_the_whole(window):
    """Prefill, single tokens and a few at once; rotary positions and norms among them."""
    module = ours(
        4, WIDTH, num_kv_heads=2, rope_theta=100.0, normalize_qk=True, local_window_size=window
    )
    expected = run(module, X, is_causal=True)
    module.init_cache(X.shape)
    out, cache, _ = in_chunks([5, 1, 1, 4, 1], *nnx_step(module), X)
    assert_close(out, expected)
    assert cache["cached_key"].shape == (BATCH, 4 if window else T, 2, 8)
    np.testing.assert_array_equal(cache["cache_index"][...], [T, T])


def test_decode_ragged():
    """Each sequence goes on from where it is, with rotary positions of its own."""
    module = ours(4, WIDTH, num_kv_heads=2, rope_theta=100.0)
    expected = run(module, X, is_causal=True)
    module.init_cache(X.shape)
    short = X[:, :6].at[1, 2:].set(jnp.nan)
    out = nnx.jit(lambda m, x, n: m(x, decode=True, query_seq_lengths=n))(
        module, short, jnp.array([6, 2])
    )
    assert_close(out[0], expected[0, :6])
    assert_close(out[1, :2], expected[1, :2])
    following = jnp.stack([X[0, 6:7], X[1, 2:3]])
    out = nnx.jit(lambda m, x: m(x, decode=True))(module, following)
    assert_close(out, jnp.stack([expected[0, 6:7], expected[1, 2:3]]))
    np.testing.assert_array_equal(module.cache_index[...], [7, 3])


def test_decode_of_the_constructor_and_of_a_view():
    module = ours(4, WIDTH, num_kv_heads=2, decode=True)
    with pytest.raises(ValueError, match="init_cache"):
        module(X)
    view = nnx.view(module, decode=True, batch_size=BATCH, max_length=T)
    expected = run(ours(4, WIDTH, num_kv_heads=2), X, is_causal=True)
    assert_close(nnx.jit(lambda m, x: m(x))(view, X), expected)
    assert not nnx.view(module, decode=False).decode and module.decode
    with pytest.raises(TypeError, match="max_length"):
        nnx.view(module, batch_size=BATCH)


@pytest.mark.parametrize("how", ["prefill", "one token", "a few tokens", "one on a ring", "scan"])
def test_no_copy_of_the_cache(how):
    """The compiled program writes into the memory that it is given, and needs little beside it."""
    window, slots = (1023, 1024) if how == "one on a ring" else (None, 2048)
    tokens = {"prefill": 32, "a few tokens": 4}.get(how, 1)
    module = ours(4, WIDTH, num_kv_heads=2, head_dim=64, local_window_size=window)
    module.init_cache((4, 2048, WIDTH))
    step, params, cache = nnx_step(module)

    def many_steps(params, cache, x):
        def body(carry, _):
            return step(params, *carry)[::-1], None

        return jax.lax.scan(body, (cache, x), None, length=8)[0]

    x = jax.ShapeDtypeStruct((4, tokens, WIDTH), jnp.float32)
    call = many_steps if how == "scan" else step
    compiled = jax.jit(call, donate_argnums=1).lower(params, cache, x).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    shape = f"f32[4,{slots},2,64]"
    assert shape in text
    assert not [x for x in text.splitlines() if re.search(rf"= {re.escape(shape)}.* copy\(", x)]
    each = 4 * slots * 2 * 64 * 4
    assert memory.alias_size_in_bytes >= 2 * each
    assert memory.temp_size_in_bytes < each / 2
