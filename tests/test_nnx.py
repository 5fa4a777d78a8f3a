"""The nnx module against Flax's own, alone, in decode and over a mesh; `attention_fn` inside it."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_modules import BATCH, WIDTH, T, assert_close, normal, run

from jax_flash2 import attention
from jax_flash2.nnx import GroupedQueryAttention, attention_fn

S = 9  # tokens of another sequence
# What a user of Flax's module has to leave out; the last four are deprecated there.
NOT_OURS = {
    "attention_fn",
    "qkv_dot_general",
    "out_dot_general",
    "qkv_dot_general_cls",
    "out_dot_general_cls",
}


X = normal(BATCH, T, WIDTH)
OTHER, THIRD = normal(BATCH, S, 24, seed=2), normal(BATCH, S, 24, seed=3)


def both(*args, seeds=(0, 0), **kwargs):
    """Flax's module and ours."""
    flax = nnx.MultiHeadAttention(*args, decode=False, rngs=nnx.Rngs(seeds[0]), **kwargs)
    return flax, GroupedQueryAttention(*args, rngs=nnx.Rngs(seeds[1]), **kwargs)


def ours(*args, **kwargs):
    return GroupedQueryAttention(*args, rngs=nnx.Rngs(0), **kwargs)


@pytest.mark.parametrize("name", ["__init__", "__call__"])
def test_signature_holds_all_of_flax_s(name):
    flax, mine = (
        inspect.signature(getattr(module, name)).parameters
        for module in (nnx.MultiHeadAttention, GroupedQueryAttention)
    )
    kept = [x for x in flax if x not in NOT_OURS]
    assert [x for x in mine if x in flax] == kept
    for x in kept:
        assert (mine[x].kind, mine[x].default) == (flax[x].kind, flax[x].default), x
    extra = [mine[x] for x in mine if x not in flax]
    assert all(x.kind is x.KEYWORD_ONLY and x.default is not x.empty for x in extra)


