"""A ring of devices against the whole sequence on one: values, gradients, messages, memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from placements import assert_close, collectives, mesh_of, normal, total

import jax_flash2
from jax_flash2 import attention, from_zigzag, ring_attention, to_zigzag

pytestmark = pytest.mark.usefixtures("on_cpu")

B, L, N, K, H, HV = 2, 32, 4, 2, 8, 5
SEQ = P("data", "seq")
LENGTHS = {
    "query_seq_lengths": jnp.array([32, 13]),
    "key_value_seq_lengths": jnp.array([5, 27]),
}
CASES = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (5, 3)},
    "causal window": {"is_causal": True, "local_window_size": 9},
    "lengths": LENGTHS,
    "causal lengths": {"is_causal": True, **LENGTHS},
}


def qkv(batch=(B,), dtype=jnp.float32, length=L, heads=(N, K)):
    shapes = (heads[0], H), (heads[1], H), (heads[1], HV)
    return tuple(normal(*batch, length, *x, seed=i, dtype=dtype) for i, x in enumerate(shapes))


def ring(
    query,
    key,
    value,
    *,
    call=ring_attention,
    placement="contiguous",
    reorder=True,
    mesh=None,
    spec=SEQ,
    shard_map=jax.shard_map,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    **arguments,
):
    """(out, lse) of whole sequences, computed over the mesh's "seq"; `reorder`: in their order."""
    mesh = mesh or mesh_of(data=2, seq=4)
    devices = mesh.shape["seq"]
    lengths = query_seq_lengths, key_value_seq_lengths

    def local(query, key, value, lengths):
        names = ("query_seq_lengths", "key_value_seq_lengths")
        return call(
            query,
            key,
            value,
            axis_name="seq",
            placement=placement,
            return_residual=True,
            **dict(zip(names, lengths, strict=True)),
            **arguments,
        )

    def ordered(function, arrays):
        zigzag = reorder and placement == "zigzag"
        return [function(x, devices, 1) if zigzag else x for x in arrays]

    whole = shard_map(
        local, mesh=mesh, in_specs=(spec, spec, spec, P(spec[0])), out_specs=(spec, spec)
    )
    return ordered(from_zigzag, whole(*ordered(to_zigzag, (query, key, value)), lengths))


def whole(query, key, value, **arguments):
    return list(attention(query, key, value, return_residual=True, **arguments))


def with_gradient(function, *arrays, **arguments):
    """((out, lse), gradients)."""

    def loss(*arrays):
        results = function(*arrays, **arguments)
        return total(*results), results

    gradients, results = jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays)
    return results, gradients


def compiled(function, *arrays, **arguments):
    return jax.jit(functools.partial(function, **arguments)).lower(*arrays).compile()


@pytest.mark.parametrize(
    ("placement", "case"),
    [("contiguous", case) for case in CASES]
    + [("zigzag", case) for case in ("full", "causal", "lengths", "causal lengths")],
)
def test_values_and_gradients(placement, case):
    arrays = qkv()
    call = jax.jit(functools.partial(with_gradient, ring, placement=placement, **CASES[case]))
    expected = jax.jit(functools.partial(with_gradient, whole, **CASES[case]))
    assert_close(call(*arrays), expected(*arrays))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bits(dtype):
    """As exact as on one device: partial results are added up in float32, as far as that goes."""
    arrays = qkv(dtype=dtype)
    got = jax.jit(functools.partial(with_gradient, ring, placement="zigzag", is_causal=True))
    one = jax.jit(functools.partial(with_gradient, whole, is_causal=True))
    exact = one(*(x.astype(jnp.float32) for x in arrays))
    got, one = got(*arrays), one(*arrays)
    assert all(x.dtype == dtype for x in got[1])

    for x, on_one, truth in zip(*map(jax.tree.leaves, (got, one, exact)), strict=True):
        x, on_one = (np.linalg.norm(y.astype(jnp.float32) - truth) for y in (x, on_one))
        assert x <= 2 * on_one + 1e-6 * np.linalg.norm(truth)


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("placement", ["contiguous", "zigzag"])
def test_any_number_of_devices(devices, placement):
    mesh = mesh_of(data=1, seq=devices)
    call = functools.partial(ring, placement=placement, mesh=mesh, is_causal=True, backward="split")
    got = jax.jit(functools.partial(with_gradient, call))(*qkv())
    assert_close(got, with_gradient(whole, *qkv(), is_causal=True))


