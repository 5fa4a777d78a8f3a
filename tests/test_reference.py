"""The jax.numpy definition, which is implementation="xla", against the written-out one."""

import functools

import battery
import jax
import numpy as np
import pytest
from cases import RANDOM, by_name

from jax_flash2 import _reference

FLOAT64 = battery.FORMATS["cpu"][-1]
CASES = [
    *by_name("one_query", "no_batch_axis", "three_batch_axes", "one_kv_head", "value_dim_odd"),
    *by_name("bottom_right_t_above_s", "offset_traced_and_window", "window_and_offset"),
    *by_name("window_off_the_keys", "both_lengths", "lengths_offset_and_window"),
    *by_name("lengths_without_a_batch_axis", "no_queries", "no_keys_ragged", "scale_negative"),
    *RANDOM[:4],
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_definitions_agree(case):
    """In float64, with NaN and Inf in the tokens that nobody sees."""
    device = jax.devices("cpu")[0]
    (results,) = battery.run(case, FLOAT64, device, ("fused",), 1, implementation="xla")
    truth, _ = battery.truth_and_naive(case, FLOAT64)
    for name, got in results["fused"].items():
        size = np.abs(truth[name][np.isfinite(truth[name])]).max(initial=0)
        np.testing.assert_allclose(got, truth[name], 1e-11, 1e-11 * size, err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_it_is_accurate_in_every_dtype(dtype):
    fmt = battery.Format(dtype, dtype)
    (case,) = by_name("both_lengths")
    battery.check(case, fmt, jax.devices("cpu")[0], implementation="xla")


@pytest.mark.parametrize(
    "case",
    by_name("one_kv_head", "both_lengths", "lengths_offset_and_window", "no_keys_ragged"),
    ids=str,
)
def test_the_gradients_are_those_of_the_definition(case):
    """Written as a formula of the results, against what JAX derives."""
    static, traced = battery.mask_arguments(case)
    masks = {name: x for name, x in static.items() if x is not None} | traced
    if isinstance(window := masks.get("local_window_size"), int):
        masks["local_window_size"] = (window, window)

    @jax.jit
    def both(qkv, cotangents):
        call = functools.partial(_reference.attention, scale=0.3, **masks)
        results, pullback = jax.vjp(call, *qkv)
        got = _reference.gradients(*qkv, *results, *cotangents, scale=0.3, **masks)
        return got, pullback(cotangents)

    with jax.enable_x64(True):
        inputs = battery.make_inputs(case, FLOAT64)
        qkv, cotangents = (inputs["q"], inputs["k"], inputs["v"]), (inputs["dout"], inputs["dlse"])
        for got, expected in zip(*both(qkv, cotangents), strict=True):
            np.testing.assert_allclose(got, expected, 1e-11, 1e-11)
