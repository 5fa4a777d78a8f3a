"""The battery, on the CPU always and on the GPU where there is one."""

import battery
import jax
import pytest
from cases import CASES

PARAMS = [
    pytest.param(case, fmt, platform, id=f"{platform}-{fmt}-{case}", marks=marks)
    for platform, marks in (("cpu", ()), ("gpu", pytest.mark.gpu))
    for fmt in battery.FORMATS[platform]
    for case in CASES
]


@pytest.mark.parametrize(("case", "fmt", "platform"), PARAMS)
def test_battery(case, fmt, platform):
    battery.check(case, fmt, jax.devices(platform)[0])
