"""The battery, on the CPU always and on the GPU where there is one."""

import battery
import jax
import pytest
from cases import CASES

# On a GPU the best kernels that it has; and those that every GPU has, where some have better ones.
BACKENDS = (
    ("cpu", None, battery.FORMATS["cpu"], ()),
    ("gpu", None, battery.FORMATS["gpu"], pytest.mark.gpu),
    ("gpu", "cuda_sm80", battery.HALVES, pytest.mark.gpu),
)
PARAMS = [
    pytest.param(
        case,
        fmt,
        platform,
        implementation,
        id=f"{implementation or platform}-{fmt}-{case}",
        marks=marks,
    )
    for platform, implementation, formats, marks in BACKENDS
    for fmt in formats
    for case in CASES
]


@pytest.mark.parametrize(("case", "fmt", "platform", "implementation"), PARAMS)
def test_battery(case, fmt, platform, implementation):
    battery.check(case, fmt, jax.devices(platform)[0], implementation)
