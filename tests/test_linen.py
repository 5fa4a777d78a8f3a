"""The linen module against Flax's own, and in decode; `attention_fn` inside Flax's."""

import dataclasses
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax_modules import BATCH, WIDTH, T, assert_close, in_chunks, normal
from jax.sharding import PartitionSpec as P

import jax_flash2.nnx
from jax_flash2 import attention
from jax_flash2.linen import GroupedQueryAttention, attention_fn

Flax = linen.MultiHeadDotProductAttention
# What a user of Flax's module has to leave out.
NOT_OURS = {
    "attention_fn",
    "force_fp32_for_softmax",
    "qkv_dot_general",
    "out_dot_general",
    "qkv_dot_general_cls",
    "out_dot_general_cls",
    "qk_attn_weights_einsum_cls",
    "attn_weights_value_einsum_cls",
}
X = normal(BATCH, T, WIDTH)
OTHER, THIRD = normal(BATCH, 9, 24, seed=2), normal(BATCH, 9, 24, seed=3)
CAUSAL = linen.make_causal_mask(jnp.ones((BATCH, T)))


def init(module, *inputs, seed=0, **call):
    return jax.jit(functools.partial(module.init, **call))(jax.random.key(seed), *inputs)


def run(module, variables, *inputs, **call):
    return jax.jit(functools.partial(module.apply, **call))(variables, *inputs)


def test_fields_hold_all_of_flax_s():
    flax, mine = (
        {f.name: f for f in dataclasses.fields(m) if f.name not in ("parent", "name")}
        for m in (Flax, GroupedQueryAttention)
    )
    kept = [x for x in flax if x not in NOT_OURS]
    assert [x for x in mine if x in flax] == kept
    assert list(mine)[: len(kept)] == kept
    for x in kept:
        assert mine[x].default == flax[x].default, x
    assert all(mine[x].default is not dataclasses.MISSING for x in mine if x not in flax)


def test_call_holds_all_of_flax_s():
    flax, mine = (inspect.signature(m.__call__).parameters for m in (Flax, GroupedQueryAttention))
    for x in flax:
        if x != "inputs_kv":  # deprecated
            assert (mine[x].kind, mine[x].default) == (flax[x].kind, flax[x].default), x


