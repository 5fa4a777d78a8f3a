"""Wrong calls: which exception, and what its text has to name. All at trace time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash2

PREFIX = r"^jax_flash2\.attention: "


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


Q, K, V = array(2, 5, 4, 16), array(2, 7, 2, 16), array(2, 7, 2, 24)
TWO_LENGTHS = array(2, dtype=jnp.int32)

SHAPES = [
    ("query_of_rank_2", array(5, 16), K, V, ["query", "[*B, T, N, H]", "[5, 16]"]),
    ("key_of_rank_3", Q, array(7, 2, 16), V, ["key", "batch axes [2]", "[7, 2, 16]"]),
    (
        "value_of_rank_5",
        Q,
        K,
        array(1, 2, 7, 2, 24),
        ["value", "batch axes [2]", "[1, 2, 7, 2, 24]"],
    ),
    ("key_of_another_batch", Q, array(3, 7, 2, 16), V, ["key", "batch axes [2]", "[3, 7, 2, 16]"]),
    ("head_dims_differ", Q, array(2, 7, 2, 8), V, ["key's head dim", "16", "8"]),
    ("value_of_another_length", Q, K, array(2, 6, 2, 24), ["value", "7, 2", "[2, 6, 2, 24]"]),
    ("value_of_other_heads", Q, K, array(2, 7, 1, 24), ["value", "7, 2", "[2, 7, 1, 24]"]),
    (
        "heads_no_multiple",
        array(2, 5, 3, 16),
        K,
        V,
        ["number of query heads", "multiple of the number of key heads, 2", "3"],
    ),
    ("no_heads", array(2, 5, 0, 16), K, V, ["number of query heads", "at least 1", "0"]),
    (
        "no_key_heads",
        Q,
        array(2, 7, 0, 16),
        array(2, 7, 0, 24),
        ["number of key heads", "at least 1", "0"],
    ),
    ("no_head_dim", array(2, 5, 4, 0), array(2, 7, 2, 0), V, ["query's head dim", "at least 1"]),
]


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize(
    ("query", "key", "value", "parts"), [s[1:] for s in SHAPES], ids=[s[0] for s in SHAPES]
)
def test_shapes(query, key, value, parts, implementation):
    with pytest.raises(ValueError, match=PREFIX) as error:
        jax.eval_shape(
            lambda *x: jax_flash2.attention(*x, implementation=implementation), query, key, value
        )
    for part in parts:
        assert part in str(error.value)


DTYPES = [
    (
        "integers",
        (array(2, 5, 4, 16, dtype=jnp.int32), K, V),
        ["query's dtype", "float16", "int32"],
    ),
    (
        "float8",
        (Q, array(2, 7, 2, 16, dtype=jnp.float8_e4m3fn), V),
        ["key's dtype", "float8_e4m3fn"],
    ),
    ("complex", (Q, K, array(2, 7, 2, 24, dtype=jnp.complex64)), ["value's dtype", "complex64"]),
    (
        "mixed",
        (Q, array(2, 7, 2, 16, dtype=jnp.bfloat16), V),
        ["key's dtype", "query's, float32", "bfloat16", "key.astype(query.dtype)"],
    ),
]


@pytest.mark.parametrize(("arrays", "parts"), [d[1:] for d in DTYPES], ids=[d[0] for d in DTYPES])
def test_dtypes(arrays, parts):
    with pytest.raises(TypeError, match=PREFIX) as error:
        jax.eval_shape(jax_flash2.attention, *arrays)
    for part in parts:
        assert part in str(error.value)


# Name, arguments, exception, what the text names.
ARGUMENTS = [
    ("scale", "0.5", TypeError, ["a Python number", "'0.5'"]),
    ("scale", np.ones(3), TypeError, ["a Python number", "float64[3]"]),
    ("scale", float("nan"), ValueError, ["finite", "nan"]),
    ("scale", float("inf"), ValueError, ["finite", "inf"]),
    ("is_causal", 1, TypeError, ["True or False", "1"]),
    ("is_causal", None, TypeError, ["True or False", "None"]),
    ("return_residual", "yes", TypeError, ["True or False", "'yes'"]),
    ("query_offset", 1.5, TypeError, ["int32", "1.5"]),
    ("query_offset", True, TypeError, ["int32", "True"]),
    ("query_offset", 2**40, ValueError, ["at most 536870912", "1099511627776"]),
    ("query_offset", np.zeros(2, np.float32), TypeError, ["int32", "float32", "astype"]),
    ("query_offset", np.zeros(3, np.int32), ValueError, ["batch axes [2]", "[3]"]),
    ("query_offset", np.zeros((2, 1), np.int32), ValueError, ["batch axes [2]", "[2, 1]"]),
    ("query_seq_lengths", np.zeros(2, np.float32), TypeError, ["int32", "float32", "astype"]),
    ("query_seq_lengths", np.zeros(2, np.int8), TypeError, ["int32", "int8", "astype"]),
    ("query_seq_lengths", np.zeros(3, np.int32), ValueError, ["batch axes [2]", "[3]"]),
    ("key_value_seq_lengths", np.zeros((), np.int32), ValueError, ["batch axes [2]", "[]"]),
    ("key_value_seq_lengths", np.zeros((2, 2), np.int32), ValueError, ["batch axes [2]", "[2, 2]"]),
    ("local_window_size", -1, ValueError, ["at least 0", "-1", "length of the sequence"]),
    ("local_window_size", (3, -1), ValueError, ["at least 0", "(3, -1)"]),
    ("local_window_size", (1, 2, 3), TypeError, ["(left, right)", "(1, 2, 3)"]),
    ("local_window_size", (3, None), TypeError, ["(left, right)", "(3, None)"]),
    ("local_window_size", 2.0, TypeError, ["(left, right)", "2.0"]),
    ("local_window_size", True, TypeError, ["(left, right)", "True"]),
    ("precision", "best", ValueError, ['"highest"', "'best'"]),
    ("precision", 3.5, ValueError, ['"highest"', "3.5"]),
    ("backward", "fast", ValueError, ["'auto', 'fused', 'deterministic', 'split'", "'fast'"]),
    ("backward", None, ValueError, ["'auto'", "None"]),
    ("implementation", "cudnn", ValueError, ["None, 'cuda_sm80', 'xla'", "'cudnn'"]),
    ("implementation", 0, ValueError, ["None, 'cuda_sm80', 'xla'", "0"]),
]


@pytest.mark.parametrize(
    ("name", "argument", "kind", "parts"),
    ARGUMENTS,
    ids=[f"{a[0]}-{i}" for i, a in enumerate(ARGUMENTS)],
)
def test_arguments(name, argument, kind, parts):
    with pytest.raises(kind, match=PREFIX + name) as error:
        jax.eval_shape(lambda *x: jax_flash2.attention(*x, **{name: argument}), Q, K, V)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["scale", "is_causal", "local_window_size"])
def test_traced_where_static(name):
    def call(query, key, value, argument):
        return jax_flash2.attention(query, key, value, **{name: argument})

    with pytest.raises(TypeError, match=rf"{PREFIX}{name} .*got a traced float32"):
        jax.eval_shape(call, Q, K, V, array())


@pytest.mark.parametrize("wide", ["query", "value"])
def test_head_dim_too_large(wide):
    h, hv = (264, 16) if wide == "query" else (16, 257)
    arrays = array(2, 5, 4, h), array(2, 7, 2, h), array(2, 7, 2, hv)
    with pytest.raises(NotImplementedError, match=f'{wide}.s head dim .* 256, .*"xla"'):
        jax.eval_shape(jax_flash2.attention, *arrays)
    out = jax.eval_shape(lambda *x: jax_flash2.attention(*x, implementation="xla"), *arrays)
    assert out.shape == (2, 5, 4, hv)


def test_sequence_too_long():
    arrays = array(1, 5, 1, 8), array(1, 2**28 + 1, 1, 8), array(1, 2**28 + 1, 1, 8)
    with pytest.raises(NotImplementedError, match=r"key length .* 268435456, got 268435457"):
        jax.eval_shape(jax_flash2.attention, *arrays)


def test_arguments_after_value_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        jax.eval_shape(lambda *x: jax_flash2.attention(*x, None), Q, K, V)


@pytest.mark.parametrize(
    "arguments",
    [
        {"scale": np.float32(0.5)},
        {"scale": 1},
        {"scale": np.array(0.5)},
        {"is_causal": np.True_},
        {"query_offset": np.int64(3)},
        {"query_offset": [3, 4]},
        {"local_window_size": [np.int32(3), 4]},
        {"precision": jax.lax.Precision.HIGH},
        {"precision": "tensorfloat32"},
        {"key_value_seq_lengths": [3, 4]},
    ],
    ids=str,
)
def test_what_is_accepted(arguments):
    for implementation in (None, "xla"):
        out, lse = jax.eval_shape(
            lambda *x, i=implementation: jax_flash2.attention(
                *x, return_residual=True, implementation=i, **arguments
            ),
            Q,
            K,
            V,
        )
        assert (out.shape, out.dtype) == ((2, 5, 4, 24), jnp.float32)
        assert (lse.shape, lse.dtype) == ((2, 5, 4), jnp.float32)


DECODE_PREFIX = r"^jax_flash2\.decode_attention: "
PAGES, TABLE = (array(6, 32, 2, 16), array(6, 32, 2, 24)), array(2, 3, dtype=jnp.int32)

# Query, caches, lengths, other arguments, exception, what the text names.
DECODE = [
    (array(5, 16), K, V, TWO_LENGTHS, {}, ValueError, ["query", "[*B, T, N, H]", "[5, 16]"]),
    (Q, array(7, 2, 16), V, TWO_LENGTHS, {}, ValueError, ["key_cache", "batch axes [2]"]),
    (Q, K, array(3, 7, 2, 24), TWO_LENGTHS, {}, ValueError, ["value_cache", "batch axes [2]"]),
    (
        Q,
        K,
        array(2, 6, 2, 24),
        TWO_LENGTHS,
        {},
        ValueError,
        ["value_cache", "as key_cache", "7, 2"],
    ),
    (Q, array(2, 7, 2, 8), V, TWO_LENGTHS, {}, ValueError, ["key_cache's head dim", "16", "8"]),
    (
        array(2, 5, 3, 16),
        K,
        V,
        TWO_LENGTHS,
        {},
        ValueError,
        ["number of query heads", "multiple of the number of key heads, 2", "3"],
    ),
    (
        Q,
        array(2, 7, 2, 16, dtype=jnp.bfloat16),
        V,
        TWO_LENGTHS,
        {},
        TypeError,
        ["key_cache's dtype", "key_cache.astype(query.dtype)"],
    ),
    (Q, K, V, None, {}, TypeError, ["lengths", "int32", "None"]),
    (Q, K, V, array(2), {}, TypeError, ["lengths's dtype", "int32", "float32", "astype"]),
    (Q, K, V, array(3, dtype=jnp.int32), {}, ValueError, ["lengths", "batch axes [2]", "[3]"]),
    (Q, K, V, array(dtype=jnp.int32), {}, ValueError, ["lengths", "batch axes [2]", "[]"]),
    (Q, K, V, TWO_LENGTHS, {"scale": "1"}, TypeError, ["scale", "a Python number"]),
    (Q, K, V, TWO_LENGTHS, {"local_window_size": -1}, ValueError, ["local_window_size", "-1"]),
    (Q, K, V, TWO_LENGTHS, {"implementation": "cudnn"}, ValueError, ["None, 'xla'", "'cudnn'"]),
    (Q, K, V, TWO_LENGTHS, {"return_residual": 1}, TypeError, ["return_residual", "True or"]),
    (Q, *PAGES, TWO_LENGTHS, {}, ValueError, ["key_cache", "[*B, S, K, H]", "[6, 32, 2, 16]"]),
    (
        Q,
        array(2, 6, 32, 2, 16),
        PAGES[1],
        TWO_LENGTHS,
        {"page_table": TABLE},
        ValueError,
        ["key_cache", "[pages, page size, K, H]", "page_table", "[2, 6, 32, 2, 16]"],
    ),
    (
        Q,
        PAGES[0],
        array(7, 32, 2, 24),
        TWO_LENGTHS,
        {"page_table": TABLE},
        ValueError,
        ["value_cache", "as many pages as key_cache, 6", "[7, 32, 2, 24]"],
    ),
    (
        Q,
        array(6, 40, 2, 16),
        array(6, 40, 2, 24),
        TWO_LENGTHS,
        {"page_table": TABLE},
        ValueError,
        ["page size", "multiple of 16", "40"],
    ),
    (
        Q,
        array(6, 0, 2, 16),
        array(6, 0, 2, 24),
        TWO_LENGTHS,
        {"page_table": TABLE},
        ValueError,
        ["page size", "multiple of 16", "0"],
    ),
    (
        Q,
        *PAGES,
        TWO_LENGTHS,
        {"page_table": array(3, 3, dtype=jnp.int32)},
        ValueError,
        ["page_table", "[*B, P]", "batch axes [2]", "[3, 3]"],
    ),
    (
        Q,
        *PAGES,
        TWO_LENGTHS,
        {"page_table": array(2, 3)},
        TypeError,
        ["page_table's dtype", "int32"],
    ),
    (
        array(2, 5, 4, 264),
        array(2, 7, 2, 264),
        V,
        TWO_LENGTHS,
        {},
        NotImplementedError,
        ["query's head dim", "at most 256", "264", '"xla"'],
    ),
    (
        Q,
        *PAGES,
        TWO_LENGTHS,
        {"page_table": array(2, 2**23 + 1, dtype=jnp.int32)},
        NotImplementedError,
        ["key_cache length", "at most 268435456", "268435488"],
    ),
]


@pytest.mark.parametrize(
    ("query", "keys", "values", "lengths", "arguments", "kind", "parts"),
    DECODE,
    ids=[f"{i}-{d[-1][0]}" for i, d in enumerate(DECODE)],
)
def test_decoding(query, keys, values, lengths, arguments, kind, parts):
    table = {name: x for name, x in arguments.items() if name == "page_table"}
    static = {name: x for name, x in arguments.items() if name != "page_table"}
    with pytest.raises(kind, match=DECODE_PREFIX) as error:
        jax.eval_shape(
            lambda *x, **table: jax_flash2.decode_attention(*x, **table, **static),
            query,
            keys,
            values,
            lengths,
            **table,
        )
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_what_decoding_accepts(implementation):
    call = functools.partial(
        jax_flash2.decode_attention, implementation=implementation, return_residual=True
    )
    for arguments in ({}, {"page_table": TABLE}):
        caches = PAGES if arguments else (K, V)
        out, lse = jax.eval_shape(call, Q, *caches, TWO_LENGTHS, **arguments)
        assert (out.shape, lse.shape) == ((2, 5, 4, 24), (2, 5, 4))
    out, _ = jax.eval_shape(lambda *x: call(*x, [3, 4], scale=1, local_window_size=3), Q, K, V)
    assert out.dtype == jnp.float32
