"""Decoding under vmap and over a mesh: what _partition.py is for attention, built of its parts."""

import functools

import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning

from jax_flash2 import _ffi, _partition


def decode(q, k, v, lengths, page_table, spec):
    """`_ffi.decode`, mapped and sharded as its operands are."""
    return _mapped(spec)(q, k, v, lengths, page_table)


@functools.cache
def _mapped(spec):
    @custom_vmap
    def call(*operands):
        return _partition.on_devices(_sharded, spec, *_partition.present(*operands))

    @call.def_vmap
    def rule(size, mapped, q, k, v, lengths, page_table):
        if not any(mapped[1:]):
            return _more_heads(call, q, k, v, lengths, page_table), (True, True)
        broadcast = functools.partial(_partition.broadcast, size)
        q, lengths = broadcast(mapped[0], q), broadcast(mapped[3], lengths)
        if page_table is None:
            k, v = broadcast(mapped[1], k), broadcast(mapped[2], v)
        else:
            page_table = broadcast(mapped[4], page_table)
            if mapped[1] or mapped[2]:  # else one pool of pages serves all
                k, v = broadcast(mapped[1], k), broadcast(mapped[2], v)
                k, v, page_table = _one_pool(k, v, page_table)
        return call(q, k, v, lengths, page_table), (True, True)

    return call


def _more_heads(call, q, k, v, lengths, page_table):
    """Queries that share keys and lengths: more query heads of the same key/value heads."""
    size, *batch, t, n, h = q.shape
    kv_heads = k.shape[-2]
    q = jnp.moveaxis(q.reshape(size, *batch, t, kv_heads, n // kv_heads, h), 0, -3)
    out, lse = call(q.reshape(*batch, t, size * n, h), k, v, lengths, page_table)
    out = jnp.moveaxis(out.reshape(*batch, t, kv_heads, size, n // kv_heads, -1), -3, 0)
    lse = jnp.moveaxis(lse.reshape(*batch, kv_heads, size, n // kv_heads, t), -3, 0)
    return out.reshape(size, *batch, t, n, -1), lse.reshape(size, *batch, n, t)


def _one_pool(k, v, page_table):
    """Pools of pages, one an element of the mapped axis, as one."""
    size, pages = k.shape[:2]
    first = pages * jnp.arange(size, dtype=jnp.int32)
    first = first.reshape(size, *[1] * (page_table.ndim - 1))
    page_table = jnp.where((page_table >= 0) & (page_table < pages), first + page_table, -1)
    k, v = (x.reshape(size * pages, *x.shape[2:]) for x in (k, v))
    return k, v, page_table


def _local(spec, q, k, v, lengths, *page_table):
    return _ffi.decode(q, k, v, lengths, *page_table or (None,), spec)


class _Placement(_partition.Placement):
    """Batch and heads lie as the query's do; tokens, and pages, are whole on every device."""

    def __init__(self, mesh, like, q, k, paged):
        super().__init__(mesh, like, q, k)
        self.batch, self.tokens, self.paged = self.lead, None, paged

    def shardings(self, names):
        specs = {
            "q": (*self.lead, None, self.heads, None),
            "k": (*([None] if self.paged else self.lead), None, self.kv_heads, None),
            "lse": (*self.lead, self.heads, None),
            "lengths": self.lead,
            "page_table": (*self.lead, None),
        }
        return self.named(specs[name] for name in names)


def _partition_call(spec, mesh, operands, results):
    q, k, *_ = operands
    placement = _Placement(mesh, results[0], q, k, paged=len(operands) == 5)

    def local(q, k, v, *rest):
        with _partition.no_mesh():
            return _local(spec, q, placement.pick(q, k), placement.pick(q, v), *rest)

    names = ("q", "k", "k", "lengths", "page_table")[: len(operands)]
    return mesh, local, placement.shardings(("q", "lse")), placement.shardings(names)


def _rule(spec, mesh, operands, results):
    """Shardy's rule: batch and heads go together, all else stays whole."""
    q, k, *_ = operands
    batch = [f"b{i}" for i in range(len(q.shape) - 3)]
    head = "n" if q.shape[-2] == k.shape[-2] else "k"
    paged = len(operands) == 5
    cache = ["p"] if paged else batch
    inputs = [
        [*batch, "t", "n", "h"],
        [*cache, "s", head, "h"],
        [*cache, "s", head, "d"],
        batch,
        *([[*batch, "c"]] if paged else []),
    ]
    outputs = [[*batch, "t", "n", "d"], [*batch, "n", "t"]]
    texts = (", ".join(" ".join(factors) for factors in x) for x in (inputs, outputs))
    whole = ("t", "h", *(("p",) if paged else ()), "s", "d", *(("c",) if paged else ()))
    return " -> ".join(texts), {"need_replication_factors": whole}


_sharded = custom_partitioning(_local, static_argnums=(0,))
_sharded.def_partition(_partition_call, sharding_rule=_rule)
