"""Derivatives of every kind and order, against those of the plain definition."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from placements import mesh_of, normal

from jax_flash2 import attention

pytestmark = pytest.mark.usefixtures("on_cpu")
B, T, S, N, K, H, HV = 2, 5, 7, 4, 2, 8, 5
BOUNDS = {
    "query_offset": jnp.array([2, -3]),  # rows that see nothing
    "query_seq_lengths": jnp.array([5, 4]),
    "key_value_seq_lengths": jnp.array([6, 3]),
    "is_causal": True,
}
WINDOW = {"local_window_size": (2, 1), "query_offset": 1}
MASKS = {"window": WINDOW, "ragged": BOUNDS}


def qkv(*batch):
    shapes = (T, N, H), (S, K, H), (S, K, HV)
    return tuple(normal(*batch, *x, seed=i) for i, x in enumerate(shapes))


def loss(mask, implementation, *arrays):
    out, lse = attention(*arrays, **mask, implementation=implementation, return_residual=True)
    seen = lse > -jnp.inf
    return (jnp.sin(out) * jnp.arange(out.shape[-1])).sum() + jnp.where(
        seen, jnp.cos(jnp.where(seen, lse, 0)), 0
    ).sum()


def gradient(f):
    return jax.grad(f, (0, 1, 2))


def along(f, arrays):
    """Forward mode, in a direction that moves all inputs."""
    directions = tuple(normal(*x.shape, seed=10 + i) for i, x in enumerate(arrays))
    return jax.jvp(f, arrays, directions)[1]


def squared(f):
    return lambda *arrays: sum((x**2).sum() for x in f(*arrays))


DERIVATIVES = {
    "forward": along,
    "forward over reverse": lambda f, arrays: along(gradient(f), arrays),
    "reverse over reverse": lambda f, arrays: gradient(squared(gradient(f)))(*arrays),
    "reverse over forward": lambda f, arrays: gradient(lambda *x: along(f, x))(*arrays),
}


def assert_close(got, expected, tolerance=2e-5):
    def compare(x, y):
        assert np.isfinite(y).all()
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), tolerance, tolerance)

    jax.tree.map(compare, got, expected)


@pytest.mark.parametrize(
    ("derivative", "mask"),
    [
        *((x, "ragged") for x in DERIVATIVES),
        ("forward", "window"),
        ("reverse over reverse", "window"),
    ],
)
def test_every_order_and_mode(derivative, mask):
    got, expected = (
        jax.jit(functools.partial(DERIVATIVES[derivative], functools.partial(loss, MASKS[mask], x)))
        for x in (None, "xla")
    )
    assert_close(got(qkv(B)), expected(qkv(B)), 1e-4)


def test_against_finite_differences():
    with jax.enable_x64(True):
        arrays = tuple(x.astype(jnp.float64) for x in qkv(1))
        total = functools.partial(loss, {"is_causal": True, "query_offset": 2}, None)
        check_grads(jax.jit(total), arrays, order=2, modes=["rev"])


def test_hessian():
    query, key, value = (x[0] for x in qkv(B))

    def total(implementation, query):
        return loss(WINDOW, implementation, query, key, value)

    got, expected = (
        jax.jit(jax.hessian(functools.partial(total, x)))(query) for x in (None, "xla")
    )
    assert_close(got, expected)


@pytest.mark.parametrize(
    ("derivative", "axes"),
    [
        ("forward", (0, 0, 0)),
        ("forward", (0, None, None)),
        ("reverse over reverse", (None, 0, None)),
    ],
    ids=str,
)
def test_vmap(derivative, axes):
    """Of the derivative, and the derivative of it, beside a batch axis."""
    arrays = tuple(x if a == 0 else x[0] for x, a in zip(qkv(3, B), axes, strict=True))
    derivative = DERIVATIVES[derivative]

    def vmap_outside(implementation):
        total = functools.partial(loss, BOUNDS, implementation)
        return jax.vmap(lambda *x: derivative(total, x), axes)(*arrays)

    def vmap_inside(implementation):
        total = jax.vmap(functools.partial(loss, BOUNDS, implementation), axes)
        return derivative(lambda *x: total(*x).sum(), arrays)

    for function in (vmap_outside, vmap_inside):
        call = jax.jit(function, static_argnums=0)
        assert_close(call(None), call("xla"), 1e-4)


def test_one_set_of_tangents_at_many_points_and_the_reverse():
    """A Jacobian in forward mode maps the tangents alone; its transpose, in reverse mode, too."""
    query, key, value = (x[0] for x in qkv(B))
    for jacobian in (jax.jacfwd, jax.jacrev):
        got, expected = (
            jacobian(lambda k, x=x: attention(query, k, value, is_causal=True, implementation=x))
            for x in (None, "xla")
        )
        assert_close(jax.jit(got)(key), jax.jit(expected)(key))


def test_the_gradient_keeps_one_copy_of_shared_keys():
    query, key, value = (
        normal(6, 1, N, H, seed=0),
        normal(50, K, H, seed=1),
        normal(50, K, H, seed=2),
    )
    call = jax.vmap(attention, (0, None, None))
    _, pullback = jax.vjp(call, query, key, value)
    saved = sorted(x.size for x in jax.tree.leaves(pullback))
    assert saved[-2:] == [key.size, value.size]


@pytest.mark.parametrize("derivative", ["forward", "reverse over reverse"])
@pytest.mark.parametrize("place", ["jit", "shard_map", "shard_map, unchecked"])
def test_sharded(place, derivative):
    """Over batch and heads, with one key and value for all heads."""
    query, key, value = qkv(4)
    arrays = query, key[:, :, :1], value[:, :, :1]
    specs = (P("x", None, "y"), P("x"), P("x"))
    mesh = mesh_of(x=4, y=2)

    def total(call, *arrays):
        return jnp.sin(call(*arrays)).sum()

    def derived(call):
        f = functools.partial(total, call)
        return jax.jit(functools.partial(DERIVATIVES[derivative], f))

    call = functools.partial(attention, is_causal=True)
    sharded = tuple(
        jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)
    )
    expected = derived(functools.partial(call, implementation="xla"))(arrays)
    if place != "jit":
        call = jax.shard_map(
            call, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=place == "shard_map"
        )
    assert_close(derived(call)(sharded), expected, 1e-4)


def test_kernels_where_there_are_some():
    """Reverse mode of first order never computes by the definition; nor is that compiled."""
    arrays = qkv(B)
    total = functools.partial(loss, {}, None)
    text = jax.jit(gradient(total)).lower(*arrays).as_text()
    assert len(re.findall(r"custom_call @jax_flash2_", text)) == 2
    assert "dot_general" not in text


@pytest.mark.gpu
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_on_a_gpu(derivative):
    with jax.default_device(jax.devices("gpu")[0]):
        got, expected = (
            jax.jit(
                functools.partial(
                    DERIVATIVES[derivative],
                    functools.partial(loss, BOUNDS | {"precision": "highest"}, x),
                )
            )(qkv(B))
            for x in (None, "xla")
        )
        assert_close(got, expected, 1e-3)
