"""What only a GPU shows; the battery runs there too, from test_attention.py and test_large.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash2 import _ffi, attention, decode_attention

pytestmark = pytest.mark.gpu


def normal(*shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


def gradient(x, **arguments):
    return jax.grad(lambda x: attention(x, x, x, **arguments).astype(jnp.float32).sum())(x)


def test_float64_is_refused_by_name():
    with jax.enable_x64(True):
        x = normal(1, 8, 1, 8, dtype=jnp.float64)
        with pytest.raises(NotImplementedError, match="no float64 kernel for CUDA"):
            attention(x, x, x)


def test_bad_buffers_are_an_error_and_no_more():
    """The handler refuses, and the next call works."""
    x = normal(1, 16, 2, 64)
    results = list(_ffi.forward_results(x, x, x))
    results[0] = jax.ShapeDtypeStruct((1, 16, 2, 32), x.dtype)
    spec = {
        "scale": 1.0,
        "band_lower": 0,
        "band_upper": 0,
        "precision": "default",
        "backward": "fused",
        "family": "auto",
    }
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"out should be bfloat16\[1,16,2,64\]"):
        jax.block_until_ready(jax.ffi.ffi_call("jax_flash2_forward", results)(x, x, x, spec=spec))
    assert jnp.isfinite(attention(x, x, x)).all()


@pytest.mark.parametrize("backward", ["fused", "deterministic", "split"])
def test_many_calls_in_one_program(backward):
    """A loop over layers, which XLA may run as one CUDA graph, against the calls one by one."""
    layers = 6
    x = normal(2, 130, 4, 64)

    @jax.jit
    def scanned(x):
        def step(x, _):
            return attention(x, x, x, is_causal=True, backward=backward), None

        return jax.lax.scan(step, x, length=layers)[0]

    expected = x
    for _ in range(layers):
        expected = attention(expected, expected, expected, is_causal=True)
    np.testing.assert_array_equal(scanned(x), expected)
    got = jax.jit(jax.grad(lambda x: scanned(x).astype(jnp.float32).sum()))(x)
    assert jnp.isfinite(got).all()


def test_cpu_and_gpu_agree():
    x = normal(2, 100, 4, 64, dtype=jnp.float32)
    on_gpu = gradient(x, is_causal=True, precision="highest")
    on_cpu = gradient(jax.device_put(x, jax.devices("cpu")[0]), is_causal=True)
    np.testing.assert_allclose(on_gpu, on_cpu, 1e-4, 1e-5)


def test_many_steps_of_decoding_in_one_program():
    """A loop that XLA may run as one CUDA graph: every step finds what the last one left behind."""
    steps, room = 24, 6000
    query, keys, values = normal(2, 1, 8, 64), normal(2, room, 2, 64), normal(2, room, 2, 64)

    def step(query, length):
        lengths = jnp.stack([length, length // 3])
        return decode_attention(query, keys, values, lengths), None

    lengths = jnp.arange(room - 24 * 200, room, 200, dtype=jnp.int32)[:steps]
    expected = query
    for length in lengths:
        expected, _ = step(expected, length)
    got = jax.jit(lambda query: jax.lax.scan(step, query, lengths)[0])(query)
    np.testing.assert_array_equal(got, expected)


def test_decoding_on_cpu_and_gpu_agrees():
    query, keys = normal(2, 3, 4, 64, dtype=jnp.float32), normal(2, 3000, 2, 64, dtype=jnp.float32)
    operands = query, keys, keys, jnp.array([3000, 500], jnp.int32)
    on_gpu = decode_attention(*operands)
    on_cpu = decode_attention(*jax.device_put(operands, jax.devices("cpu")[0]))
    np.testing.assert_allclose(on_gpu, on_cpu, 1e-4, 1e-6)
