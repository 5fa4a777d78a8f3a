"""`ring_attention`: queries stay, keys and values travel around the devices of a mesh axis.

Each device attends to the block of keys that it holds while the next one is on its way, and merges
the results by their log-sum-exp. The backward is a second round, in which dK and dV travel with
their keys. Memory on each device is that of its own tokens.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from jax_flash2 import _checks, _derivative, _ffi, _partition, _sequence
from jax_flash2._attention import checked, kernel_call
from jax_flash2._spec import AttentionSpec


@_checks.speaks_as("ring_attention")
def ring_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    axis_name: str | tuple[str, ...],
    placement: str = "contiguous",
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    precision: str | jax.lax.Precision | None = None,
    backward: str = "auto",
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Exact attention over a sequence that is split over the devices of a mesh axis.

    For use inside `jax.shard_map`, on what one device has: T queries and S keys of a sequence of
    n * T queries and n * S keys, n the size of the axis. The result is `attention`'s on the whole
    sequence, and so are the gradients, in memory linear in T + S. In a round of n steps each
    device sends n - 1 blocks of keys and values to its neighbour, and in the backward n blocks of
    dK and dV, in float32, besides; each is under way while the device computes.

    Args:
      query: [*B, T, N, H], as in `attention`.
      key: [*B, S, K, H].
      value: [*B, S, K, Hv].
      axis_name: the mesh axis, or axes, over which the sequence is split.
      placement: "contiguous": device i of n holds part i of n, as sharding puts it; under a causal
        mask the last device then has about 2n times the work of the first. "zigzag": parts i and
        2n - 1 - i of 2n, the same work on all; `to_zigzag` reorders a sequence so, once, before
        it is sharded.
      scale, precision, backward, return_residual: as in `attention`.
      is_causal: query i of the whole sequence sees key j only if j <= i.
      query_seq_lengths, key_value_seq_lengths: int32 [*B], lengths of the whole sequence, the same
        on each device of the axis.
      local_window_size: as in `attention`, in the whole sequence; placement "contiguous" only. With
        is_causal, keys that no query of the next device sees are not sent further.

    Returns:
      As `attention`: the output [*B, T, N, Hv] of the local queries, and with return_residual their
      log-sum-exp [*B, T, N]. Differentiable in reverse mode.

    Raises:
      ValueError, TypeError, NotImplementedError: as `attention`; also where there is no such axis
      (outside shard_map, say), or the lengths do not suit the placement.

    Source: Liu, Zaharia, Abbeel, "Ring Attention", https://arxiv.org/abs/2310.01889; zigzag as in
    "The Llama 3 Herd of Models", https://arxiv.org/abs/2407.21783, section 3.3.2.
    """
    query, key, value = map(jnp.asarray, (query, key, value))
    ring, factor, lengths = _ring_call(
        query,
        key,
        value,
        axis_name=axis_name,
        placement=placement,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        precision=precision,
        backward=backward,
    )
    return_residual = _checks.flag("return_residual", return_residual)
    call = _partition.in_auto_axes(functools.partial(_padded_ring, ring), query)
    out, lse = call(query if factor == 1 else query * factor, key, value, lengths)
    return (out, lse) if return_residual else out


@dataclasses.dataclass(frozen=True)
class _Ring:
    """The static half of a call."""

    spec: AttentionSpec
    axis: str | tuple[str, ...]
    devices: int
    placement: str
    steps: int  # how many blocks of keys a device attends to, its own first

    def problems(self, step, q, k, lengths):
        own = jax.lax.axis_index(self.axis)
        source = (own - step) % self.devices
        shape = q.shape[:-3], q.shape[-3], k.shape[-3]
        return _sequence.problems(
            self.spec, self.placement, self.devices, shape, own, source, lengths
        )

    def send(self, arrays, by=1):
        """To the device `by` places further on."""
        pairs = [(i, (i + by) % self.devices) for i in range(self.devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, pairs), arrays)

    def round(self, kv, visit, merge):
        """Takes a device's keys and values around: (what stays here, what travels with them).

        visit(step, kv) returns the two for the block of one step; `merge` joins two of the first,
        and the second are added up.
        """
        ahead = self.send(kv) if self.steps > 1 else kv
        here, along = visit(0, kv)

        def visit_next(step, kv, here, along):
            along = self.send(along)  # like the keys, under way while this block is visited
            more_here, more_along = visit(step, kv)
            return merge(here, more_here), jax.tree.map(jnp.add, along, more_along)

        def body(step, carry):
            kv, here, along = carry
            ahead = self.send(kv)
            return ahead, *visit_next(step, kv, here, along)

        if self.steps > 1:
            # A loop, lest a scheduler fetch all blocks first.
            carry = jax.lax.fori_loop(1, self.steps - 1, body, (ahead, here, along))
            here, along = visit_next(self.steps - 1, *carry)
            along = self.send(along, by=1 - self.steps)
        return here, along


