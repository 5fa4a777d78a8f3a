"""Sharded calls on eight CPU devices: what is communicated, and that nothing else changes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import placements
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from placements import collectives, normal

from jax_flash2 import attention

pytestmark = pytest.mark.usefixtures("on_cpu")

B, T, S, H = 4, 16, 16, 8
BOUNDS = {
    "query_offset": jnp.array([0, 3, -2, 1]),
    "query_seq_lengths": jnp.array([16, 7, 3, 0]),
    "key_value_seq_lengths": jnp.array([16, 3, 0, 8]),
}
HEADS = P("data", None, "model")
TOKENS = P("data", "model")
HEAD_DIM = P("data", None, None, "model")

# (mesh, N, K, query, keys and values) -> collectives of the forward, of forward and backward.
PLACEMENTS = {
    "batch": ((4, 2), 8, 2, P("data"), P("data"), {}, {}),
    "heads": ((2, 4), 8, 8, HEADS, HEADS, {}, {}),
    "heads of groups": ((4, 2), 8, 2, HEADS, HEADS, {}, {}),
    "2 kv heads over 4": ((2, 4), 8, 2, HEADS, P("data"), {}, {"all-reduce"}),
    "2 kv heads over 8": ((1, 8), 8, 2, HEADS, P(), {}, {"all-reduce"}),
    "MQA": ((2, 4), 8, 1, HEADS, P("data"), {}, {"all-reduce"}),
    "6 kv heads over 4": ((2, 4), 12, 6, HEADS, P("data"), {}, {"all-reduce"}),
    "queries": ((2, 4), 8, 2, TOKENS, P("data"), {}, {"all-reduce"}),
    "queries and keys": (
        (2, 4),
        8,
        2,
        TOKENS,
        TOKENS,
        {"all-gather"},
        {"all-gather", "all-reduce"},
    ),
    "head dim": ((2, 4), 8, 2, HEAD_DIM, HEAD_DIM, {"all-gather"}, {"all-gather"}),
}


def qkv(n, k, *batch):
    return (
        normal(*batch, T, n, H, seed=1),
        normal(*batch, S, k, H, seed=2),
        normal(*batch, S, k, H, seed=3),
    )


def mesh_of(shape, kind=AxisType.Auto):
    return placements.mesh_of(kind, data=shape[0], model=shape[1])


def forward(query, key, value, **bounds):
    return attention(query, key, value, is_causal=True, return_residual=True, **bounds)


def gradient(query, key, value, call=forward, **bounds):
    def loss(*arrays):
        out, lse = call(*arrays, **bounds)
        seen = lse > -jnp.inf
        return jnp.sin(out).sum() + jnp.where(seen, jnp.cos(jnp.where(seen, lse, 0)), 0).sum()

    return jax.grad(loss, (0, 1, 2))(query, key, value)


def assert_close(got, expected):
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), 2e-5, 2e-5)


def lies(x, mesh, spec):
    return x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)


@pytest.mark.parametrize("bounds", [{}, BOUNDS], ids=["dense", "ragged"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placement(placement, bounds):
    shape, n, k, q_spec, kv_spec, *expected = PLACEMENTS[placement]
    mesh = mesh_of(shape)
    arrays = qkv(n, k, B)
    sharded = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(arrays, (q_spec, kv_spec, kv_spec), strict=True)
    ]
    for function, kinds in zip((forward, gradient), expected, strict=True):
        call = jax.jit(functools.partial(function, **bounds))
        compiled = call.lower(*sharded).compile()
        found = collectives(compiled)
        assert set(found) == set(kinds), found
        if placement == "queries and keys":
            assert found["all-gather"] == 2, "key and value, once each"
        got = compiled(*sharded)
        assert lies(got[0], mesh, q_spec), "the first result lies as query does"
        assert_close(got, call(*arrays))


def test_eager_calls_stay_in_place():
    arrays = qkv(8, 2, B)
    mesh = mesh_of((4, 2))
    sharded = [jax.device_put(x, NamedSharding(mesh, HEADS)) for x in arrays]
    out = attention(*sharded)
    assert lies(out, mesh, HEADS)
    assert_close([out], [attention(*arrays)])


@pytest.mark.parametrize("shared", ["key and value", "none", "query"])
@pytest.mark.parametrize("tokens", [2, T])
def test_mapped_axis_sharded(tokens, shared):
    """Nothing is gathered, be the queries folded into heads (two) or the keys broadcast (all)."""
    query, key, value = qkv(8, 2, 8, 2)
    query = query[..., :tokens, :, :]
    axes = {"none": (0, 0, 0), "key and value": (0, None, None), "query": (None, 0, 0)}[shared]
    arrays = [x if a == 0 else x[0] for x, a in zip((query, key, value), axes, strict=True)]
    mesh = mesh_of((8, 1))
    sharded = [
        jax.device_put(x, NamedSharding(mesh, P("data") if a == 0 else P()))
        for x, a in zip(arrays, axes, strict=True)
    ]
    call = jax.jit(jax.vmap(forward, axes))
    compiled = call.lower(*sharded).compile()
    assert not collectives(compiled)
    assert_close(compiled(*sharded), call(*arrays))


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("tokens", [2, T])
def test_shared_keys_are_broadcast_only_if_smaller(tokens, twice):
    """In the shapes that the kernel gets, and in the values."""
    query, key, value = qkv(8, 2, 3, B)
    query, key, value = query[..., :tokens, :, :], key[0], value[0]
    one = functools.partial(forward, **BOUNDS)
    call = jax.vmap(one, (0, None, None))
    expected = [jnp.stack(x) for x in zip(*(one(q, key, value) for q in query), strict=True)]
    if twice:
        call, query = jax.vmap(call, (0, None, None)), jnp.stack([query, query])
        expected = [jnp.stack([x, x]) for x in expected]
    call = jax.jit(call)
    assert_close(call(query, key, value), expected)
    text = call.lower(query, key, value).as_text()
    operands = re.search(r"custom_call @jax_flash2_forward_ragged.*: \((.*?)\) ->", text)[1]
    shape = "x".join(map(str, key.shape))
    assert (f"tensor<{shape}xf32>" in operands) == (tokens == 2)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("place", ["heads", "shared keys", "gradient inside", "partly manual"])
def test_shard_map(place, check_vma):
    arrays = qkv(8, 4, B)
    q_spec, kv_spec = HEADS, HEADS
    call = functools.partial(attention, is_causal=True)
    if place == "shared keys":
        q_spec, kv_spec, call = TOKENS, P("data"), attention
    mapped = functools.partial(jax.shard_map, mesh=mesh_of((2, 4)), check_vma=check_vma)
    if place == "partly manual":
        q_spec = kv_spec = P("data")
        mapped = functools.partial(mapped, axis_names={"data"})

    def gradient(call, *arrays):
        return jax.grad(lambda *x: jnp.sin(call(*x)).sum(), (0, 1, 2))(*arrays)

    specs = (q_spec, kv_spec, kv_spec)
    if place == "gradient inside":
        inside = functools.partial(gradient, call)
        got = jax.jit(mapped(inside, in_specs=specs, out_specs=specs))(*arrays)
    else:
        got = jax.jit(gradient, static_argnums=0)(
            mapped(call, in_specs=specs, out_specs=q_spec), *arrays
        )
    assert_close(got, gradient(call, *arrays))


@pytest.mark.parametrize("bounds", [{}, BOUNDS], ids=["dense", "ragged"])
@pytest.mark.parametrize("spec", [HEADS, TOKENS], ids=["heads", "tokens"])
def test_explicit_axes(spec, bounds):
    arrays = qkv(8, 4, B)
    expected = gradient(*arrays, **bounds)
    mesh = mesh_of((2, 4), AxisType.Explicit)
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, spec) for x in arrays]
        got = jax.jit(functools.partial(gradient, **bounds))(*sharded)
    assert all(lies(x, mesh, spec) for x in got)
    assert_close(got, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("place", ["heads", "queries", "partly manual"])
def test_legacy_mesh_context(place):
    """`with mesh:` changes nothing; custom_partitioning would abort the process in the last."""
    arrays, mesh = qkv(8, 4, B), mesh_of((2, 4))
    spec = {"heads": HEADS, "queries": TOKENS, "partly manual": P("data")}[place]
    call = forward
    if place == "partly manual":
        call = jax.shard_map(forward, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"data"})
    with mesh:
        sharded = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays]
        got = jax.jit(functools.partial(gradient, call=call))(*sharded)
    assert_close(got, gradient(*arrays))
