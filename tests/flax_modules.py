"""What the tests of both Flax modules share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

BATCH, T, WIDTH = 2, 12, 32


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def run(module, *inputs, **call):
    """The call as one compiled program; the module's state stays as it is."""
    return jax.jit(lambda: module(*inputs, **call))()


def assert_close(got, expected, tolerance=1e-5):
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(close, got, expected)


def nnx_step(module, **call):
    """step(params, cache, x) -> (output, cache) of a module in decode, and its two operands."""
    graph, params, cache = nnx.split(module, nnx.Param, nnx.Cache)

    def step(params, cache, x):
        module = nnx.merge(graph, params, cache)
        return module(x, decode=True, **call), nnx.state(module, nnx.Cache)

    return step, params, cache


def in_chunks(chunks, step, params, cache, x):
    """The outputs of the chunks, one after the other; the cache in the end; the programs' texts."""
    step = jax.jit(step, donate_argnums=1)
    outs, programs = [], {}
    for start, end in zip(np.cumsum([0, *chunks]), np.cumsum(chunks), strict=False):
        new = x[:, start:end]
        if end - start not in programs:
            programs[end - start] = step.lower(params, cache, new).compile()
        out, cache = programs[end - start](params, cache, new)
        outs.append(out)
    texts = [program.as_text() for program in programs.values()]
    return jnp.concatenate(outs, axis=1), cache, texts
