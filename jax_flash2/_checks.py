"""What a call may be: types, shapes, dtypes and combinations, told in one form of message."""

import contextvars
import functools
import math
import numbers
import operator

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = ("float16", "bfloat16", "float32", "float64")
# Sums of a position, an offset and a window have to fit an int32 (cuda/core/mask.h).
MAX_LENGTH = 2**28
MAX_OFFSET = 2**29
MAX_WINDOW = 2**30
PAGE_MULTIPLE = 16
_caller = contextvars.ContextVar("caller", default="attention")


def speaks_as(name):
    """Decorates a public function: what is wrong inside it is told in its name."""

    def decorate(function):
        @functools.wraps(function)
        def named(*args, **kwargs):
            token = _caller.set(name)
            try:
                return function(*args, **kwargs)
            finally:
                _caller.reset(token)

        return named

    return decorate


def wrong(kind, name, expected, got, way_out=""):
    """The one form: which argument, what it should be, what it is, what to do."""
    message = f"jax_flash2.{_caller.get()}: {name} should be {expected}, got {got}."
    return kind(f"{message} {way_out}" if way_out else message)


def describe(x) -> str:
    if isinstance(x, jax.core.Tracer):
        return f"a traced {x.dtype}{list(x.shape)}"
    if isinstance(x, (jax.Array, np.ndarray)):
        return f"{x.dtype}{list(x.shape)}"
    return repr(x)


def arrays(query, key, value, names=("key", "value")):
    """Query [*B, T, N, H], key [*B, S, K, H], value [*B, S, K, Hv] of one dtype, N % K == 0."""
    _dtypes(query, key, value, names)
    batch = list(query.shape[:-3])
    for name, x, tail in zip(names, (key, value), ("S, K, H", "S, K, Hv"), strict=True):
        if x.ndim != query.ndim or list(x.shape[:-3]) != batch:
            raise wrong(
                ValueError, name, f"[*B, {tail}] with query's batch axes {batch}", list(x.shape)
            )
    _heads(query, key, value, names)


def paged_arrays(query, key, value, page_table, names):
    """As `arrays`, but key [pages, page size, K, H], value [pages, page size, K, Hv] and an int32
    table [*B, P]; returns the table as an array."""
    _dtypes(query, key, value, names)
    for name, x, last in zip(names, (key, value), ("H", "Hv"), strict=True):
        if x.ndim != 4:
            expected = f"[pages, page size, K, {last}], since there is a page_table"
            raise wrong(ValueError, name, expected, list(x.shape))
    if value.shape[0] != key.shape[0]:
        expected = f"of as many pages as {names[0]}, {key.shape[0]}"
        raise wrong(ValueError, names[1], expected, list(value.shape))
    _heads(query, key, value, names)
    if key.shape[1] < 1 or key.shape[1] % PAGE_MULTIPLE:
        raise wrong(ValueError, "the page size", f"a multiple of {PAGE_MULTIPLE}", key.shape[1])
    page_table = _int32("page_table", page_table)
    batch = list(query.shape[:-3])
    if page_table.ndim != len(batch) + 1 or list(page_table.shape[:-1]) != batch:
        expected = f"[*B, P] with query's batch axes {batch}"
        raise wrong(ValueError, "page_table", expected, list(page_table.shape))
    return page_table


def _dtypes(query, key, value, names):
    for name, x in zip(("query", *names), (query, key, value), strict=True):
        if x.dtype.name not in DTYPES:
            raise wrong(TypeError, f"{name}'s dtype", f"one of {', '.join(DTYPES)}", x.dtype.name)
    for name, x in zip(names, (key, value), strict=True):
        if x.dtype != query.dtype:
            raise wrong(
                TypeError,
                f"{name}'s dtype",
                f"query's, {query.dtype.name}",
                x.dtype.name,
                f"Cast it: {name}.astype(query.dtype).",
            )
    if query.ndim < 3:
        raise wrong(ValueError, "query", "[*B, T, N, H]", list(query.shape))


def _heads(query, key, value, names):
    """Lengths, heads and head dims that go together."""
    key_name, value_name = names
    heads, head_dim = query.shape[-2:]
    length, kv_heads = key.shape[-3:-1]
    if key.shape[-1] != head_dim:
        raise wrong(ValueError, f"{key_name}'s head dim", f"query's, {head_dim}", key.shape[-1])
    if value.shape[-3:-1] != (length, kv_heads):
        raise wrong(
            ValueError,
            value_name,
            f"as long and of as many heads as {key_name}, [.., {length}, {kv_heads}, Hv]",
            list(value.shape),
        )
    for name, size in (
        ("query's head dim", head_dim),
        (f"{value_name}'s head dim", value.shape[-1]),
        ("the number of query heads", heads),
        ("the number of key heads", kv_heads),
    ):
        if size < 1:
            raise wrong(ValueError, name, "at least 1", size)
    if heads % kv_heads:
        raise wrong(
            ValueError,
            "the number of query heads",
            f"a multiple of the number of key heads, {kv_heads}",
            heads,
        )


