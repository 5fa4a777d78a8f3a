"""A handler reached with buffers or attributes that Python would not send: an error with names."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jax_flash2 import _cpu, _ffi
from jax_flash2._spec import make_decode_spec, make_spec

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
    "row_stats": struct(B, N, _cpu.ROW_STATS, TP),
    "dq_accum": struct(B, N, TP, _cpu.HEAD_DIM_TILE),
    "semaphores": struct(B, N, TP // _cpu.SEMAPHORE_ROWS, dtype="int32"),
    "dkv_partial": struct(B, N // K, S, K, H + HV),
    "queues": struct(B, _cpu.QUEUES, dtype="int32"),
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


PAGES, PAGE, P = 5, 16, 3
DECODE = {
    "q": struct(B, T, N, H),
    "k": struct(B, S, K, H),
    "v": struct(B, S, K, HV),
    "lengths": struct(B, dtype="int32"),
    "out": struct(B, T, N, HV),
    "lse": struct(B, N, T),
    "pieces": struct(_cpu.DECODE_BLOCKS, _cpu.decode_piece_floats(T * N // K, HV)),
}
PAGED = {
    "q": DECODE["q"],
    "k": struct(PAGES, PAGE, K, H),
    "v": struct(PAGES, PAGE, K, HV),
    "lengths": DECODE["lengths"],
    "page_table": struct(B, P, dtype="int32"),
    **{name: DECODE[name] for name in list(DECODE)[4:]},
}


def decode(changes=None, spec=None, paged=False):
    """Calls the handler that decodes with some buffers or attributes changed."""
    buffers = list({**(PAGED if paged else DECODE), **(changes or {})}.values())
    operands = 5 if paged else 4
    attributes = dataclasses.asdict(make_decode_spec(scale=0.5, window=None)) | (spec or {})
    target = "jax_flash2_decode_paged" if paged else "jax_flash2_decode"
    run = jax.ffi.ffi_call(target, tuple(buffers[operands:]))
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
    for paged in (False, True):
        out, lse = decode(paged=paged)[:2]
        assert (out == 0).all()
        assert (lse == -jnp.inf).all()


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
        ("forward", {"family": "sm70"}, "family should be auto or sm80, got sm70"),
        ("forward", {"band_lower": 0.5}, "Wrong .* type"),
        ("forward", {"bias": 1}, "Wrong number of attributes"),
    ],
)
def test_attributes_are_checked(name, spec, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call(name, spec=spec)


@pytest.mark.parametrize(
    ("paged", "buffer"),
    [(paged, name) for paged, buffers in enumerate((DECODE, PAGED)) for name in buffers],
)
def test_every_buffer_of_decoding_is_held_against_the_query(paged, buffer):
    good = (PAGED if paged else DECODE)[buffer]
    longer = struct(*good.shape[:-1], good.shape[-1] + 8, dtype=good.dtype)
    first = struct(good.shape[0] + 1, *good.shape[1:], dtype=good.dtype)
    bad = [struct(*good.shape, dtype="int8")]
    if buffer == "pieces":
        bad.append(struct(*good.shape[:-1], good.shape[-1] - 1))
    elif buffer not in ("q", "v", "page_table"):  # what they say of Hv, or P, others then deny
        bad.append(longer)
    if buffer != "q" and not (paged and buffer in ("k", "v")):
        bad.append(first)
    for x in bad:
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"jax_flash2: {buffer} should be "):
            decode({buffer: x}, paged=paged)


@pytest.mark.parametrize(
    ("paged", "changes", "message"),
    [
        (False, {"k": struct(S, K, H)}, "k should be of rank 4 as q is"),
        (False, {"q": struct(B, T, 3, H)}, "N should be a multiple of the key heads K = 2, got 3"),
        (True, {"q": struct(N, H)}, r"q should be \[\*B, T, N, H\]"),
        (True, {"k": struct(S, K, H)}, r"k should be \[pages, page size, K, H\]"),
        (True, {"v": struct(S, K, H)}, r"v should be \[pages, page size, K, Hv\]"),
        (True, {"k": struct(PAGES, 24, K, H)}, "page size should be a multiple of 16, got 24"),
        (True, {"k": struct(PAGES, 0, K, H)}, "page size should be in .*, got 0"),
        (True, {"v": struct(PAGES + 1, PAGE, K, HV)}, r"v should be float32\[5,16,2,8\]"),
        (True, {"page_table": struct(dtype="int32")}, r"page_table should be \[\*B, P\]"),
        (
            True,
            {"page_table": struct(B + 1, P, dtype="int32")},
            r"page_table should be int32\[2,3\]",
        ),
    ],
)
def test_shapes_of_decoding_are_checked(paged, changes, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"INVALID_ARGUMENT.*{message}"):
        decode(changes, paged=paged)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"scale": 0.0}, "scale should be positive and finite, got 0"),
        ({"scale": float("inf")}, "scale should be positive and finite, got inf"),
        ({"window_left": -1}, "window_left should be at least 0, got -1"),
        ({"window_right": 1}, "Wrong number of attributes"),
    ],
)
def test_attributes_of_decoding_are_checked(spec, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        decode(spec=spec)


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
        "jax_flash2_decode",
        "jax_flash2_decode_paged",
        "jax_flash2_forward",
        "jax_flash2_forward_ragged",
    ]
    assert _ffi.TOKEN_TILE == TP