INITIALISERS = {
    "kernel_init": nnx.initializers.normal(0.3),
    "out_kernel_init": nnx.initializers.orthogonal(),
    "bias_init": nnx.initializers.normal(),
    "out_bias_init": nnx.initializers.ones,
}
CASES = {
    "heads": ((4, WIDTH), {}, (X,), {}),
    "groups": ((4, WIDTH, 64, 20, 2), INITIALISERS, (X,), {"is_causal": True}),
    "one key head": ((4, WIDTH, None, None, 1), {"use_bias": False}, (X[None],), {}),
    "normalised": ((4, WIDTH, None, None, 2), {"normalize_qk": True}, (X[0],), {}),
    "cross": ((4, WIDTH, 16, None, 2, 24), {}, (X, OTHER), {}),
    "cross, values apart": ((4, WIDTH, 16, None, 2, 24), {}, (X, OTHER, THIRD), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_flax(case):
    """Parameters from the same rngs, output, and the gradients of parameters and inputs."""
    args, kwargs, inputs, call = CASES[case]
    graphs, params = zip(*(nnx.split(m, nnx.Param) for m in both(*args, **kwargs)), strict=True)

    def loss(params, inputs, graph):
        out = nnx.merge(graph, params)(*inputs, **call)
        return jnp.sin(out).sum(), out

    @jax.jit
    def gradients(params, inputs):
        gradient = jax.grad(loss, (0, 1), has_aux=True)
        return [gradient(p, inputs, graph) for p, graph in zip(params, graphs, strict=True)]

    params = [nnx.to_pure_dict(p) for p in params]
    jax.tree.map(np.testing.assert_array_equal, *params)
    assert_close(*gradients(params, inputs))


@pytest.mark.parametrize("direction", ["from Flax", "into Flax"])
def test_state_loads(direction):
    modules = both(4, WIDTH, num_kv_heads=2, normalize_qk=True, seeds=(1, 2))
    source, target = modules if direction == "from Flax" else modules[::-1]
    assert not jnp.allclose(run(source, X), run(target, X), atol=1e-2)
    nnx.update(target, nnx.state(source, nnx.Param))
    assert_close(run(target, X), run(source, X))


@pytest.mark.parametrize("given", ["is_causal", "window", "lengths"])
def test_masks_equal_dense_ones(given):
    i, j = jnp.arange(T)[:, None], jnp.arange(T)
    lengths = jnp.array([T, 5])
    flax, mine = both(4, WIDTH, num_kv_heads=2)
    if given == "lengths":
        mask = jnp.broadcast_to((j < lengths[:, None])[:, None, None], (BATCH, 1, T, T))
        got = run(mine, X, key_value_seq_lengths=lengths)
    else:
        mask = (j <= i) & ((j >= i - 3) | (given == "is_causal"))
        mine = ours(4, WIDTH, num_kv_heads=2, local_window_size=(3, 1)) if "w" in given else mine
        got = run(mine, X, is_causal=True)
    assert_close(got, run(flax, X, mask=jnp.broadcast_to(mask, (BATCH, 1, T, T))))


def turned(x, positions, theta):
    """Rotary embedding by its definition: pairs of channels as complex numbers, in float64."""
    low, high = np.split(np.asarray(x, np.float64), 2, axis=-1)
    rates = theta ** (-np.arange(low.shape[-1]) / low.shape[-1])
    z = (low + 1j * high) * np.exp(1j * np.asarray(positions)[..., None, None] * rates)
    return jnp.asarray(np.concatenate([z.real, z.imag], -1), jnp.float32)


@pytest.mark.parametrize(
    ("inputs", "given"),
    [
        ((X,), None),
        ((X,), jnp.arange(T) * 3 + 20),
        ((X,), jnp.stack([jnp.arange(T), jnp.arange(T) // 2])),
        ((X, normal(BATCH, S, WIDTH)), None),
        ((X, normal(BATCH, S, WIDTH)), (jnp.arange(T), jnp.arange(S) + 7)),
    ],
    ids=["counted", "given", "by sequence", "cross", "cross, given"],
)
def test_rotary(inputs, given):
    module = ours(4, WIDTH, num_kv_heads=2, rope_theta=100.0)
    plain = ours(4, WIDTH, num_kv_heads=2)
    q_positions, k_positions = given if isinstance(given, tuple) else (given, given)
    if given is None:
        q_positions, k_positions = jnp.arange(T), jnp.arange(inputs[-1].shape[1])
    query = turned(plain.query(inputs[0]), q_positions, 100.0)
    key = turned(plain.key(inputs[-1]), k_positions, 100.0)
    value = plain.value(inputs[-1])
    expected = plain.out(nnx.dot_product_attention(query, key, value))
    assert_close(run(module, *inputs, input_positions=given), expected)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_flax_s(dtype, param_dtype):
    flax, mine = both(4, WIDTH, num_kv_heads=2, dtype=dtype, param_dtype=param_dtype)
    for x in (X, X.astype(jnp.bfloat16)):
        got, expected = run(mine, x), run(flax, x)
        assert got.dtype == expected.dtype
        assert_close(got.astype(jnp.float32), expected.astype(jnp.float32), 2e-2)
    mine.init_cache((BATCH, T, WIDTH))
    assert mine.cached_key.dtype == (dtype or param_dtype)


def test_metadata_of_each_projection():
    def tag(name):
        return {f"{name}_metadata": {"tag": name}}

    names = ("kernel", "kv_kernel", "out_kernel", "bias", "kv_bias", "out_bias")
    lns = ("query_ln_scale", "key_ln_scale")
    settings = {k: v for name in (*names, *lns) for k, v in tag(name).items()}
    module = ours(4, WIDTH, normalize_qk=True, **settings)
    for kind in ("kernel", "bias"):
        for part, name in (("query", ""), ("key", "kv_"), ("value", "kv_"), ("out", "out_")):
            assert getattr(getattr(module, part), kind).get_metadata("tag") == f"{name}{kind}"
    assert module.query_ln.scale.get_metadata("tag") == "query_ln_scale"
    assert module.key_ln.scale.get_metadata("tag") == "key_ln_scale"
    module = ours(4, WIDTH, **tag("kernel"), **tag("bias"))
    for part in (module.query, module.key, module.value, module.out):
        assert part.kernel.get_metadata("tag") == "kernel"
        assert part.bias.get_metadata("tag") == "bias"


MAKE_ERRORS = [
    ({"num_kv_heads": 3}, ["num_kv_heads", "divisor of num_heads, 4", "got 3"]),
    ({"num_kv_heads": 0}, ["num_kv_heads", "at least 1", "got 0"]),
    ({"num_kv_heads": 8}, ["num_kv_heads", "divisor of num_heads, 4", "got 8"]),
    ({"qkv_features": 30}, ["qkv_features", "multiple of num_heads, 4", "got 30", "head_dim"]),
    ({"qkv_features": 32, "head_dim": 16}, ["qkv_features", "4 * 16", "got 32"]),
    ({"head_dim": 7, "rope_theta": 1e4}, ["head_dim", "even", "got 7"]),
    ({"local_window_size": -1}, ["local_window_size", "at least 0", "got -1"]),
]


@pytest.mark.parametrize(("arguments", "words"), MAKE_ERRORS)
def test_errors_of_the_constructor(arguments, words):
    with pytest.raises(ValueError) as caught:
        ours(4, WIDTH, **arguments)
    assert all(word in str(caught.value) for word in words), caught.value


MASK = jnp.ones((BATCH, 1, T, T), bool)
CALL_ERRORS = [
    ({"mask": MASK}, {}, NotImplementedError, ["mask", "None", "bool[2, 1, 12, 12]", "is_causal"]),
    ({"sow_weights": True}, {}, NotImplementedError, ["sow_weights", "False"]),
    ({"deterministic": False}, {"dropout_rate": 0.1}, NotImplementedError, ["dropout_rate", "0.1"]),
    ({}, {"dropout_rate": 0.1, "deterministic": False}, NotImplementedError, ["dropout_rate"]),
    ({}, {"dropout_rate": 0.1}, ValueError, ["deterministic"]),
    ({"decode": True}, {}, ValueError, ["cache", "init_cache"]),
    ({"inputs_v": X}, {}, ValueError, ["inputs_k", "inputs_v"]),
    ({"input_positions": jnp.arange(T)}, {}, ValueError, ["input_positions", "rope_theta"]),
    (
        {"input_positions": jnp.arange(5)},
        {"rope_theta": 1e4},
        ValueError,
        ["input_positions", "[12]", "[2, 12]", "got [5]"],
    ),
    ({}, {"backward": "none"}, ValueError, ["backward", "'none'"]),
    ({}, {"precision": "some"}, ValueError, ["recision"]),
]


@pytest.mark.parametrize(("arguments", "made", "kind", "words"), CALL_ERRORS)
def test_errors_of_the_call(arguments, made, kind, words):
    with pytest.raises(kind) as caught:
        ours(4, WIDTH, **made)(X, **arguments)
    assert all(word in str(caught.value) for word in words), caught.value


def test_dropout_that_is_deterministic_is_none():
    flax, mine = both(4, WIDTH, dropout_rate=0.3, deterministic=True)
    assert_close(run(mine, X, rngs=nnx.Rngs(5)), run(flax, X))


def flax_with(function, **kwargs):
    return nnx.MultiHeadAttention(
        4, WIDTH, num_kv_heads=2, attention_fn=function, decode=False, rngs=nnx.Rngs(0), **kwargs
    )


def test_attention_fn_in_flax_s_module():
    flax = flax_with(nnx.dot_product_attention)
    mine = flax_with(attention_fn, dropout_rate=0.5, deterministic=True)
    assert_close(run(mine, X, is_causal=True), run(flax, X, is_causal=True))
    windowed = flax_with(functools.partial(attention_fn, local_window_size=(3, 0)))
    expected = run(ours(4, WIDTH, num_kv_heads=2, local_window_size=(3, 0)), X)
    assert_close(run(windowed, X), expected)
    assert flax_with(attention_fn, dtype=jnp.bfloat16)(X).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("made", "called", "words"),
    [
        ({}, {"mask": MASK}, ["mask", "bool[2, 1, 12, 12]", "is_causal"]),
        ({}, {"mask": MASK[0, 0]}, ["mask", "bool[12, 12]"]),
        ({"dropout_rate": 0.25}, {"deterministic": False}, ["dropout_rate", "0.25"]),
        ({}, {"sow_weights": True}, ["sow_weights"]),
    ],
)
def test_attention_fn_refuses(made, called, words):
    with pytest.raises(NotImplementedError, match=r"^jax_flash2\.nnx\.attention_fn: ") as caught:
        flax_with(attention_fn, **made)(X, **called)
    assert all(word in str(caught.value) for word in words), caught.value


def test_attention_fn_refuses_the_mask_of_flax_s_decode():
    module = flax_with(attention_fn)
    module.init_cache(X.shape)
    with pytest.raises(NotImplementedError, match=r"mask.*GroupedQueryAttention"):
        module(X[:, :1], decode=True)


def test_attention_fn_takes_all_that_flax_passes():
    flax = inspect.signature(nnx.dot_product_attention).parameters
    mine = inspect.signature(attention_fn).parameters
    for name, parameter in flax.items():
        assert mine[name].default == parameter.default, name
    heads = normal(2, 3, 4, 8)
    with pytest.raises(NotImplementedError, match="bias"):
        attention_fn(heads, heads, heads, bias=jnp.zeros((4, 3, 3)))
    with pytest.raises(TypeError, match="unheard_of"):
        attention_fn(heads, heads, heads, unheard_of=1)


def test_another_function_attends():
    """With the arguments of `attention`, after the rotation."""
    asked = []

    def attend(query, key, value, **arguments):
        asked.append(arguments)
        return 2 * attention(query, key, value, **arguments)

    lengths = jnp.array([T, 5])
    plain = ours(4, WIDTH, num_kv_heads=2, rope_theta=100.0, use_bias=False, local_window_size=3)
    call = {"is_causal": True, "key_value_seq_lengths": lengths}
    expected = 2 * run(plain, X, **call)
    plain.attend = attend
    assert_close(plain(X, **call), expected)
    (arguments,) = asked
    assert arguments.pop("key_value_seq_lengths") is lengths
    assert arguments == {
        "is_causal": True,
        "query_seq_lengths": None,
        "local_window_size": (3, 3),
        "precision": None,
        "backward": "auto",
    }