def limits(query, key, value, max_head_dim, names=("key", "value"), page_table=None):
    """What the kernels of this build take; the plain definition has no such bounds."""
    length = key.shape[-3] * (1 if page_table is None else page_table.shape[-1])
    way_out = 'implementation="xla" has no such limit.'
    for name, size, limit in (
        ("query's head dim", query.shape[-1], max_head_dim),
        (f"{names[1]}'s head dim", value.shape[-1], max_head_dim),
        ("the query length", query.shape[-3], MAX_LENGTH),
        (f"the {names[0]} length", length, MAX_LENGTH),
    ):
        # Where jax.export leaves a length open, the handlers see it first.
        if isinstance(size, int) and size > limit:
            raise wrong(NotImplementedError, name, f"at most {limit}", size, way_out)


def scale(x, default):
    """A finite Python number."""
    if x is None:
        return default
    if isinstance(x, jax.core.Tracer):
        raise wrong(
            TypeError,
            "scale",
            "a Python number",
            describe(x),
            "It is compiled into the kernels: multiply query by a traced factor instead.",
        )
    try:
        number = float(None if isinstance(x, str) else x)
    except (TypeError, ValueError):
        raise wrong(TypeError, "scale", "a Python number", describe(x)) from None
    if not math.isfinite(number):
        raise wrong(ValueError, "scale", "finite", number)
    return number


def flag(name, x) -> bool:
    if not isinstance(x, (bool, np.bool_)):
        raise wrong(TypeError, name, "True or False", describe(x))
    return bool(x)


def choice(name, x, allowed, way_out=""):
    if not (x is None or isinstance(x, str)) or x not in allowed:
        raise wrong(
            ValueError, name, "one of " + ", ".join(map(repr, allowed)), describe(x), way_out
        )
    return x


def precision(x):
    """None or what jax.lax.Precision knows; the default for float32 products, as in JAX."""
    try:
        return None if x is None else jax.lax.Precision(x)
    except ValueError:
        raise wrong(
            ValueError,
            "precision",
            'None, "default", "high", "highest" or a jax.lax.Precision',
            describe(x),
        ) from None


def window(x) -> tuple[int, int] | None:
    """local_window_size as (left, right), both at least 0, or None."""
    if x is None:
        return None
    pair = x if isinstance(x, (tuple, list)) else (x, x)
    if len(pair) != 2 or not all(_is_static_int(w) for w in pair):
        raise wrong(
            TypeError, "local_window_size", "an int or a pair of ints (left, right)", describe(x)
        )
    left, right = (min(operator.index(w), MAX_WINDOW) for w in pair)  # beyond it, all the same
    if left < 0 or right < 0:
        raise wrong(
            ValueError,
            "local_window_size",
            "at least 0 on both sides",
            describe(x),
            "For a side without a limit give the length of the sequence.",
        )
    return left, right


def query_offset(x, batch):
    """A Python int (static) or an int32 array over the batch axes (traced)."""
    if x is None:
        return 0
    if _is_static_int(x):
        if abs(x) > MAX_OFFSET:
            raise wrong(ValueError, "query_offset", f"at most {MAX_OFFSET} away from 0", x)
        return operator.index(x)
    if isinstance(x, (bool, np.bool_, numbers.Number, str)):
        raise wrong(TypeError, "query_offset", "None, an int or an int32 array", describe(x))
    x = _int32("query_offset", x)
    return _over_batch("query_offset", x, batch, also_scalar=True)


def lengths(name, x, batch):
    """None, or an int32 array over the batch axes."""
    return None if x is None else _over_batch(name, _int32(name, x), batch, also_scalar=False)


def required_lengths(name, x, batch):
    if x is None:
        raise wrong(TypeError, name, f"int32 over query's batch axes {list(batch)}", "None")
    return lengths(name, x, batch)


def _is_static_int(x) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def _int32(name, x):
    x = jnp.asarray(x)
    if x.dtype != jnp.int32:
        raise wrong(
            TypeError,
            f"{name}'s dtype",
            "int32",
            x.dtype.name,
            f"Cast it: {name}.astype(jnp.int32).",
        )
    return x


def _over_batch(name, x, batch, also_scalar):
    if also_scalar and x.ndim == 0:
        return jnp.broadcast_to(x, batch)
    if x.shape == (1,) and batch == ():
        return x.reshape(())  # jax.nn counts an input without a batch axis as a batch of one
    if x.shape != batch:
        raise wrong(ValueError, name, f"of query's batch axes {list(batch)}", list(x.shape))
    return x