@pytest.mark.parametrize(
    ("arguments", "forward", "both"),
    [
        ({}, 4, 14),
        ({"is_causal": True, "placement": "zigzag", "reorder": False}, 4, 14),
        ({"is_causal": True, "local_window_size": 8}, 2, 8),
    ],
    ids=["full", "zigzag", "window"],
)
def test_collectives(arguments, forward, both):
    """Permutes alone: of key and value before the loop and in it; in the backward of their
    gradients too, in the loop, to the last block and home. A window of two blocks has no loop.
    Before jax 0.11, XLA takes the first two messages of the forward for those of the backward."""
    sharded = [jax.device_put(x, NamedSharding(mesh_of(data=2, seq=4), SEQ)) for x in qkv()]
    call = functools.partial(ring, **arguments)
    assert collectives(compiled(call, *sharded)) == {"collective-permute": forward}
    gradient = functools.partial(with_gradient, call)
    found = collectives(compiled(gradient, *sharded))
    assert list(found) == ["collective-permute"]
    assert found.total() in ((both - 2, both) if jax.__version_info__ < (0, 11) else (both,))


def waits_for_a_kernel(name, lines):
    if 'custom_call_target="jax_flash2_' in lines[name]:
        return True
    operands = re.findall(r"%[\w.-]+", lines[name].split("(", 1)[-1])
    return any(waits_for_a_kernel(x, lines) for x in operands if x in lines)


def test_messages_do_not_wait_for_the_kernels():
    """In the loops, what a permute sends was there when the step began."""
    mesh = mesh_of(data=2, seq=4)
    sharded = [jax.device_put(x, NamedSharding(mesh, SEQ)) for x in qkv()]
    text = compiled(functools.partial(with_gradient, ring), *sharded).as_text()
    bodies = [x for x in text.split("\n\n") if "collective-permute" in x and "ENTRY" not in x]
    assert len(bodies) == 2, "forward and backward"
    for body in bodies:
        lines = dict(re.findall(r"(%\S+) = (.*)", body))
        assert any("custom_call_target" in line for line in lines.values())

        sent = [name for name, line in lines.items() if "collective-permute(" in line]
        assert sent
        assert not any(waits_for_a_kernel(name, lines) for name in sent)


def test_memory_is_that_of_the_local_tokens():
    """A device's temporary memory, each having as many tokens: no more on eight than on four."""

    def temporary(devices):
        mesh = mesh_of(data=1, seq=devices)
        sharding = NamedSharding(mesh, SEQ)
        arrays = [
            jax.ShapeDtypeStruct((1, 256 * devices, heads, 64), jnp.bfloat16, sharding=sharding)
            for heads in (4, 2, 2)
        ]
        call = functools.partial(ring, mesh=mesh, is_causal=True)
        gradient = compiled(functools.partial(with_gradient, call), *arrays)
        return gradient.memory_analysis().temp_size_in_bytes

    assert temporary(8) <= 1.01 * temporary(4)


PLACES = {  # the mesh, and what else differs
    "unchecked": ({}, {"shard_map": functools.partial(jax.shard_map, check_vma=False)}),
    "partly manual": (
        {},
        {
            "shard_map": functools.partial(jax.shard_map, axis_names={"seq"}),
            "spec": P(None, "seq"),
        },
    ),
    "heads too": ({"data": 2, "seq": 2, "model": 2}, {"spec": P("data", "seq", "model")}),
    "explicit axes": ({"kind": AxisType.Explicit}, {}),
    "legacy mesh context": ({}, {}),
    "eager": ({}, {}),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the legacy mesh context
@pytest.mark.parametrize("place", PLACES)
def test_places(place):
    axes, options = PLACES[place]
    mesh = mesh_of(**{"data": 2, "seq": 4, **axes})
    spec = options.get("spec", SEQ)
    arrays = qkv()
    expected = with_gradient(whole, *arrays, is_causal=True)
    call = functools.partial(ring, is_causal=True, mesh=mesh, **options)
    if place == "eager":
        assert_close(call(*arrays), expected[0])
        return
    if place == "explicit axes":
        arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays]
    with mesh if place == "legacy mesh context" else jax.set_mesh(mesh):
        got = jax.jit(functools.partial(with_gradient, call))(*arrays)
    assert_close(got, expected)


def test_gradient_inside_shard_map():
    def gradient(*arrays):
        call = functools.partial(ring_attention, axis_name="seq", return_residual=True)
        return with_gradient(call, *arrays)[1]

    mapped = jax.shard_map(
        gradient, mesh=mesh_of(data=2, seq=4), in_specs=(SEQ,) * 3, out_specs=(SEQ,) * 3
    )
    assert_close(jax.jit(mapped)(*qkv()), with_gradient(whole, *qkv())[1])


