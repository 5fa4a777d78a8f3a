"""The choice between ring and all-to-all, and all-to-all against one device."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from placements import assert_close, collectives, mesh_of, normal, total

from jax_flash2 import (
    attention,
    context_parallel_attention,
    context_parallel_method,
    from_zigzag,
    to_zigzag,
)

pytestmark = pytest.mark.usefixtures("on_cpu")

B, L, H, HV = 2, 32, 8, 5
SEQ = P("data", "seq")
LENGTHS = ("query_seq_lengths", "key_value_seq_lengths")


def qkv(heads, kv_heads):
    shapes = (heads, H), (kv_heads, H), (kv_heads, HV)
    return tuple(normal(B, L, *x, seed=i) for i, x in enumerate(shapes))


def split(*arrays, lengths=(None, None), **arguments):
    """(out, lse) of sequences over "seq", in their placement's order."""

    def local(query, key, value, lengths):
        return context_parallel_attention(
            query,
            key,
            value,
            axis_name="seq",
            return_residual=True,
            **dict(zip(LENGTHS, lengths, strict=True)),
            **arguments,
        )

    mapped = jax.shard_map(
        local,
        mesh=mesh_of(data=2, seq=4),
        in_specs=(SEQ, SEQ, SEQ, P("data")),
        out_specs=(SEQ, SEQ),
    )
    return mapped(*arrays, lengths)


def whole(*arrays, lengths=(None, None), **arguments):
    arguments |= dict(zip(LENGTHS, lengths, strict=True))
    return attention(*arrays, return_residual=True, **arguments)


def with_gradient(function, *arrays):
    def loss(*arrays):
        results = function(*arrays)
        return total(*results), results

    gradients, results = jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays)
    return results, gradients


CAUSAL, ZIGZAG = {"is_causal": True}, {"placement": "zigzag"}
WINDOW = {"local_window_size": 8}
CASES = {
    "heads of each": ((8, 4), {"is_causal": True}),
    "lengths": ((4, 4), {"lengths": (jnp.array([32, 13]), jnp.array([5, 27]))}),
    "window": ((8, 8), {"is_causal": True, "local_window_size": 9, "backward": "split"}),
    "repeated keys": ((8, 2), {"is_causal": True}),
    "one key head": ((4, 1), {}),
    "6 key heads over 4": ((12, 6), {"is_causal": True}),
}


@pytest.mark.parametrize(
    ("case", "placement"),
    [(case, "contiguous") for case in CASES]
    + [(case, "zigzag") for case in ("heads of each", "lengths", "window")],
)
def test_all_to_all(case, placement):
    heads, arguments = CASES[case]

    def call(*arrays):
        if placement == "contiguous":
            return split(*arrays, method="all_to_all", **arguments)
        arrays = (to_zigzag(x, 4, 1) for x in arrays)
        results = split(*arrays, method="all_to_all", placement="zigzag", **arguments)
        return [from_zigzag(x, 4, 1) for x in results]

    got = jax.jit(functools.partial(with_gradient, call))(*qkv(*heads))
    expected = jax.jit(functools.partial(with_gradient, functools.partial(whole, **arguments)))
    assert_close(got, expected(*qkv(*heads)))


@pytest.mark.parametrize(
    ("heads", "arguments", "method", "kinds"),
    [
        ((8, 8), {"placement": "zigzag"}, "all_to_all", {"all-to-all"}),
        ((8, 2), {"placement": "zigzag"}, "ring", {"collective-permute"}),
        ((8, 2), {"is_causal": True}, "all_to_all", {"all-to-all"}),
        ((6, 2), {"is_causal": True}, "ring", {"collective-permute"}),
        ((8, 8), {"method": "ring"}, "ring", {"collective-permute"}),
    ],
)
def test_it_says_and_communicates_what_it_chose(heads, arguments, method, kinds):
    sharding = NamedSharding(mesh_of(data=2, seq=4), SEQ)
    arrays = [jax.device_put(x, sharding) for x in qkv(*heads)]
    call = functools.partial(split, **arguments)
    for function in (call, functools.partial(with_gradient, call)):
        compiled = jax.jit(function).lower(*arrays).compile()
        assert set(collectives(compiled)) == kinds
        assert f"jax_flash2_{method}/" in compiled.as_text(), "the scope, for profiles"


@pytest.mark.parametrize(
    ("heads", "devices", "arguments", "method", "reason"),
    [
        ((6, 2), 4, {}, "ring", "4 devices do not divide 6 query heads"),
        ((8, 8), 4, {}, "all_to_all", "each token sends 24 heads; around a ring it would send 48"),
        ((8, 2), 2, {}, "ring", "each token sends 4 heads; by all-to-all it would send 10"),
        ((8, 2), 8, {}, "all_to_all", "each token sends 28 heads; around a ring it would send 28"),
        ((8, 2), 2, CAUSAL, "all_to_all", "a ring's causal work is unbalanced in contiguous"),
        ((8, 2), 2, CAUSAL | ZIGZAG, "ring", "each token sends 4 heads"),
        ((8, 8), 4, CAUSAL | WINDOW, "ring", "each token sends 16 heads"),
        ((8, 8), 4, WINDOW | ZIGZAG, "all_to_all", "a ring takes no window in zigzag placement"),
        ((8, 2), 1, CAUSAL, "all_to_all", "there is one device"),
    ],
)
def test_the_choice(heads, devices, arguments, method, reason):
    query, key = (jax.ShapeDtypeStruct((B, 8, n, H), jnp.bfloat16) for n in heads)
    choice = context_parallel_method(query, key, devices, **arguments)
    assert choice.method == method
    assert choice.reason.startswith(reason)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"method": "gather"},
            "method should be one of 'auto', 'ring', 'all_to_all', got 'gather'",
        ),
        (
            {"method": "all_to_all"},
            "query heads should be a multiple of the 4 devices .*got 6.*ring",
        ),
        ({"placement": "striped"}, "placement should be one of"),
        ({"precision": "best"}, "precision should be"),
    ],
)
def test_errors(arguments, message):
    message = f"jax_flash2.context_parallel_attention: .*{message}"
    with pytest.raises(ValueError, match=message):
        split(*qkv(6, 2), **arguments)


def test_the_code_in_the_docs():
    docs = Path(__file__).resolve().parents[1] / "docs" / "sharding.md"
    (code,) = re.findall(r"^```python\n(.*?)^```$", docs.read_text(), re.DOTALL | re.MULTILINE)
    exec(code, names := {})
    arrays = qkv(4, 2)
    got = names["attention"](*(to_zigzag(x, 4, 1) for x in arrays))
    assert_close(from_zigzag(got, 4, 1), attention(*arrays, is_causal=True))
    assert names["tokens"][0].tolist()[:16] == [*range(8), *range(56, 64)]


def test_other_lengths_of_keys_in_zigzag_placement():
    query, key = (jax.ShapeDtypeStruct((B, t, 8, H), jnp.bfloat16) for t in (8, 16))
    choice = context_parallel_method(query, key, 4, **CAUSAL, **ZIGZAG)
    assert choice == ("all_to_all", choice.reason)
    assert "different lengths" in choice.reason
    assert context_parallel_method(query, key, 4, **ZIGZAG).method == "all_to_all"


def test_outside_shard_map():
    with pytest.raises(ValueError, match="context_parallel_attention: axis_name should be"):
        context_parallel_attention(*qkv(8, 2), axis_name="seq")
