"""The battery, on the CPU always and on the GPU where there is one."""

import battery
import jax
import pytest
from cases import CASES

# On a GPU twice: the best kernels that it has, and those that every GPU has.
BACKENDS = (
    ("cpu", None, ()),
    ("gpu", None, pytest.mark.gpu),
    ("gpu", "cuda_sm80", pytest.mark.gpu),
)
PARAMS = [
    pytest.param(case, fmt, *backend, id=f"{implementation or platform}-{fmt}-{case}", marks=marks)
    for *backend, marks in BACKENDS
    for platform, implementation in [backend]
    for fmt in battery.FORMATS[platform]
    for case in CASES
]


@pytest.mark.parametrize(("case", "fmt", "platform", "implementation"), PARAMS)
def test_battery(case, fmt, platform, implementation):
    battery.check(case, fmt, jax.devices(platform)[0], implementation)
