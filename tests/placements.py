"""Eight CPU devices: meshes, random operands, and what a compiled program communicates."""

import collections
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

COLLECTIVE = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def normal(*shape, seed, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def mesh_of(kind=AxisType.Auto, **axes):
    """A mesh of CPU devices with the named axes, `mesh_of(data=2, seq=4)`."""
    sizes, kinds = tuple(axes.values()), (kind,) * len(axes)
    devices = jax.devices("cpu")[: math.prod(sizes)]
    return jax.make_mesh(sizes, tuple(axes), axis_types=kinds, devices=devices)


def collectives(compiled):
    """{kind: how often it stands in the program}; a loop's body stands there once."""
    return collections.Counter(re.findall(COLLECTIVE, compiled.as_text()))


def total(out, lse):
    """A number that depends on both results, finite where a row sees nothing."""
    seen = lse > -jnp.inf
    weights = jnp.arange(out.shape[-1])
    return (jnp.sin(out.astype(jnp.float32)) * weights).sum() + jnp.where(
        seen, jnp.cos(jnp.where(seen, lse, 0)), 0
    ).sum()


def assert_close(got, expected, tolerance=2e-5):
    """Leaf by leaf; the tolerance is relative to the largest number of a leaf."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        size = np.abs(y[np.isfinite(y)]).max(initial=1)
        np.testing.assert_allclose(x, y, tolerance, tolerance * size)
