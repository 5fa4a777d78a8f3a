"""What users wrap around the op: jit, vmap, scan, remat, export, derivatives of every kind."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jax_flash2 import attention

B, T, S, N, K, H, HV = 2, 9, 12, 4, 2, 8, 5


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def qkv(*batch, dtype=jnp.float32):
    return (
        normal(*batch, T, N, H, seed=1, dtype=dtype),
        normal(*batch, S, K, H, seed=2, dtype=dtype),
        normal(*batch, S, K, HV, seed=3, dtype=dtype),
    )


def loss(out, lse):
    """Of both results, and finite where a row sees nothing."""
    seen = lse > -jnp.inf
    return (jnp.sin(out) * normal(*out.shape[-3:], seed=4)).sum() + jnp.where(
        seen, jnp.cos(jnp.where(seen, lse, 0)), 0
    ).sum()


def masked(query, key, value, lengths, offset, **kwargs):
    return attention(
        query,
        key,
        value,
        key_value_seq_lengths=lengths,
        query_offset=offset,
        is_causal=True,
        return_residual=True,
        **kwargs,
    )


def gradient(query, key, value, lengths, offset):
    return jax.grad(lambda *x: loss(*masked(*x, lengths, offset)), (0, 1, 2))(query, key, value)


def assert_close(a, b, tolerance=2e-6):
    def compare(x, y):
        np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(y, np.float32), tolerance, tolerance
        )

    jax.tree.map(compare, a, b)


M = 3  # the mapped axis, beside an inner batch of two
OPERANDS = dict(
    zip(
        ("query", "key", "value", "lengths", "offset"),
        (*qkv(M, B), jnp.array([[12, 3], [0, 7], [5, 12]]), jnp.array([[3, 0], [1, -4], [3, 3]])),
        strict=True,
    )
)
MAPPED = [m for m in itertools.product((True, False), repeat=5) if any(m)]


@pytest.mark.parametrize("function", [masked, gradient], ids=lambda f: f.__name__)
def test_vmap_over_any_subset(function):
    """Against a loop, with unmapped operands that the inner batch still has."""
    one = jax.jit(function)
    for mapped in MAPPED:
        operands = [x if m else x[0] for x, m in zip(OPERANDS.values(), mapped, strict=True)]
        axes = tuple(0 if m else None for m in mapped)
        got = jax.jit(jax.vmap(function, axes))(*operands)
        each = [
            one(*(x[i] if m else x for x, m in zip(operands, mapped, strict=True)))
            for i in range(M)
        ]
        assert_close(got, jax.tree.map(lambda *x: jnp.stack(x), *each))


@pytest.mark.parametrize("unmapped", [None, "query", "key", "value"])
def test_gradient_of_vmap(unmapped):
    """The gradient of an unmapped operand is the sum over the mapped axis."""
    names = ("query", "key", "value")
    operands = [OPERANDS[n][0] if n == unmapped else OPERANDS[n] for n in names]
    axes = (*(None if n == unmapped else 0 for n in names), 0, 0)
    rest = OPERANDS["lengths"], OPERANDS["offset"]

    def total(*arrays):
        return loss(*jax.vmap(masked, axes)(*arrays, *rest))

    def total_by_loop(*arrays):
        return sum(
            loss(
                *masked(
                    *(x if n == unmapped else x[i] for n, x in zip(names, arrays, strict=True)),
                    *(x[i] for x in rest),
                )
            )
            for i in range(M)
        )

    assert_close(
        jax.jit(jax.grad(total, (0, 1, 2)))(*operands),
        jax.jit(jax.grad(total_by_loop, (0, 1, 2)))(*operands),
    )


def test_vmap_of_heads_and_of_tokens_axes():
    """Mapped axes other than the first, on input and output."""
    query, key, value = qkv(M)
    got = jax.vmap(attention, in_axes=(1, 2, 3), out_axes=2)(
        jnp.moveaxis(query, 0, 1), jnp.moveaxis(key, 0, 2), jnp.moveaxis(value, 0, 3)
    )
    assert_close(jnp.moveaxis(got, 2, 0), attention(query, key, value))


def test_vmap_twice_and_jacobian():
    query, key, value = qkv(M, B)
    twice = jax.vmap(jax.vmap(attention))(query, key, value)
    assert_close(twice, attention(query, key, value))
    q, k, v = (x[0, 0, :3] for x in (query, key, value))
    jacobian = jax.jacrev(lambda v: attention(q, k, v))(v)
    expected = jax.jacrev(lambda v: attention(q, k, v, implementation="xla"))(v)
    assert_close(jacobian, expected)


def test_leading_axes_and_numpy_inputs():
    query, key, value = qkv(2, 3)
    got = attention(*map(np.asarray, (query, key, value)), is_causal=True)
    assert isinstance(got, jax.Array)
    for i, j in itertools.product(range(2), range(3)):
        one = attention(query[i, j], key[i, j], value[i, j], is_causal=True)
        assert one.shape == (T, N, HV)
        assert_close(one, got[i, j])


def test_lengths_of_one_sequence_may_have_jax_nn_s_shape():
    query, key, value = qkv()
    as_in_jax = attention(query, key, value, key_value_seq_lengths=jnp.array([5]))
    assert_close(as_in_jax, attention(query, key, value, key_value_seq_lengths=jnp.array(5)))


@pytest.mark.parametrize("window", [None, (4, 2)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_offset_is_one_thing_in_all_its_spellings(is_causal, window):
    query, key, value = qkv(B)

    def call(offset):
        return attention(
            query, key, value, query_offset=offset, is_causal=is_causal, local_window_size=window
        )

    for offset in (0, S - T, -2):
        static = call(offset)
        assert_close(call(jnp.int32(offset)), static, 0)
        assert_close(jax.jit(call)(jnp.full(B, offset)), static, 0)
    assert_close(call(None), call(0), 0)


def test_jax_nn_agrees():
    """The same call of jax.nn.dot_product_attention, on all that both have."""
    query, key, value = normal(B, T, N, H), normal(B, S, K, H, seed=1), normal(B, S, K, H, seed=2)
    lengths = {"query_seq_lengths": jnp.array([9, 9]), "key_value_seq_lengths": jnp.array([12, 4])}
    for arguments in (
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"local_window_size": (3, 2)},
        {"local_window_size": 4, "is_causal": True},
        lengths,
    ):
        assert_close(
            attention(query, key, value, **arguments),
            jax.nn.dot_product_attention(query, key, value, **arguments),
        )


def test_implementations_agree():
    arrays = [x[0] for x in OPERANDS.values()]

    def gradient(implementation):
        return jax.grad(
            lambda *x: loss(*masked(*x, *arrays[3:], implementation=implementation)), (0, 1, 2)
        )(*arrays[:3])

    assert_close(masked(*arrays), masked(*arrays, implementation="xla"))
    assert_close(gradient(None), gradient("xla"))


@pytest.mark.parametrize("backward", ["fused", "deterministic", "split"])
def test_gradients_against_finite_differences(backward):
    with jax.enable_x64(True):
        query, key, value = qkv(B, dtype=jnp.float64)

        def call(*arrays):
            out, lse = attention(
                *arrays,
                local_window_size=(5, 1),
                query_offset=2,
                key_value_seq_lengths=jnp.array([12, 7], jnp.int32),
                backward=backward,
                return_residual=True,
            )
            return out, lse

        check_grads(jax.jit(call), (query, key, value), order=1, modes=["rev"])


def test_gradient_of_one_result_alone():
    query, key, value = qkv(B)
    for pick in (0, 1):

        def total(q, k, v, implementation=None, pick=pick):
            return attention(
                q, k, v, return_residual=True, implementation=implementation, is_causal=True
            )[pick].sum()

        got = jax.grad(total, (0, 1, 2))(query, key, value)
        assert_close(
            got,
            jax.grad(functools.partial(total, implementation="xla"), (0, 1, 2))(query, key, value),
        )


def test_bfloat16_residual_is_float32():
    out, lse = attention(*qkv(B, dtype=jnp.bfloat16), return_residual=True)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)


def test_without_jit():
    query, key, value = qkv(B)
    with jax.disable_jit():
        eager = attention(query, key, value, is_causal=True)
    assert_close(eager, attention(query, key, value, is_causal=True), 0)


def test_one_compiled_call_for_all_lengths():
    query, key, value = qkv(B)
    call = jax.jit(lambda n: attention(query, key, value, key_value_seq_lengths=n))
    for n in ([12, 12], [3, 5], [0, 1]):
        call(jnp.array(n))
    assert call._cache_size() == 1
