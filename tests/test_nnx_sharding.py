"""The nnx module over eight CPU devices: the same results, and nothing gathered."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_modules import WIDTH, T, assert_close, in_chunks, nnx_step, normal, run
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_flash2.nnx import GroupedQueryAttention


def ours(*args, **kwargs):
    return GroupedQueryAttention(*args, rngs=nnx.Rngs(0), **kwargs)


def by_heads(axis="model", kv_axis="model"):
    """Metadata that shard each projection by heads."""
    return {
        "kernel_metadata": {"out_sharding": (None, axis, None)},
        "kv_kernel_metadata": {"out_sharding": (None, kv_axis, None)},
        "out_kernel_metadata": {"out_sharding": (axis, None, None)},
        "bias_metadata": {"out_sharding": (axis, None)},
        "kv_bias_metadata": {"out_sharding": (kv_axis, None)},
        "out_bias_metadata": {"out_sharding": (None,)},
    }


COLLECTIVE = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
# Its shape, the axis over which the two key/value heads are sharded, the kind of its axes.
MESHES = {
    "data and heads": ((4, 2), "model", AxisType.Auto),
    "2 key heads over 4": ((2, 4), None, AxisType.Explicit),
}


def mesh_of(shape, kind=AxisType.Auto):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind))


def gradient_of(graph, **call):
    def loss(params, x):
        out = nnx.merge(graph, params)(x, is_causal=True, **call)
        return jnp.sin(out).mean(), out

    return jax.jit(jax.grad(loss, has_aux=True))


@pytest.mark.parametrize("mesh", MESHES)
def test_sharded_equals_unsharded(mesh):
    shape, kv_axis, kind = MESHES[mesh]
    settings = {"num_kv_heads": 2, "rope_theta": 100.0}
    x = normal(8, T, WIDTH)
    graph, params = nnx.split(ours(8, WIDTH, **settings), nnx.Param)
    expected = gradient_of(graph)(params, x)
    call = {}
    if kind == AxisType.Explicit:
        heads, kv_heads = (P("data", None, axis) for axis in ("model", kv_axis))
        call = {"qkv_sharding": heads, "kv_sharding": kv_heads, "out_sharding": P("data")}
    with jax.set_mesh(mesh_of(shape, kind)):
        graph, params = nnx.split(
            ours(8, WIDTH, **settings, **by_heads(kv_axis=kv_axis)), nnx.Param
        )
        assert params["query"]["kernel"][...].sharding.spec == P(None, "model", None)
        assert params["key"]["kernel"][...].sharding.spec == P(None, kv_axis, None)
        sharded = jax.device_put(x, P("data"))
        compiled = gradient_of(graph, **call).lower(params, sharded).compile()
        got = compiled(params, sharded)
    kinds = set(re.findall(COLLECTIVE, compiled.as_text()))
    assert kinds == {"all-reduce"}, kinds
    assert_close(got[1], expected[1])
    for x, y in zip(*map(jax.tree.leaves, (got[0], expected[0])), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_decode_sharded(kind):
    """Neither the cache nor what is written to it leaves its device."""
    settings = {"num_kv_heads": 2, "rope_theta": 100.0, "local_window_size": (5, 0)}
    x = normal(8, T, WIDTH)
    expected = run(ours(8, WIDTH, **settings), x, is_causal=True)
    call = {}
    if kind == AxisType.Explicit:
        call = {"qkv_sharding": P("data", None, "model"), "out_sharding": P("data")}
    with jax.set_mesh(mesh_of((4, 2), kind)):
        module = ours(8, WIDTH, **settings, **by_heads())
        module.init_cache(x.shape, metadata={"out_sharding": ("data", None, "model", None)})
        out, cache, texts = in_chunks(
            [8, 1, 3], *nnx_step(module, **call), jax.device_put(x, P("data"))
        )
    assert_close(out, expected)
    assert all(re.findall(COLLECTIVE, text) == ["all-reduce"] for text in texts), "out's alone"
    shard = cache["cached_key"][...].addressable_shards[0].data
    assert shard.shape == (2, 6, 1, 4)