def _ring_call(query, key, value, *, axis_name, placement, backward, **arguments):
    """(ring, factor of the query, lengths) of a call, checked."""
    devices = _sequence.axis_size(axis_name)
    arguments = checked(
        query, key, value, query_offset=None, backward=backward, implementation=None, **arguments
    )
    _sequence.check(query, key, devices, placement)
    t, s = query.shape[-3], key.shape[-3]
    window = arguments["local_window_size"]
    if placement == "zigzag" and (window is not None or (arguments["is_causal"] and t != s)):
        name, expected, got = "local_window_size", "None", window
        if window is None:
            name, expected, got = "the length of key", f"query's, {t}, under a causal mask", s
        raise _checks.wrong(
            NotImplementedError,
            name,
            f'{expected} with placement="zigzag"',
            got,
            'Use placement="contiguous", or context_parallel_attention(method="all_to_all").',
        )
    spec, factor, (_, *lengths) = kernel_call(query, backward, None, **arguments)
    steps = _sequence.steps((spec.band_lower, spec.band_upper), devices, t, s)
    return _Ring(spec, axis_name, devices, placement, steps), factor, tuple(lengths)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _padded_ring(ring, query, key, value, lengths):
    """(output [*B, T, N, Hv], LSE [*B, T, N]) for any head dims."""
    operands = *map(_ffi.pad_head_dim, (query, key, value)), lengths
    # Results differ along the axis, be the operands all the same.
    *operands, _ = _partition.vary_alike(*operands, jax.lax.axis_index(ring.axis))
    out, lse = _attention(ring, *operands)
    return out[..., : value.shape[-1]], jnp.swapaxes(lse, -1, -2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(ring, q, k, v, lengths):
    """(out [*B, T, N, Hv], LSE [*B, N, T]) of the local queries."""
    wide = _ffi.stats_dtype(q.dtype)

    def visit(step, kv):
        results = []
        for rows, keys, bounds in ring.problems(step, q, k, lengths):
            local = q[..., rows, :, :], *(x[..., :keys, :, :] for x in kv)
            out, lse = _partition.forward(*local, bounds, ring.spec)
            results.append((out.astype(wide), lse))
        return results, ()

    results, _ = ring.round((k, v), visit, lambda a, b: list(map(_merge, a, b)))
    out, lse = zip(*results, strict=True)
    return jnp.concatenate(out, axis=-3).astype(q.dtype), jnp.concatenate(lse, axis=-1)


def _merge(a, b):
    """Of two disjoint sets of keys, the results for their union."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    largest = jnp.maximum(lse_a, lse_b)
    largest = jnp.where(largest == -jnp.inf, 0, largest)
    a, b = jnp.exp(lse_a - largest), jnp.exp(lse_b - largest)
    some = a + b > 0
    total = jnp.where(some, a + b, 1)
    lse = jnp.where(some, largest + jnp.log(total), -jnp.inf)
    a, b = (jnp.swapaxes(x / total, -1, -2)[..., None] for x in (a, b))
    return a * out_a + b * out_b, lse


def _attention_fwd(ring, q, k, v, lengths):
    results = _attention(ring, q, k, v, lengths)
    out, lse = map(checkpoint_name, results, _derivative.CHECKPOINT_NAMES)
    return (out, lse), (q, k, v, out, lse, lengths)


def _attention_bwd(ring, saved, cotangents):
    # A barrier, lest XLA see the forward's messages again and keep what they brought.
    q, k, v, out, lse, lengths = jax.lax.optimization_barrier(saved)
    dout, dlse = cotangents
    wide = _ffi.stats_dtype(q.dtype)

    def visit(step, kv):
        dq, dkv = [], []
        for rows, keys, bounds in ring.problems(step, q, k, lengths):
            q_, out_, dout_ = (x[..., rows, :, :] for x in (q, out, dout))
            lse_, dlse_ = (x[..., rows] for x in (lse, dlse))
            local = q_, *(x[..., :keys, :, :] for x in kv), out_, lse_, dout_, dlse_
            one_dq, *one_dkv = _derivative.gradients(ring.spec, *local, bounds)
            dq.append(one_dq.astype(wide))
            dkv.append([_lengthen(x.astype(wide), k.shape[-3]) for x in one_dkv])
        return dq, [sum(x) for x in zip(*dkv, strict=True)]

    dq, dkv = ring.round((k, v), visit, functools.partial(jax.tree.map, jnp.add))
    dq = jnp.concatenate(dq, axis=-3)
    return *(x.astype(q.dtype) for x in (dq, *dkv)), None


def _lengthen(x, length):
    """With zeros for the tokens that are missing at the end."""
    missing = length - x.shape[-3]
    return jnp.pad(x, [*[(0, 0)] * (x.ndim - 3), (0, missing), (0, 0), (0, 0)]) if missing else x


_attention.defvjp(_attention_fwd, _attention_bwd)
