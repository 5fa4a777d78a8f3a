"""The kernels under vmap and over a mesh: what a mapped or sharded call asks of one device.

The one file that knows JAX's machinery for it, which moves between its versions. From the outside
in: custom_vmap, which copies an unmapped operand only where it must; custom_partitioning, by which
each shard is a complete problem of its own; the kernels, on local operands.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import NamedSharding, PartitionSpec

from jax_flash2 import _checks, _ffi
from jax_flash2._spec import UNBOUNDED


def forward(q, k, v, bounds, spec):
    """`_ffi.forward`, mapped and sharded as its operands are."""
    return _mapped_forward(spec)(q, k, v, bounds)


def backward(q, k, v, out, lse, dout, dlse, bounds, spec):
    """`_ffi.backward`, mapped and sharded as its operands are."""
    return _mapped_backward(spec)(q, k, v, out, lse, dout, dlse, bounds)


def in_auto_axes(call, query):
    """`call(query, ...) -> (out, lse [*B, T, N])`; over explicit mesh axes, as query lies."""
    sharding = jax.typeof(query).sharding
    explicit = sharding.mesh.explicit_axes
    if not explicit:
        return call
    if sharding.mesh.manual_axes:  # JAX has no way from there to auto axes
        raise _checks.wrong(
            NotImplementedError,
            "a mesh axis that the shard_map around the call leaves to the compiler",
            "AxisType.Auto",
            f"{', '.join(map(repr, explicit))} of AxisType.Explicit",
            "Map it too (axis_names), or give the mesh axis_types=AxisType.Auto.",
        )
    axes = (*sharding.spec, *[None] * (query.ndim - len(sharding.spec)))[:-1]
    out = NamedSharding(sharding.mesh, PartitionSpec(*axes, None))
    lse = NamedSharding(sharding.mesh, PartitionSpec(*axes))
    return jax.sharding.auto_axes(call, out_sharding=(out, lse))


def vary_alike(*operands):
    """Under shard_map(check_vma=True): all vary over what one of them varies over.

    For outside the custom derivative: the sum over a replicated operand's copies is this cast's
    transpose.
    """
    axes = _varying(*operands)

    def cast(x):
        missing = tuple(sorted(axes - _varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, operands)


def _varying(*operands):
    """The manual mesh axes over which some operand differs; a field that jax 0.11 renamed."""
    axes = set()
    for x in jax.tree.leaves(operands):
        aval = jax.typeof(x)
        manual = getattr(aval, "manual_axis_type", None)
        axes |= set(aval.vma if manual is None else manual.varying)
    return axes


def on_devices(sharded, spec, *operands):
    """Inside shard_map operands are local already. Partly manual too: custom_partitioning fails."""
    operands = _ffi.guard(operands, spec)
    if not jax.sharding.get_abstract_mesh().manual_axes:
        # The program names the spec, which is otherwise in the callback of the partitioner alone: a
        # compile cache that ignores the callback's address must not take one call for another.
        with set_xla_metadata(jax_flash2=repr(spec)):
            return sharded(spec, *operands)
    results = sharded.fun(spec, *operands)
    axes = tuple(sorted(_varying(*operands)))
    return jax.lax.pcast(results, axes, to="varying") if axes else results


@functools.cache
def _mapped_forward(spec):
    @custom_vmap
    def call(q, k, v, bounds):
        """Leading axes that q has and the rest lacks share keys, values and bounds."""
        return on_devices(_sharded_forward, spec, *present(q, k, v, bounds))

    @call.def_vmap
    def rule(size, mapped, q, k, v, bounds):
        if not any(mapped[1:]):
            return call(q, k, v, bounds), (True, True)
        # The new axis becomes a batch axis, behind those of q alone.
        q, *rest = (broadcast(size, m, x) for m, x in zip(mapped, (q, k, v, bounds), strict=True))
        shared = q.ndim - rest[0].ndim
        results = call(jnp.moveaxis(q, 0, shared), *rest)
        return tuple(jnp.moveaxis(x, shared, 0) for x in results), (True, True)

    return call


@functools.cache
def _mapped_backward(spec):
    @custom_vmap
    def call(*operands):
        return on_devices(_sharded_backward, spec, *present(*operands))

    @call.def_vmap
    def rule(size, mapped, *operands):
        # Each element has gradients of its own for unmapped keys too, as large as copies of them.
        operands = [broadcast(size, m, x) for m, x in zip(mapped, operands, strict=True)]
        return call(*operands), (True, True, True)

    return call


def present(*operands):
    return [x for x in operands if x is not None]


def broadcast(size, mapped, x):
    return x if mapped or x is None else jnp.broadcast_to(x, (size, *x.shape))


def _local_forward(spec, q, k, v, *bounds):
    """(out, lse) on one device, for q with leading axes that k, v and bounds lack."""
    bounds = bounds[0] if bounds else None
    shared = q.shape[: q.ndim - k.ndim]
    if not shared:
        return _ffi.forward(q, k, v, bounds, spec)
    *batch, t, n, h = q.shape[len(shared) :]
    s, kv_heads = k.shape[-3:-1]
    if t * n > s * kv_heads:  # copies of the keys and values are smaller than q
        rest = (
            x if x is None else jnp.broadcast_to(x, (*shared, *x.shape)) for x in (k, v, bounds)
        )
        return _ffi.forward(q, *rest, spec)
    # More query heads of the same key/value heads.
    size, group = math.prod(shared), n // kv_heads
    q = jnp.moveaxis(q.reshape(size, *batch, t, kv_heads, group, h), 0, -3)
    out, lse = _ffi.forward(q.reshape(*batch, t, size * n, h), k, v, bounds, spec)
    out = jnp.moveaxis(out.reshape(*batch, t, kv_heads, size, group, -1), -3, 0)
    lse = jnp.moveaxis(lse.reshape(*batch, kv_heads, size, group, t), -3, 0)
    return out.reshape(*shared, *batch, t, n, -1), lse.reshape(*shared, *batch, n, t)


def _local_backward(spec, q, k, v, out, lse, dout, dlse, *bounds):
    bounds = bounds[0] if bounds else None
    return _ffi.backward(q, k, v, out, lse, dout, dlse, bounds, spec)


class Placement:
    """Where a call's operands lie: batch, tokens of q and heads as q's (or out's) sharding says.

    Everything else is whole on every device, hence gathered if it was not. So are key/value heads
    that the axis of the query heads does not divide: each shard then picks those of its own heads.
    """

    def __init__(self, mesh, like, q, k):
        entries = (*like.sharding.spec, *[None] * (len(like.shape) - len(like.sharding.spec)))
        axes = [_dividing(mesh, e, size) for e, size in zip(entries, like.shape, strict=True)]
        *self.lead, self.tokens, self.heads, _ = axes
        self.mesh = mesh
        self.kv_shape, self.length = k.shape, q.shape[-3]
        self.group = q.shape[-2] // k.shape[-2]
        self.batch = self.lead[len(q.shape) - len(k.shape) :]
        self.kv_heads = _dividing(mesh, self.heads, k.shape[-2])
        self.picks = self.kv_heads != self.heads

    def shardings(self, names):
        """Of operands or results: "q" [.., T, N, H], "k" [.., S, K, H], "lse", "bounds"."""
        specs = {
            "q": (*self.lead, self.tokens, self.heads, None),
            "k": (*self.batch, None, self.kv_heads, None),
            "lse": (*self.lead, self.heads, self.tokens),
            "bounds": (*self.batch, None),
        }
        return self.named(specs[name] for name in names)

    def named(self, specs):
        return tuple(NamedSharding(self.mesh, PartitionSpec(*spec)) for spec in specs)

    def own_heads(self, q):
        """For each query head of this shard the key/value head that it reads; one if all agree."""
        n = q.shape[-2]
        heads = (jax.lax.axis_index(self.heads) * n + jnp.arange(n)) // self.group
        return heads[:1] if self.group % n == 0 else heads

    def pick(self, q, x):
        return jnp.take(x, self.own_heads(q), axis=-2) if self.picks else x

    def bounds(self, spec, q, k, bounds):
        """A shard's first query is not query 0."""
        unmasked = spec.band_lower <= -UNBOUNDED and spec.band_upper >= UNBOUNDED
        if not self.tokens or (unmasked and not bounds):
            return bounds
        if bounds:
            offset, length, kv_length = jnp.moveaxis(bounds[0], -1, 0)
        else:
            full = functools.partial(jnp.full, k.shape[:-3], dtype=jnp.int32)
            offset, length, kv_length = full(0), full(self.length), full(k.shape[-3])
        start = jax.lax.axis_index(self.tokens) * q.shape[-3]
        length = jnp.clip(length - start, 0, q.shape[-3])
        return [jnp.stack([offset + start, length, kv_length], axis=-1)]

    def total(self, q, dk):
        """A key's gradient, over the shards that read it."""
        axes = self.tokens or ()
        if self.picks:
            axes = (*axes, *self.heads)
            whole = jnp.zeros((*dk.shape[:-2], self.kv_shape[-2], dk.shape[-1]), dk.dtype)
            dk = whole.at[..., self.own_heads(q), :].add(dk)
        return jax.lax.psum(dk, axes) if axes else dk


def _dividing(mesh, entry, size):
    """The entry of a PartitionSpec as a tuple of axes; None where they do not divide the size."""
    axes = (entry,) if isinstance(entry, str) else entry
    parts = math.prod(mesh.shape[a] for a in axes or ())
    return axes if parts > 1 and size % parts == 0 else None


def _partition_forward(spec, mesh, operands, results):
    q, k, *_ = operands
    placement = Placement(mesh, results[0], q, k)

    def local(q, k, v, *bounds):
        with no_mesh():
            k, v = placement.pick(q, k), placement.pick(q, v)
            return _local_forward(spec, q, k, v, *placement.bounds(spec, q, k, bounds))

    names = ("q", "k", "k", "bounds")[: len(operands)]
    return mesh, local, placement.shardings(("q", "lse")), placement.shardings(names)


def _partition_backward(spec, mesh, operands, results):
    q, k, *_ = operands
    placement = Placement(mesh, results[0], q, k)

    def local(q, k, v, out, lse, dout, dlse, *bounds):
        with no_mesh():
            k, v = placement.pick(q, k), placement.pick(q, v)
            bounds = placement.bounds(spec, q, k, bounds)
            dq, dk, dv = _local_backward(spec, q, k, v, out, lse, dout, dlse, *bounds)
            return dq, placement.total(q, dk), placement.total(q, dv)

    names = ("q", "k", "k", "q", "lse", "q", "lse", "bounds")[: len(operands)]
    return mesh, local, placement.shardings(("q", "k", "k")), placement.shardings(names)


def no_mesh():
    """Local operands have no mesh: for what is traced while a program is partitioned."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def _rule(names, spec, mesh, operands, results):
    """Shardy's rule: which axes of operands and results go together, and which stay whole."""
    (*_, n, _), (*_, kv_heads, _) = operands[0].shape, operands[1].shape
    batch = [f"b{i}" for i in range(len(operands[1].shape) - 3)]
    lead = [f"x{i}" for i in range(len(operands[0].shape) - len(operands[1].shape))] + batch
    head = "n" if n == kv_heads else "k"
    factors = {
        "q": [*lead, "t", "n", "h"],
        "k": [*batch, "s", head, "h"],
        "v": [*batch, "s", head, "d"],
        "out": [*lead, "t", "n", "d"],
        "lse": [*lead, "n", "t"],
        "bounds": [*batch, "c"],
    }

    def text(names):
        return ", ".join(" ".join(factors[name]) for name in names)

    inputs = names[0][: len(operands)]
    whole = ("h", "s", "d", "c")[: 4 if "bounds" in inputs else 3]
    return f"{text(inputs)} -> {text(names[1])}", {"need_replication_factors": whole}


_sharded_forward = custom_partitioning(_local_forward, static_argnums=(0,))
_sharded_forward.def_partition(
    _partition_forward,
    sharding_rule=functools.partial(_rule, (("q", "k", "v", "bounds"), ("out", "lse"))),
)
_sharded_backward = custom_partitioning(_local_backward, static_argnums=(0,))
_sharded_backward.def_partition(
    _partition_backward,
    sharding_rule=functools.partial(
        _rule, (("q", "k", "v", "out", "lse", "out", "lse", "bounds"), ("q", "k", "v"))
    ),
)
