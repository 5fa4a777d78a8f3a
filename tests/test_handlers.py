"""A handler reached with buffers or attributes that Python would not send: an error with names."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jax_flash2 import _cpu, _ffi
from jax_flash2._spec import make_spec

SPEC = make_spec(
    scale=0.5,
    is_causal=True,
    window=None,
    offset=0,
    precision=None,
    backward="deterministic",
    dtype="float32",
)
B, T, S, N, K, H, HV = 2, 20, 24, 4, 2, 16, 8
TP = _cpu.TOKEN_TILE


def struct(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


FORWARD = {
    "q": struct(B, T, N, H),
    "k": struct(B, S, K, H),
    "v": struct(B, S, K, HV),
    "bounds": struct(B, 3, dtype="int32"),
    "out": struct(B, T, N, HV),
    "lse": struct(B, N, T),
    "next_tile": struct(B, 1, dtype="int32"),
}
BACKWARD = {
    "q": struct(B, T, N, H),
    "k": struct(B, S, K, H),
    "v": struct(B, S, K, HV),
    "out": struct(B, T, N, HV),
    "lse": struct(B, N, T),
    "dout": struct(B, T, N, HV),
    "dlse": struct(B, N, T),
    "bounds": struct(B, 3, dtype="int32"),
    "dq": struct(B, T, N, H),
    "dk": struct(B, S, K, H),
    "dv": struct(B, S, K, HV),
    "delta": struct(B, N, TP),
    "scaled_lse": struct(B, N, TP),
    "dq_accum": struct(B, N, TP, _cpu.HEAD_DIM_TILE),
    "semaphores": struct(B, N, TP // _cpu.SEMAPHORE_ROWS, dtype="int32"),
    "dkv_partial": struct(B, N // K, S, K, H + HV),
    "next_block": struct(B, 1, dtype="int32"),
}
PASSES = {"forward": (FORWARD, 4), "backward": (BACKWARD, 8)}


def call(name, changes=None, spec=None):
    """Calls the ragged target of a pass with some buffers or attributes changed."""
    buffers, operands = PASSES[name]
    buffers = list({**buffers, **(changes or {})}.values())
    attributes = {**dataclasses.asdict(SPEC), **(spec or {})}
    run = jax.ffi.ffi_call(f"jax_flash2_{name}_ragged", tuple(buffers[operands:]))
    inputs = [jnp.zeros(s.shape, s.dtype) for s in buffers[:operands]]
    return jax.block_until_ready(jax.jit(lambda *args: run(*args, spec=attributes))(*inputs))


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def test_the_unchanged_calls_work():
    """With bounds of zero there is nothing to see."""
    out, lse, _ = call("forward")
    assert (out == 0).all()
    assert (lse == -jnp.inf).all()
    assert all((gradient == 0).all() for gradient in call("backward")[:3])


@pytest.mark.parametrize(
    ("name", "buffer"),
    [(name, buffer) for name in PASSES for buffer in PASSES[name][0] if buffer != "q"],
)
def test_every_buffer_is_held_against_the_query(name, buffer):
    good = PASSES[name][0][buffer]
    wrong_shape = struct(*good.shape[:-1], good.shape[-1] + 8, dtype=good.dtype)
    wrong_batch = struct(B + 1, *good.shape[1:], dtype=good.dtype)
    wrong_type = struct(*good.shape, dtype="int8")
    for bad in (wrong_shape, wrong_batch, wrong_type):
        if buffer == "v" and bad is wrong_shape:
            continue  # Hv is what v says; then out is the wrong one
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"jax_flash2: {buffer} should be "):
            call(name, {buffer: bad})


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": struct(N, H)}, r"q should be \[\*B, T, N, H\], got float32\[4,16\]"),
        ({"q": struct(T, N, H)}, "k should be of rank 3 as q is"),
        ({"q": struct(B, T, N, H, dtype="int8")}, "q should be float16, bfloat16, float32 or"),
        ({"q": struct(B, T, 3, H)}, "N should be a multiple of the key heads K = 2, got 3"),
        ({"q": struct(B, T, 0, H)}, "N should be in .*, got 0"),
        ({"k": struct(B, S, 0, H)}, "K should be in .*, got 0"),
        ({"q": struct(B, T, N, 12)}, r"H should be a multiple of 8 in \[8, 256\], got 12"),
        ({"q": struct(B, T, N, 264)}, r"H should be a multiple of 8 in \[8, 256\], got 264"),
        ({"v": struct(B, S, K, 4)}, r"Hv should be a multiple of 8 in \[8, 256\], got 4"),
        ({"k": struct(B, S, K, 24)}, r"k should be float32\[2,24,2,16\], got float32\[2,24,2,24\]"),
    ],
)
def test_shapes_are_checked(name, changes, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"INVALID_ARGUMENT.*{message}"):
        call(name, changes)


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("forward", {"scale": float("nan")}, "scale should be positive and finite, got nan"),
        ("backward", {"scale": -0.5}, "scale should be positive and finite, got -0.5"),
        (
            "forward",
            {"precision": "best"},
            "precision should be default, high or highest",
        ),
        ("backward", {"backward": "auto"}, "backward should be fused, deterministic or"),
        ("backward", {"backward": "split"}, "dq_accum should be"),
        ("backward", {"backward": "fused"}, "semaphores should be"),
        ("forward", {"family": "sm70"}, "family should be auto or sm80, got sm70"),
        ("forward", {"band_lower": 0.5}, "Wrong .* type"),
        ("forward", {"bias": 1}, "Wrong number of attributes"),
    ],
)
def test_attributes_are_checked(name, spec, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(name, spec=spec)


@pytest.mark.parametrize("splits", [0, 1])
def test_fewer_parts_of_a_group(splits):
    gradients = call("backward", {"dkv_partial": struct(B, splits, S, K, H + HV)})[:3]
    assert all((gradient == 0).all() for gradient in gradients)


def test_parts_of_a_group_are_equal():
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"dkv_partial should be .* N / K = 2 "):
        call("backward", {"dkv_partial": struct(B, 3, S, K, H + HV)})


def test_targets_are_the_ones_registered():
    assert sorted(_cpu.registrations()) == [
        "jax_flash2_backward",
        "jax_flash2_backward_ragged",
        "jax_flash2_forward",
        "jax_flash2_forward_ragged",
    ]
    assert _ffi.TOKEN_TILE == TP
