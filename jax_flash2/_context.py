"""`context_parallel_attention`: a sequence over several devices, by a ring or by all-to-all."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_flash2 import _checks, _partition, _sequence
from jax_flash2._attention import attention
from jax_flash2._ring import ring_attention
from jax_flash2._spec import band

METHODS = ("ring", "all_to_all")


class ContextParallelMethod(NamedTuple):
    """What `context_parallel_method` returns."""

    method: str
    """"ring" or "all_to_all"."""
    reason: str
    """Why this one."""


@_checks.speaks_as("context_parallel_attention")
def context_parallel_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    axis_name: str | tuple[str, ...],
    method: str = "auto",
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
    """Exact attention over a split sequence, by `ring_attention` or by all-to-all.

    By all-to-all each device gets the whole sequence for its share of the heads, computes
    `attention`, and sends the outputs back where their queries lie.

    Args:
      method: "ring"; "all_to_all": the axis has to divide the number of query heads, and key/value
        heads are repeated where it does not divide theirs; "auto": what `context_parallel_method`
        says. In profiles the call's scope is jax_flash2_ring or jax_flash2_all_to_all.
      The others are those of `ring_attention`; by all-to-all every placement takes every mask.

    Returns and raises what `ring_attention` does.

    Source: Jacobs et al., "DeepSpeed Ulysses", https://arxiv.org/abs/2309.14509, section 3.1.
    """
    query, key, value = map(jnp.asarray, (query, key, value))
    devices = _sequence.axis_size(axis_name)
    _checks.arrays(query, key, value)
    _sequence.check(query, key, devices, placement)
    _checks.choice("method", method, ("auto", *METHODS))
    return_residual = _checks.flag("return_residual", return_residual)
    if method == "auto":
        method, _ = context_parallel_method(
            query,
            key,
            devices,
            placement=placement,
            is_causal=is_causal,
            local_window_size=local_window_size,
        )
    elif method == "all_to_all" and query.shape[-2] % devices:
        raise _checks.wrong(
            ValueError,
            "the number of query heads",
            f"a multiple of the {devices} devices of the axis for method='all_to_all'",
            query.shape[-2],
            "Use method='ring'.",
        )
    arguments = {
        "scale": scale,
        "is_causal": is_causal,
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
        "local_window_size": local_window_size,
        "precision": precision,
        "backward": backward,
        "return_residual": return_residual,
    }
    # The function inside the decorator: its errors are told in this one's name.
    call = ring_attention.__wrapped__ if method == "ring" else _all_to_all
    with jax.named_scope(f"jax_flash2_{method}"):
        return call(query, key, value, axis_name=axis_name, placement=placement, **arguments)


@_checks.speaks_as("context_parallel_method")
def context_parallel_method(
    query,
    key,
    devices: int,
    *,
    placement: str = "contiguous",
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
) -> ContextParallelMethod:
    """What `context_parallel_attention` does by itself, and why; computes nothing.

    "all_to_all" if the axis divides the query heads, and it sends no more than the ring, or the
    ring would leave devices without work. That is so in contiguous placement under a causal mask.

    Args:
      query, key: what each device has, [*B, T, N, H] and [*B, S, K, H]; only their shapes count, so
        that a jax.ShapeDtypeStruct will do.
      devices: the size of the mesh axis.
      placement, is_causal, local_window_size: as in the call.
    """
    _checks.choice("placement", placement, _sequence.PLACEMENTS)
    (t, heads), (s, kv_heads) = query.shape[-3:-1], key.shape[-3:-1]
    window = _checks.window(local_window_size)
    if devices == 1:
        return ContextParallelMethod("all_to_all", "there is one device")
    if heads % devices:
        return ContextParallelMethod("ring", f"{devices} devices do not divide {heads} query heads")
    if placement == "zigzag" and window is not None:
        return ContextParallelMethod("all_to_all", "a ring takes no window in zigzag placement")
    if placement == "zigzag" and is_causal and t != s:
        reason = "a ring in zigzag placement takes no causal mask between different lengths"
        return ContextParallelMethod("all_to_all", reason)
    if placement == "contiguous" and is_causal and window is None:
        reason = "a ring's causal work is unbalanced in contiguous placement"
        return ContextParallelMethod("all_to_all", reason)
    steps = _sequence.steps(band(is_causal, window, 0), devices, t, s)
    # In the forward, heads of one token: queries, outputs and (repeated) keys and values once to
    # their device, against keys and values to every device that they meet.
    across = 2 * (heads + math.lcm(kv_heads, devices)) * (devices - 1) / devices
    around = 2 * kv_heads * (steps - 1)
    if across <= around:
        reason = f"each token sends {across:g} heads; around a ring it would send {around}"
        return ContextParallelMethod("all_to_all", reason)
    reason = f"each token sends {around} heads; by all-to-all it would send {across:g}"
    return ContextParallelMethod("ring", reason)


def _all_to_all(query, key, value, *, axis_name, placement, return_residual, **arguments):
    devices = _sequence.axis_size(axis_name)
    repeats = math.lcm(key.shape[-2], devices) // key.shape[-2]
    key, value = (jnp.repeat(x, repeats, axis=-2) for x in (key, value))
    own = jax.lax.axis_index(axis_name)
    query, key, value, _ = _partition.vary_alike(query, key, value, own)
    tokens, heads = query.ndim - 3, query.ndim - 2
    zigzag = placement == "zigzag"

    def whole_sequence(x):
        x = jax.lax.all_to_all(x, axis_name, heads, tokens, tiled=True)
        return _sequence.from_zigzag(x, devices, tokens) if zigzag else x

    def all_heads(x):
        x = _sequence.to_zigzag(x, devices, tokens) if zigzag else x
        return jax.lax.all_to_all(x, axis_name, tokens, heads, tiled=True)

    results = attention(
        *map(whole_sequence, (query, key, value)), return_residual=True, **arguments
    )
    out, lse = map(all_heads, results)
    return (out, lse) if return_residual else out
