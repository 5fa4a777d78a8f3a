"""The one battery that every backend has to pass, for each case and number format.

A result may be at most twice as wrong as the naive computation in the same format, which is
FlashAttention's own rule. Tokens that nobody sees are NaN and Inf in every input, and the memory
that the results are written to is NaN before the call.
"""

import contextlib
import functools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from definition import Format, attention, mask_of

import jax_flash2

MODES = ("fused", "deterministic", "split")
REPEATABLE = ("deterministic", "split")

HALVES = (Format("float16", "float16"), Format("bfloat16", "bfloat16"))
# By JAX's name of the platform. On a GPU a product of default precision rounds float32 to TF32, and
# "high" is three products of bfloat16 parts.
FORMATS = {
    "cpu": (*HALVES, Format("float32", "float32"), Format("float64", "float64")),
    "gpu": (
        *HALVES,
        Format("float32", "float32", operand_bits=11),
        Format("float32_high", "float32", "high", operand_bits=16),
        Format("float32_highest", "float32", "highest"),
    ),
}


def x64_if_needed(fmt):
    return jax.enable_x64(True) if fmt.dtype == "float64" else contextlib.nullcontext()


def make_inputs(case, fmt):
    """q, k, v, dout, dlse: random numbers of the format, NaN and Inf where nobody looks."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    mask = mask_of(case)
    rows, keys = mask.any(-1), mask.any(-2)

    def array(seen, *tail, amplitude=1.0, dtype=fmt.dtype):
        x = amplitude * rng.standard_normal((*seen.shape, *tail))
        poison = rng.choice([np.nan, np.inf, -np.inf], size=x.shape)
        x = np.where(seen.reshape(seen.shape + (1,) * len(tail)), x, poison)
        return x.astype(jnp.dtype(dtype))

    stats = "float64" if fmt.dtype == "float64" else "float32"
    return {
        "q": array(rows, case.n, case.h, amplitude=case.amplitude),
        "k": array(keys, case.k, case.h),
        "v": array(keys, case.k, case.hv),
        "dout": array(rows, case.n, case.hv),
        "dlse": array(rows, case.n, dtype=stats),
    }


def mask_arguments(case):
    """(static, traced) keyword arguments of `jax_flash2.attention`."""
    static = {
        "scale": case.scale,
        "is_causal": case.is_causal,
        "local_window_size": case.local_window_size,
    }
    traced = {}
    for name in ("query_offset", "query_seq_lengths", "key_value_seq_lengths"):
        value = getattr(case, name)
        if isinstance(value, tuple):
            traced[name] = np.reshape(np.array(value, np.int32), case.batch)
        else:
            static[name] = value
    return static, traced


def forward_and_gradients(inputs, traced, *, modes, **static):
    """{"out", "lse"} and, for each mode, {"dq", "dk", "dv"}, of one call under jit."""
    results = {}
    for mode in modes:

        def call(q, k, v, mode=mode):
            return jax_flash2.attention(
                q, k, v, backward=mode, return_residual=True, **traced, **static
            )

        (out, lse), vjp = jax.vjp(call, inputs["q"], inputs["k"], inputs["v"])
        gradients = vjp((inputs["dout"], inputs["dlse"]))
        results[mode] = dict(zip(("dq", "dk", "dv"), gradients, strict=True))
        results[mode] |= {"out": out, "lse": lse}
    return results


def run(case, fmt, device, modes=MODES, repeats=2, implementation=None):
    """The results of `repeats` calls on the device, each into memory full of NaN."""
    static, traced = mask_arguments(case)
    static |= {"precision": fmt.precision, "implementation": implementation}
    call = functools.partial(forward_and_gradients, modes=modes, **static)
    step = jax.jit(lambda memory, *args: call(*args), donate_argnums=0, keep_unused=True)
    with x64_if_needed(fmt):
        inputs, traced = jax.device_put((make_inputs(case, fmt), traced), device)
        shapes = jax.eval_shape(call, inputs, traced)
        results = []
        for _ in range(repeats):
            memory = jax.tree.map(
                lambda x: jax.device_put(np.full(x.shape, np.nan, x.dtype), device), shapes
            )
            results.append(jax.tree.map(np.asarray, step(memory, inputs, traced)))
    return results


def truth_and_naive(case, fmt):
    inputs = {name: x.astype(fmt.work) for name, x in make_inputs(case, fmt).items()}
    problem = {
        "mask": mask_of(case),
        "scale": 1 / math.sqrt(case.h) if case.scale is None else case.scale,
    }
    with np.errstate(all="ignore"):
        naive = attention(**inputs, **problem, fmt=fmt)
        inputs = {name: x.astype(np.float64) for name, x in inputs.items()}
        return attention(**inputs, **problem), naive


def errors(got, truth, naive, floor):
    """{measure: (error, what is allowed)} of one array."""
    seen = np.isfinite(truth)
    got, truth, naive = (x.astype(np.float64)[seen] for x in (got, truth, naive))

    def largest(x):
        return np.abs(x).max(initial=0)

    return {
        measure.__name__: (
            measure(got - truth),
            2 * measure(naive - truth) + floor * measure(truth),
        )
        for measure in (largest, np.linalg.norm)
    }


def rounding_floor(lse):
    """Relative: sums in another order, and exp(S - LSE) of an LSE that was rounded to its dtype."""
    largest = np.abs(lse[np.isfinite(lse)]).max(initial=0)
    return float(jnp.finfo(lse.dtype).eps) * (16 + largest)


def check(case, fmt, device, implementation=None):
    first, *again = run(case, fmt, device, implementation=implementation)
    truth, naive = truth_and_naive(case, fmt)
    floor = rounding_floor(first[MODES[0]]["lse"])
    mask = mask_of(case)
    rows, keys = mask.any(-1), mask.any(-2)
    for mode, results in first.items():
        for name, got in results.items():
            where = f"{case} {fmt} {mode} {name}"
            assert got.shape == truth[name].shape, where
            unseen = got[~(keys if name in ("dk", "dv") else rows)]
            assert (unseen == (-np.inf if name == "lse" else 0)).all(), f"{where}: unseen tokens"
            for measure, (error, allowed) in errors(got, truth[name], naive[name], floor).items():
                assert error <= allowed, f"{where}: {measure} error {error:.3g} > {allowed:.3g}"
        for name in results if mode in REPEATABLE else ("out", "lse"):
            for other in again:
                np.testing.assert_array_equal(results[name], other[mode][name])
