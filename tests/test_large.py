"""What shows only at length or over many runs: memory, repeats, tiles by the hundred."""

import functools

import battery
import decode_battery
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LARGE, LARGE_DECODE, by_name

from jax_flash2 import attention, decode_attention

PLATFORMS = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]
BATTERY = [
    pytest.param(*by_name("long"), battery.FORMATS["cpu"][2], "cpu", id="cpu-float32-long"),
    *(
        pytest.param(case, fmt, "gpu", id=f"gpu-{fmt}-{case}", marks=pytest.mark.gpu)
        for fmt in battery.FORMATS["gpu"]
        for case in LARGE
    ),
]


@pytest.mark.parametrize(("case", "fmt", "platform"), BATTERY)
def test_battery(case, fmt, platform):
    battery.check(case, fmt, jax.devices(platform)[0])


DECODE = [
    *(
        pytest.param(case, battery.FORMATS["cpu"][2], "cpu", id=f"cpu-float32-{case}")
        for case in LARGE_DECODE
    ),
    *(
        pytest.param(case, fmt, "gpu", id=f"gpu-{fmt}-{case}", marks=pytest.mark.gpu)
        for fmt in battery.FORMATS["cpu"][:3]
        for case in LARGE_DECODE
    ),
]


@pytest.mark.parametrize(("case", "fmt", "platform"), DECODE)
def test_decode_battery(case, fmt, platform):
    decode_battery.check(case, fmt, jax.devices(platform)[0])


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("mode", battery.MODES)
def test_memory_is_linear(mode, platform):
    """By XLA's own account, forward and backward together; a T x T matrix would be 32 GB here."""

    def temporary(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.bfloat16)
        gradient = jax.grad(
            lambda *qkv: attention(*qkv, is_causal=True, backward=mode).astype(jnp.float32).sum(),
            (0, 1, 2),
        )
        with jax.default_device(jax.devices(platform)[0]):
            compiled = jax.jit(gradient).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(2**14), temporary(2**17)
    assert 0 < long <= 8.5 * short
    # Output and its cotangent in bfloat16, dQ in float32, and what is one number a row.
    assert long <= 2**17 * (64 * (2 + 2 + 4) + 64)


@pytest.mark.parametrize(
    ("platform", "repeats"), [("cpu", 30), pytest.param("gpu", 1000, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("mode", battery.MODES)
def test_bitwise_repeats(mode, platform, repeats):
    """Forward always; dK and dV too; dQ unless it is added by atomics."""
    device = jax.devices(platform)[0]
    rng = np.random.default_rng(0)
    q, k, v, dout = (
        jax.device_put(rng.standard_normal(shape, np.float32).astype(jnp.bfloat16), device)
        for shape in ((2, 700, 8, 64), (2, 900, 2, 64), (2, 900, 2, 64), (2, 700, 8, 64))
    )

    @jax.jit
    def results():
        call = functools.partial(
            attention, is_causal=True, query_offset=200, backward=mode, return_residual=True
        )
        (out, lse), vjp = jax.vjp(call, q, k, v)
        gradients = dict(zip(("dq", "dk", "dv"), vjp((dout, jnp.ones_like(lse))), strict=True))
        return {"out": out, "lse": lse} | gradients

    @jax.jit
    def differing(a, b):
        return jax.tree.map(lambda x, y: (x != y).sum(), a, b)

    first = results()
    total = jax.tree.map(lambda x: jnp.zeros((), jnp.int32, device=device), first)
    for _ in range(repeats):
        total = jax.tree.map(jnp.add, total, differing(first, results()))
    if mode == "fused":
        del total["dq"]
    assert jax.device_get(total) == dict.fromkeys(total, 0)


@pytest.mark.parametrize(
    ("platform", "repeats"), [("cpu", 30), pytest.param("gpu", 1000, marks=pytest.mark.gpu)]
)
def test_decoding_repeats_bitwise(platform, repeats):
    """Whoever comes last, the shares of a sequence are added in one order."""
    rng = np.random.default_rng(0)
    query, keys, values = (
        rng.standard_normal(shape, np.float32).astype(jnp.bfloat16)
        for shape in ((3, 2, 8, 64), (3, 9000, 2, 64), (3, 9000, 2, 64))
    )
    operands = query, keys, values, np.array([9000, 100, 5555], np.int32)
    operands = jax.device_put(operands, jax.devices(platform)[0])
    step = jax.jit(decode_attention)

    @jax.jit
    def differing(a, b):
        return (a != b).sum()

    first = step(*operands)
    assert sum(int(differing(first, step(*operands))) for _ in range(repeats)) == 0