INITIALISERS = {
    "kernel_init": linen.initializers.normal(0.3),
    "out_kernel_init": linen.initializers.orthogonal(),
    "bias_init": linen.initializers.normal(),
    "out_bias_init": linen.initializers.ones,
}
CASES = {
    "heads, causal": (INITIALISERS, (X,), {"mask": CAUSAL}, {"is_causal": True}),
    "normalised": ({"normalize_qk": True, "use_bias": False}, (X[0],), {}, {}),
    "cross": (
        {"qkv_features": 16, "out_features": 20},
        (X[None], OTHER[None], THIRD[None]),
        {},
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_flax(case):
    """Parameters from the same key, output, and the gradients of parameters and inputs."""
    fields, inputs, flax_call, call = CASES[case]
    flax, mine = Flax(4, **fields), GroupedQueryAttention(4, **fields)
    variables = init(flax, *inputs)
    jax.tree.map(np.testing.assert_array_equal, init(mine, *inputs), variables)

    def loss(module, call, variables, inputs):
        out = module.apply(variables, *inputs, **call)
        return jnp.sin(out).sum(), out

    @jax.jit
    def gradients(variables, inputs):
        return [
            jax.grad(functools.partial(loss, *which), (0, 1), has_aux=True)(variables, inputs)
            for which in ((mine, call), (flax, flax_call))
        ]

    assert_close(*gradients(variables, inputs))


def test_parameters_are_those_of_the_nnx_module():
    """Grouped heads, which linen's own module has not: the same layer in both."""
    settings = {"num_kv_heads": 2, "head_dim": 6, "rope_theta": 50.0, "normalize_qk": True}
    settings |= {"out_features": 20, "local_window_size": (4, 0)}
    mine = GroupedQueryAttention(4, **settings)
    other = jax_flash2.nnx.GroupedQueryAttention(4, WIDTH, rngs=nnx.Rngs(0), **settings)
    params = nnx.to_pure_dict(nnx.state(other, nnx.Param))
    shapes = jax.tree.map(jnp.shape, init(mine, X)["params"])
    assert shapes == jax.tree.map(jnp.shape, params)
    assert shapes["query"]["kernel"] == (WIDTH, 4, 6)
    assert shapes["key"]["kernel"] == shapes["value"]["kernel"] == (WIDTH, 2, 6)
    positions = jnp.arange(T) + 5
    got = run(mine, {"params": params}, X, is_causal=True, input_positions=positions)
    expected = jax.jit(lambda: other(X, is_causal=True, input_positions=positions))()
    assert_close(got, expected)


def test_dtypes_are_flax_s():
    fields = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    variables = init(GroupedQueryAttention(4, **fields), X)
    got = run(GroupedQueryAttention(4, **fields), variables, X)
    expected = run(Flax(4, **fields), variables, X)
    assert got.dtype == expected.dtype == jnp.bfloat16
    assert_close(got.astype(jnp.float32), expected.astype(jnp.float32), 2e-2)


def test_partitioning_of_each_projection():
    def by(*axes):
        return linen.with_partitioning(linen.initializers.lecun_normal(), axes)

    module = GroupedQueryAttention(
        4,
        num_kv_heads=2,
        kernel_init=by("embed", "heads", None),
        kv_kernel_init=by("embed", None, None),
        out_kernel_init=by("heads", None, "embed"),
        kv_bias_init=linen.initializers.ones,
    )
    variables = jax.eval_shape(module.init, jax.random.key(0), X)
    specs = linen.get_partition_spec(variables)["params"]
    assert specs["query"]["kernel"] == P("embed", "heads", None)
    assert specs["key"]["kernel"] == specs["value"]["kernel"] == P("embed", None, None)
    assert specs["out"]["kernel"] == P("heads", None, "embed")
    params = init(GroupedQueryAttention(4, kv_bias_init=linen.initializers.ones), X)["params"]
    assert not params["query"]["bias"].any() and params["key"]["bias"].all()


def step_of(module, **call):
    def step(params, cache, x):
        variables = {"params": params, "cache": cache}
        out, changed = module.apply(variables, x, mutable=["cache"], **call)
        return out, changed["cache"]

    return step


@pytest.mark.parametrize("window", [None, 3], ids=["all", "window"])
def test_decode_equals_the_whole(window):
    fields = {"num_kv_heads": 2, "rope_theta": 100.0, "local_window_size": window}
    module = GroupedQueryAttention(4, decode=True, **fields)
    variables = init(module, X)
    shape = (BATCH, 4 if window else T, 2, 8)
    assert variables["cache"]["cached_key"].shape == shape
    np.testing.assert_array_equal(variables["cache"]["cache_index"], [0, 0])
    whole = GroupedQueryAttention(4, **fields)
    expected = run(whole, {"params": variables["params"]}, X, is_causal=True)
    chunks = [5, 1, 1, 4, 1]
    out, cache, _ = in_chunks(chunks, step_of(module), variables["params"], variables["cache"], X)
    assert_close(out, expected)
    np.testing.assert_array_equal(cache["cache_index"], [T, T])


def test_no_copy_of_the_cache():
    module = GroupedQueryAttention(4, num_kv_heads=2, head_dim=64, decode=True)
    variables = init(module, jnp.zeros((4, 2048, WIDTH)))
    x = jnp.zeros((4, 1, WIDTH))
    step = jax.jit(step_of(module), donate_argnums=1)
    compiled = step.lower(variables["params"], variables["cache"], x).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert "f32[4,2048,2,64]" in text
    assert not re.findall(r"= f32\[4,2048,2,64\].* copy\(", text)
    each = 4 * 2048 * 2 * 64 * 4
    assert memory.alias_size_in_bytes >= 2 * each
    assert memory.temp_size_in_bytes < each / 2


MASK = jnp.ones((BATCH, 1, T, T), bool)
ERRORS = [
    ({"num_kv_heads": 3}, {}, ValueError, ["num_kv_heads", "divisor of num_heads, 4", "got 3"]),
    ({"num_heads": 5}, {}, ValueError, ["qkv_features", "multiple of num_heads, 5", "got 32"]),
    ({}, {"mask": MASK}, NotImplementedError, ["mask", "bool[2, 1, 12, 12]", "is_causal"]),
    ({}, {"sow_weights": True}, NotImplementedError, ["sow_weights"]),
    (
        {"dropout_rate": 0.1},
        {"deterministic": False},
        NotImplementedError,
        ["dropout_rate", "0.1"],
    ),
    ({"decode": True}, {}, ValueError, ["cache", "init"]),
    ({}, {"inputs_v": X}, ValueError, ["inputs_k", "inputs_v"]),
    ({}, {"input_positions": jnp.arange(T)}, ValueError, ["input_positions", "rope_theta"]),
]


@pytest.mark.parametrize(("fields", "call", "kind", "words"), ERRORS)
def test_errors(fields, call, kind, words):
    params = {"params": init(GroupedQueryAttention(4), X)["params"]}
    with pytest.raises(kind, match=r"^jax_flash2\.GroupedQueryAttention: ") as caught:
        GroupedQueryAttention(**{"num_heads": 4, **fields}).apply(
            params, X, mutable=["cache"], **call
        )
    assert all(word in str(caught.value) for word in words), caught.value


def flax_with(function, **fields):
    return Flax(4, attention_fn=function, **fields)


def test_attention_fn_in_flax_s_module():
    variables = init(Flax(4), X)
    expected = run(Flax(4), variables, X, mask=CAUSAL)
    causal = functools.partial(attention_fn, is_causal=True)
    assert_close(run(flax_with(causal), variables, X), expected)
    mine = flax_with(causal, dropout_rate=0.5, deterministic=True, force_fp32_for_softmax=True)
    assert_close(run(mine, variables, X), expected)


def einsum_of_one_s_own():
    return jnp.einsum


@pytest.mark.parametrize(
    ("fields", "call", "words"),
    [
        ({}, {"mask": CAUSAL}, ["mask", "float32[2, 1, 12, 12]", "is_causal"]),
        ({"dropout_rate": 0.25}, {"deterministic": False}, ["dropout_rate", "0.25"]),
        ({}, {"sow_weights": True}, ["sow_weights"]),
        ({"decode": True}, {}, ["mask"]),
        (
            {
                "qk_attn_weights_einsum_cls": einsum_of_one_s_own,
                "attn_weights_value_einsum_cls": einsum_of_one_s_own,
            },
            {},
            ["qk_attn_weights_einsum"],
        ),
    ],
)
def test_attention_fn_refuses(fields, call, words):
    variables = init(Flax(4, decode="decode" in fields), X[:, :1])
    x = X[:, :1] if "decode" in fields else X
    for function in (attention_fn, functools.partial(attention_fn, is_causal=True)):
        module = flax_with(function, **fields)
        rngs = {"dropout": jax.random.key(0)}
        with pytest.raises(NotImplementedError, match=r"^jax_flash2\.linen\.attention_fn: ") as e:
            module.apply(variables, x, rngs=rngs, mutable=["cache"], **call)
        assert all(word in str(e.value) for word in words), e.value


def test_attention_fn_names_all_that_linen_would_drop():
    """linen passes an argument only where the signature has its name."""

    class Everything(dict):
        def __contains__(self, name):
            asked.add(name)
            return False

    class Signature(inspect.Signature):
        parameters = Everything()

    def spy(query, key, value):
        return value

    asked = set()
    spy.__signature__ = Signature()
    Flax(4, attention_fn=spy).init(jax.random.key(0), X)
    assert {"mask", "dropout_rate", "deterministic", "dtype", "precision"} <= asked
    mine = inspect.signature(attention_fn).parameters
    assert asked <= set(mine)
    for name, parameter in inspect.signature(linen.dot_product_attention).parameters.items():
        assert mine[name].default == parameter.default, name


def test_another_function_attends():
    def attend(*arrays, **arguments):
        return 2 * attention(*arrays, **arguments)

    fields = {"num_heads": 4, "num_kv_heads": 2, "rope_theta": 100.0, "use_bias": False}
    plain = GroupedQueryAttention(**fields)
    other = GroupedQueryAttention(**fields, attend=attend)
    variables = init(plain, X)
    expected = 2 * run(plain, variables, X, is_causal=True)
    assert_close(run(other, variables, X, is_causal=True), expected)
