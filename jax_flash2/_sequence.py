"""A sequence whose tokens lie on several devices: which lie where, and which see which.

Contiguous: device i of n holds part i of n. Zigzag: parts i and 2n - 1 - i of 2n, in that order, so
that under a causal mask every device has the same work.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash2 import _checks
from jax_flash2._spec import UNBOUNDED

PLACEMENTS = ("contiguous", "zigzag")


@_checks.speaks_as("to_zigzag")
def to_zigzag(x, shards: int, axis: int):
    """Reorders a whole sequence so that equal shards of it, in order, are zigzag.

    For the tokens of a batch, before they are sharded: `to_zigzag(tokens, shards, axis=1)`. Their
    positions move along: `to_zigzag(jnp.arange(T), shards, axis=0)`.

    Args:
      x: an array whose size along `axis` is a multiple of 2 * shards.
      shards: the number of devices along the mesh axis of the sequence.
      axis: the axis of the tokens.

    Returns:
      The array reordered: shard i of n holds parts i and 2n - 1 - i of the 2n parts of x.
    """
    return _reorder(x, _zigzag_order(x, shards, axis), axis)


@_checks.speaks_as("from_zigzag")
def from_zigzag(x, shards: int, axis: int):
    """The inverse of `to_zigzag`: the tokens in the order of the sequence."""
    return _reorder(x, np.argsort(_zigzag_order(x, shards, axis)), axis)


def _zigzag_order(x, shards, axis):
    parts = 2 * shards
    if shards < 1 or x.shape[axis] % parts:
        raise _checks.wrong(
            ValueError, "x", f"of a size along axis {axis} that 2 * {shards} divides", list(x.shape)
        )
    return np.stack([np.arange(shards), parts - 1 - np.arange(shards)], axis=1).reshape(-1)


def _reorder(x, order, axis):
    x = jnp.asarray(x)
    axis %= x.ndim
    parts = x.reshape(*x.shape[:axis], len(order), -1, *x.shape[axis + 1 :])
    return jnp.take(parts, order, axis=axis).reshape(x.shape)


def axis_size(axis_name) -> int:
    """The number of devices along the mesh axis, which a surrounding shard_map must map."""
    try:
        return jax.lax.axis_size(axis_name)
    except NameError:
        mapped = ", ".join(map(repr, jax.sharding.get_abstract_mesh().manual_axes)) or "none"
        raise _checks.wrong(
            ValueError,
            "axis_name",
            f"a mesh axis that a jax.shard_map around the call maps (here: {mapped})",
            repr(axis_name),
        ) from None


def check(query, key, devices, placement):
    """What each device has of query and key suits the placement."""
    _checks.choice("placement", placement, PLACEMENTS)
    for name, x in (("query", query), ("key", key)):
        length = x.shape[-3]
        if devices * length > _checks.MAX_LENGTH:
            raise _checks.wrong(
                NotImplementedError,
                f"the length of {name} on all {devices} devices",
                f"at most {_checks.MAX_LENGTH}",
                devices * length,
            )
        if placement == "zigzag" and length % 2:
            raise _checks.wrong(
                ValueError,
                f"the length of {name} on each device",
                'even with placement="zigzag", two parts of the sequence',
                length,
            )


def steps(band, devices, t, s):
    """How many blocks of keys a device has to meet, from its own backwards.

    In contiguous placement; in zigzag there is no window, hence all. `band` is (lower, upper),
    between which j - i lies for a query i that sees key j.
    """
    lower, upper = band
    if upper != 0 or lower <= -UNBOUNDED or t != s or t == 0:
        return devices
    return min(devices, 1 + -(lower // t))


def problems(spec, placement, devices, shape, own, source, lengths):
    """The attention problems that the queries of device `own` have with the keys of `source`.

    A list of (rows, keys, bounds): a slice of a device's queries; of its keys, how many from the
    first on; int32 [*B, 3] or None, which alone depends on the devices. These may be traced.
    `shape` is (batch axes, T, S) on each device; `lengths` are those of query and key in the whole
    sequence, int32 [*B] or None.
    """
    batch, t, s = shape
    causal = spec.band_upper < UNBOUNDED

    def bounds(*columns):
        columns = [jnp.broadcast_to(jnp.asarray(x, jnp.int32), batch) for x in columns]
        return jnp.stack(columns, axis=-1)

    def unpadded(length, start, size):
        """The number of tokens in [start, start + size) that are below the length."""
        return size if length is None else jnp.clip(length - start, 0, size)

    if placement == "contiguous":
        masked = causal or spec.band_lower > -UNBOUNDED
        t_start, s_start = own * t, source * s
        t_held, s_held = unpadded(lengths[0], t_start, t), unpadded(lengths[1], s_start, s)
        everything = bounds(t_start - s_start, t_held, s_held)
        return [(slice(t), s, everything if masked or any_of(lengths) else None)]

    t_half, s_half, last = t // 2, s // 2, 2 * devices - 1
    t_first = unpadded(lengths[0], own * t_half, t_half)
    t_second = unpadded(lengths[0], (last - own) * t_half, t_half)
    s_first = unpadded(lengths[1], source * s_half, s_half)
    s_both = s_first + unpadded(lengths[1], (last - source) * s_half, s_half)
    if not causal:
        both = bounds(0, t_first + t_second, s_both) if any_of(lengths) else None
        return [(slice(t), s, both)]
    # First parts come before all second parts: a first part of queries sees first parts of keys
    # alone, and a second one all of them.
    ahead = source - own
    return [
        (slice(t_half), t_half, bounds(-ahead * t_half, t_first, s_first)),
        (
            slice(t_half, t),
            t,
            bounds(
                t_half + jnp.maximum(ahead, 0) * t_half,
                t_second,
                jnp.where(ahead < 0, s_first, s_both),
            ),
        ),
    ]


def any_of(lengths):
    return any(x is not None for x in lengths)
