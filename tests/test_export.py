"""Programs that outlive the process: exported, lowered for elsewhere, kept in the compile cache."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from placements import assert_close, mesh_of, normal

import jax_flash2
from jax_flash2 import attention, ring_attention

pytestmark = pytest.mark.usefixtures("on_cpu")

B, T, S, N, K, H, HV = 2, 9, 12, 4, 2, 8, 5
export = functools.partial(jax.export.export, disabled_checks=jax_flash2.DISABLED_EXPORT_CHECKS)


def qkv(b=B, t=T, s=S):
    shapes = (t, N, H), (s, K, H), (s, K, HV)
    return tuple(normal(b, *x, seed=i) for i, x in enumerate(shapes))


def call(query, key, value, lengths=None, **arguments):
    arguments |= {"is_causal": True, "key_value_seq_lengths": lengths}
    return attention(query, key, value, **arguments)


def gradient(query, key, value, lengths, **arguments):
    def loss(*arrays):
        return (call(*arrays, lengths, **arguments) ** 2).sum()

    return jax.grad(loss, (0, 1, 2))(query, key, value)


@pytest.mark.parametrize("lengths", [(), (jnp.array([12, 5]),)], ids=["dense", "ragged"])
def test_round_trip(lengths):
    """Through bytes, the derivative too, for a machine with a GPU and for this one."""
    arrays = *qkv(), *lengths
    exported = export(jax.jit(call), platforms=("cpu", "cuda"))(*arrays)
    again = jax.export.deserialize(exported.serialize(vjp_order=1))
    assert again.platforms == ("cpu", "cuda")
    assert_close(again.call(*arrays), call(*arrays), 0)
    cotangent = normal(B, T, N, HV, seed=5)
    expected = jax.vjp(lambda *x: call(*x, *lengths), *arrays[:3])[1](cotangent)
    assert_close(again.vjp().call(*arrays, cotangent)[:3], expected, 0)


@pytest.mark.parametrize(
    "function",
    [
        call,
        functools.partial(gradient, backward="fused"),
        functools.partial(gradient, backward="deterministic"),
        jax_flash2.decode_attention,
    ],
    ids=["forward", "fused", "deterministic", "decode"],
)
def test_symbolic_batch_and_lengths(function):
    """One exported program for all sizes."""
    b, t, s = jax.export.symbolic_shape("b, t, s")
    shapes = [
        jax.ShapeDtypeStruct(x, jnp.float32) for x in ((b, t, N, H), (b, s, K, H), (b, s, K, HV))
    ]
    shapes.append(jax.ShapeDtypeStruct((b,), jnp.int32))
    exported = export(jax.jit(function), platforms=("cpu", "cuda"))(*shapes)
    exported = jax.export.deserialize(exported.serialize())
    for sizes in ((1, 1, 1), (2, 150, 70), (3, 7, 300)):
        arrays = *qkv(*sizes), jnp.arange(sizes[0], dtype=jnp.int32) + 5
        assert_close(exported.call(*arrays), function(*arrays), 1e-6)


def test_the_checks_are_those_of_all_kernels():
    with pytest.raises(ValueError, match=r"custom.call.*jax_flash2_forward"):
        jax.export.export(jax.jit(call))(*qkv())
    decode = functools.partial(jax_flash2.decode_attention, lengths=jnp.array([3, 12]))
    query, key, value = qkv(t=1)
    exported = export(jax.jit(decode), platforms=("cpu", "cuda"))(query, key, value)
    assert_close(exported.call(query, key, value), decode(query, key, value), 0)


def test_inside_shard_map():
    """Over several devices, the ring too."""
    mesh, spec = mesh_of(data=2, seq=2), P("data", "seq")
    ring = functools.partial(ring_attention, axis_name="seq", is_causal=True)
    mapped = jax.jit(jax.shard_map(ring, mesh=mesh, in_specs=spec, out_specs=spec))
    arrays = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x in qkv(t=16, s=16)]
    exported = jax.export.deserialize(export(mapped)(*arrays).serialize())
    assert exported.nr_devices == 4
    assert_close(jax.jit(exported.call)(*arrays), call(*arrays))


CACHED = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jax_flash2 import attention

folder, is_causal = sys.argv[1], sys.argv[2] == "causal"
jax.config.update("jax_compilation_cache_dir", folder)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.split("/")[-1]))

x = jax.random.normal(jax.random.key(0), (2, 30, 2, 8))
mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
sharded = jax.device_put(x, NamedSharding(mesh, P("x")))

def gradient(x, call=lambda x: attention(x, x, x, is_causal=is_causal)):
    return jax.grad(lambda x: (call(x) ** 2).sum())(x)

def inside(x):
    return jax.shard_map(gradient, mesh=mesh, in_specs=P("x"), out_specs=P("x"))(x)

def plain(x):
    return gradient(x, lambda x: attention(x, x, x, is_causal=is_causal, implementation="xla"))

expected = plain(x)
for name, function, operand in (
    ("one device", gradient, x), ("shard_map", inside, sharded), ("sharded", gradient, sharded)
):
    events.clear()
    got = jax.jit(function)(operand).block_until_ready()
    hit = "cache_hits" in events and "cache_misses" not in events
    print(name, "hit" if hit else "miss", bool(jnp.allclose(got, expected, atol=1e-5)))
"""


def test_compile_cache(tmp_path):
    """A second process finds what the first compiled, and not what another mask compiled to."""

    def run(mask):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        }
        done = subprocess.run(
            [sys.executable, "-P", "-c", CACHED, str(tmp_path), mask],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return re.findall(r"(hit|miss) (\w+)", done.stdout)

    assert run("full") == [("miss", "True")] * 3
    assert run("full") == [("hit", "True")] * 3
    assert run("causal") == [("miss", "True")] * 3
