"""Sharded decoding on eight CPU devices: what is communicated, and that nothing else changes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flash2 import decode_attention

B, T, S, H, PAGES, PAGE = 4, 3, 64, 8, 20, 16
LENGTHS = jnp.array([64, 7, 0, 33], jnp.int32)
HEADS = P("data", None, "model")
COLLECTIVE = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("

# (mesh, N, K, query, caches) -> collectives
PLACEMENTS = {
    "batch": ((4, 2), 8, 2, P("data"), P("data"), set()),
    "heads": ((2, 4), 8, 8, HEADS, HEADS, set()),
    "heads of groups": ((4, 2), 8, 2, HEADS, HEADS, set()),
    "2 kv heads over 4": ((2, 4), 8, 2, HEADS, P("data"), set()),
    "MQA": ((1, 8), 8, 1, HEADS, P(), set()),
    "6 kv heads over 4": ((2, 4), 12, 6, HEADS, P("data"), set()),
    "tokens": ((4, 2), 8, 2, P(None, None, None, "model"), P(), {"all-gather"}),
    "keys": ((4, 2), 8, 2, P("data"), P("data", "model"), {"all-gather"}),
}


def normal(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def operands(n, k, paged):
    query = normal(B, T, n, H, seed=1)
    if not paged:
        return query, normal(B, S, k, H, seed=2), normal(B, S, k, H, seed=3), LENGTHS
    table = np.random.default_rng(4).integers(-1, PAGES + 1, (B, S // PAGE))
    pool = normal(PAGES, PAGE, k, H, seed=2), normal(PAGES, PAGE, k, H, seed=3)
    return query, *pool, LENGTHS, jnp.asarray(table, jnp.int32)


def decode(query, keys, values, lengths, page_table=None):
    return decode_attention(
        query, keys, values, lengths, page_table=page_table, return_residual=True
    )


def mesh_of(shape, kind=AxisType.Auto):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind))


def specs_of(query, caches, paged):
    """Pools of pages belong to no sequence: of the caches' placement their heads' alone."""
    heads = P(None, None, *caches[2:3])
    batch = P(query[0]) if len(query) else P()
    return (query, heads, heads, batch, batch) if paged else (query, caches, caches, batch)


def assert_close(got, expected):
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), 1e-6, 1e-6)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placement(placement, paged):
    shape, n, k, query, caches, kinds = PLACEMENTS[placement]
    if paged and placement == "keys":
        pytest.skip("keys in pages lie on no axis of their own")
    mesh = mesh_of(shape)
    arrays = operands(n, k, paged)
    specs = specs_of(query, caches, paged)
    sharded = [
        jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)
    ]
    call = jax.jit(decode)
    compiled = call.lower(*sharded).compile()
    assert set(re.findall(COLLECTIVE, compiled.as_text())) == kinds
    out, lse = compiled(*sharded)
    if not kinds:
        assert out.sharding.is_equivalent_to(NamedSharding(mesh, query), out.ndim)
    assert_close((out, lse), call(*arrays))


@pytest.mark.parametrize("paged", [False, True])
def test_eager_calls_stay_in_place(paged):
    arrays = operands(8, 2, paged)
    mesh = mesh_of((4, 2))
    sharded = [
        jax.device_put(x, NamedSharding(mesh, s))
        for x, s in zip(arrays, specs_of(HEADS, HEADS, paged), strict=True)
    ]
    out, lse = decode(*sharded)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, HEADS), out.ndim)
    assert_close((out, lse), decode(*arrays))


def test_without_a_batch_axis():
    """Scalar lengths have no axis that could be sharded."""
    query, keys, values, lengths = (x[0] for x in operands(8, 2, paged=False))
    mesh = mesh_of((1, 8))
    sharded = jax.device_put(query, NamedSharding(mesh, P(None, "model")))
    out, lse = jax.jit(decode)(sharded, keys, values, lengths)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "model")), out.ndim)
    assert_close((out, lse), decode(query, keys, values, lengths))


def test_mapped_axis_sharded():
    """Mapped over sequences that lie on different devices."""
    query, keys, values, lengths = operands(8, 2, paged=False)
    mesh = mesh_of((4, 2))
    arrays = query[:, None], keys[:, None], values[:, None], lengths[:, None]
    sharded = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in arrays]
    call = jax.jit(jax.vmap(decode))
    compiled = call.lower(*sharded).compile()
    assert not re.search(COLLECTIVE, compiled.as_text())
    assert_close(compiled(*sharded), call(*arrays))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("paged", [False, True])
def test_shard_map(paged, check_vma):
    arrays = operands(8, 4, paged)
    specs = specs_of(HEADS, HEADS, paged)
    mapped = jax.shard_map(
        decode, mesh=mesh_of((2, 4)), in_specs=specs, out_specs=(HEADS, HEADS), check_vma=check_vma
    )
    assert_close(jax.jit(mapped)(*arrays), decode(*arrays))


def test_partly_manual_shard_map():
    arrays = operands(8, 4, paged=False)
    mapped = jax.shard_map(
        decode,
        mesh=mesh_of((2, 4)),
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"data"},
    )
    assert_close(jax.jit(mapped)(*arrays), decode(*arrays))


@pytest.mark.parametrize("paged", [False, True])
def test_explicit_axes(paged):
    arrays = operands(8, 4, paged)
    expected = decode(*arrays)
    mesh = mesh_of((2, 4), AxisType.Explicit)
    with jax.set_mesh(mesh):
        specs = specs_of(HEADS, HEADS, paged)
        sharded = [jax.device_put(x, s) for x, s in zip(arrays, specs, strict=True)]
        out, lse = jax.jit(decode)(*sharded)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, HEADS), out.ndim)
    assert_close((out, lse), expected)


def test_a_step_that_writes_and_reads_stays_in_place():
    """The caches, sharded by batch and heads, are updated where they lie and read there."""
    mesh = mesh_of((2, 4))
    query, keys, values, lengths = operands(8, 4, paged=False)
    new = normal(B, 1, 4, H, seed=5), normal(B, 1, 4, H, seed=6)

    def step(keys, values, lengths, query, key, value):
        write = jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0))
        keys, values = write(keys, key, lengths), write(values, value, lengths)
        return keys, values, decode_attention(query, keys, values, lengths + 1)

    arrays = keys, values, jnp.minimum(lengths, S - 1), query[:, :1], *new
    specs = HEADS, HEADS, P("data"), HEADS, HEADS, HEADS
    sharded = [
        jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)
    ]
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*sharded).compile()
    assert not re.search(COLLECTIVE, compiled.as_text())
    assert_close(compiled(*sharded), jax.jit(step)(*arrays))
