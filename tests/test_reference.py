"""The jax.numpy definition, which is implementation="xla", against the written-out one."""

import battery
import jax
import numpy as np
import pytest
from cases import RANDOM, by_name

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