def test_an_axis_of_two_mesh_axes():
    arrays = qkv()
    spec = P(None, ("data", "seq"))
    call = functools.partial(ring_attention, axis_name=("data", "seq"), is_causal=True)
    got = jax.jit(
        jax.shard_map(call, mesh=mesh_of(data=2, seq=4), in_specs=(spec,) * 3, out_specs=spec)
    )(*arrays)
    assert_close(got, attention(*arrays, is_causal=True))


@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, None)], ids=str)
def test_vmap_and_its_gradient(axes):
    arrays = [x if a == 0 else x[0] for x, a in zip(qkv((3, B)), axes, strict=True)]
    for outside in (True, False):

        def call(function, *arrays, outside=outside):
            if outside:
                return jax.vmap(functools.partial(with_gradient, function), axes)(*arrays)
            return with_gradient(jax.vmap(function, axes), *arrays)

        got, expected = (
            jax.jit(functools.partial(call, functools.partial(f, is_causal=True)))(*arrays)
            for f in (ring, whole)
        )
        assert_close(got, expected)


def test_second_order():
    """Reverse over reverse, through both rounds."""

    def second(function, *arrays):
        def norm(*arrays):
            _, gradients = with_gradient(function, *arrays, is_causal=True)
            return sum((x**2).sum() for x in gradients)

        return jax.grad(norm, (0, 1, 2))(*arrays)

    got, expected = (
        jax.jit(functools.partial(second, f))(*qkv(length=16))
        for f in (functools.partial(ring, placement="zigzag"), whole)
    )
    assert_close(got, expected, 1e-4)


def test_names_spare_the_second_forward():
    saved = jax.checkpoint_policies.save_only_these_names(*jax_flash2.CHECKPOINT_NAMES)
    counts = []
    for policy in (saved, jax.checkpoint_policies.nothing_saveable):
        call = jax.checkpoint(functools.partial(ring, is_causal=True), policy=policy)
        text = jax.jit(functools.partial(with_gradient, call)).lower(*qkv()).as_text()
        counts.append(len(re.findall("custom_call @jax_flash2_forward", text)))
    assert counts == [3, 6], "first block, loop, last block"


ERRORS = [
    ({"axis_name": "batch"}, {}, ValueError, "axis_name should be .*: 'data', 'seq'.*got 'batch'"),
    ({"placement": "striped"}, {}, ValueError, "placement should be one of 'contiguous', 'zigzag'"),
    ({"placement": "zigzag"}, {"length": 4 * 7}, ValueError, "length of query on each .* even"),
    (
        {"placement": "zigzag", "local_window_size": 3},
        {},
        NotImplementedError,
        'local_window_size should be None with placement="zigzag".*contiguous.*all_to_all',
    ),
    ({"scale": "x"}, {}, TypeError, "ring_attention: scale should be a Python number"),
    ({"backward": "fast"}, {}, ValueError, "backward should be one of"),
    ({"query_seq_lengths": jnp.ones(3, jnp.int32)}, {}, ValueError, "query_seq_lengths should"),
]


@pytest.mark.parametrize(("arguments", "shapes", "kind", "message"), ERRORS)
def test_errors(arguments, shapes, kind, message):
    arguments = {"axis_name": "seq", **arguments}
    with pytest.raises(kind, match=rf"jax_flash2\.ring_attention: .*{message}|{message}"):
        jax.shard_map(
            functools.partial(ring_attention, **arguments),
            mesh=mesh_of(data=2, seq=4),
            in_specs=SEQ,
            out_specs=SEQ,
        )(*qkv(**shapes))


def test_explicit_axes_beside_the_mapped_ones_are_refused():
    """JAX has no way from partly manual axes to auto ones."""
    mesh, spec = mesh_of(AxisType.Explicit, data=2, seq=4), P(None, "seq")
    mapped = functools.partial(jax.shard_map, axis_names={"seq"})
    for call in (
        ring_attention,
        lambda *arrays, axis_name, placement, **x: attention(*arrays, **x),
    ):
        with (
            jax.set_mesh(mesh),
            pytest.raises(NotImplementedError, match=r"AxisType\.Auto, got 'data'.*Map it too"),
        ):
            arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x in qkv()]
            ring(*arrays, call=call, mesh=mesh, shard_map=mapped, spec=spec)


def test_outside_shard_map():
    message = "ring_attention: axis_name should be a mesh axis that a jax.shard_map .*none.*'seq'"
    with pytest.raises(ValueError, match=message):
        jax.jit(functools.partial(ring_attention, axis_name="seq"))(*qkv())


def test_forward_mode_is_refused_by_jax():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: ring(x, x, x)[0], (qkv()[0],), (qkv()[0],))
