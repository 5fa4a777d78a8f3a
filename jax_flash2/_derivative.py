"""Attention as a differentiable function of local layouts: what JAX's transformations see of it.

The first derivative in reverse mode is the kernels' backward. Every other one, forward mode and
derivatives of derivatives, is that of the definition in _reference.py, in O(T * S) memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_flash2 import _partition, _reference
from jax_flash2._spec import AttentionSpec

# What the forward saves for the backward beyond its inputs. Saving both by name, with
# jax.checkpoint_policies.save_only_these_names(*CHECKPOINT_NAMES), spares the second forward.
CHECKPOINT_NAMES = ("jax_flash2_out", "jax_flash2_lse")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attention(spec: AttentionSpec, q, k, v, bounds):
    """(out [*B, T, N, Hv], LSE [*B, N, T]), differentiable in both; bounds None or int32 [*B, 3].

    Head dims as the kernels take them; all operands vary over the same manual mesh axes.
    """
    return _partition.forward(q, k, v, bounds, spec)


@attention.defjvp
def _attention_jvp(spec, primals, tangents):
    # Named here, and returned as they are saved: then a policy that saves them spares the kernel.
    out, lse = map(checkpoint_name, attention(spec, *primals), CHECKPOINT_NAMES)
    q, k, v, bounds = primals
    saved = (q, k, v, out, lse, *(() if bounds is None else (bounds,)))
    return (out, lse), tuple(_tangent.bind(*tangents[:3], *saved, spec=spec))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def gradients(spec: AttentionSpec, q, k, v, out, lse, dout, dlse, bounds):
    """(dq, dk, dv) from the cotangents of out and LSE, by the kernels; differentiable too."""
    return _partition.backward(q, k, v, out, lse, dout, dlse, bounds, spec)


@gradients.defjvp
def _gradients_jvp(spec, primals, tangents):
    *arrays, bounds = primals

    def by_definition(q, k, v, out, lse, dout, dlse):
        lse, dlse = (jnp.swapaxes(x, -1, -2) for x in (lse, dlse))
        call = _by_definition(_reference.gradients, spec, bounds)
        return call(q, k, v, out, lse, dout, dlse)

    return gradients(spec, *primals), jax.jvp(by_definition, tuple(arrays), tangents[:-1])[1]


def _by_definition(function, spec, bounds):
    """A function of _reference.py as the spec and the bounds ask for it."""
    if bounds is None:
        traced = {}
    else:
        names = ("query_offset", "query_seq_lengths", "key_value_seq_lengths")
        traced = dict(zip(names, jnp.moveaxis(bounds, -1, 0), strict=True))
    return functools.partial(
        function,
        scale=spec.scale,
        local_window_size=(-spec.band_lower, spec.band_upper),
        precision=spec.precision,
        **traced,
    )


# The derivative of `attention` as a linear function of the tangents of q, k and v. Forward mode
# evaluates it, by the definition; reverse mode transposes it, by the kernels' backward.
# Under vmap an operand that is not mapped gets an axis of one instead of copies.
_tangent = Primitive("jax_flash2_tangent")
_tangent.multiple_results = True


def _evaluate(dq, dk, dv, q, k, v, out, lse, *bounds, spec):
    dq, dk, dv, q, k, v, *bounds = _alike(q.ndim - 3, dq, dk, dv, q, k, v, *bounds)
    definition = _by_definition(_reference.attention, spec, *bounds or [None])
    dout, dlse = jax.jvp(definition, (q, k, v), (dq, dk, dv))[1]
    return dout, jnp.swapaxes(dlse, -1, -2)


def _result_types(dq, dk, dv, q, k, v, out, lse, *bounds, spec):
    axes = q.ndim - 3
    batch = _batch_shape(axes, dq, dk, dv, q, k, v, *bounds)
    return [x.update(shape=batch + x.shape[axes:]) for x in (out, lse)]


def _transpose(cotangents, dq, dk, dv, q, k, v, out, lse, *bounds, spec):
    dout, dlse = map(ad.instantiate_zeros, cotangents)
    operands = _alike(q.ndim - 3, q, k, v, out, lse, dout, dlse, *bounds)
    results = gradients(spec, *operands, *() if bounds else (None,))
    return [
        *(
            _sum_to(d.aval.shape, x) if ad.is_undefined_primal(d) else None
            for d, x in zip((dq, dk, dv), results, strict=True)
        ),
        *[None] * (5 + len(bounds)),
    ]


def _differentiate(primals, tangents, *, spec):
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    results = _tangent.bind(*primals, spec=spec)
    return results, jax.jvp(functools.partial(_evaluate, spec=spec), primals, tangents)[1]


def _batch(operands, axes, *, spec):
    operands = [
        jnp.expand_dims(x, 0) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    ]
    return _tangent.bind(*operands, spec=spec), (0, 0)


def _batch_shape(axes, *operands):
    return jnp.broadcast_shapes(*(x.shape[:axes] for x in operands))


def _alike(axes, *operands):
    """The operands with their first axes, the batch, broadcast against each other."""
    batch = _batch_shape(axes, *operands)
    return [jnp.broadcast_to(x, batch + x.shape[axes:]) for x in operands]


def _sum_to(shape, x):
    """The transpose of a broadcast from the shape."""
    axes = [i for i, (a, b) in enumerate(zip(shape, x.shape, strict=True)) if a != b]
    return x.sum(axes, keepdims=True) if axes else x


_tangent.def_abstract_eval(_result_types)
mlir.register_lowering(_tangent, mlir.lower_fun(_evaluate, multiple_results=True))
_tangent.def_impl(_evaluate)
ad.primitive_transposes[_tangent] = _transpose
ad.primitive_jvps[_tangent] = _differentiate
batching.primitive_batchers[_tangent] = _batch
