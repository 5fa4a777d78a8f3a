"""The way from Python to the kernels: versions, platforms, lowering, and memory written in full."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash2 import _ffi, attention, decode_attention
from jax_flash2._spec import UNBOUNDED, AttentionSpec, DecodeSpec

QKV = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2, 9, 4, 16), (2, 7, 2, 16), (2, 7, 2, 8))]


def lowered(platform, *arrays, **arguments):
    """The program of a call and its gradient, for a platform that this machine may lack."""

    def total(query, key, value):
        out, lse = attention(query, key, value, return_residual=True, **arguments)
        return out.astype(jnp.float32).sum() + lse.sum()

    gradient = jax.jit(jax.grad(total, (0, 1, 2)))
    return gradient.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


def custom_calls(text):
    """[(target, {attribute: text})] of our calls in the program."""
    calls = re.findall(r"custom_call @(jax_flash2_\w+)\(.*?spec = \{(.*?)\}", text)
    return [(target, dict(a.split(" = ") for a in spec.split(", "))) for target, spec in calls]


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_lowering(platform):
    """Both platforms get the same calls, with every attribute, of exactly its type."""
    text = lowered(platform, *QKV, scale=2, is_causal=True, query_offset=-2, backward="split")
    attributes = {
        "scale": "2.000000e+00 : f64",
        "band_lower": f"{-UNBOUNDED} : i64",
        "band_upper": "-2 : i64",
        "precision": '"default"',
        "backward": '"split"',
        "family": '"auto"',
    }
    assert custom_calls(text) == [
        ("jax_flash2_forward", attributes),
        ("jax_flash2_backward", attributes),
    ]
    assert "jax_flash2_guard" not in text


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("argument", ["query_offset", "query_seq_lengths", "key_value_seq_lengths"])
def test_lowering_of_traced_bounds(platform, argument):
    text = lowered(platform, *QKV, **{argument: jnp.array([1, 2])}, local_window_size=(3, 2))
    (forward, spec), (backward, _) = custom_calls(text)
    assert (forward, backward) == ("jax_flash2_forward_ragged", "jax_flash2_backward_ragged")
    assert (spec["band_lower"], spec["band_upper"]) == ("-3 : i64", "2 : i64")
    assert spec["backward"] == '"fused"'
    assert len(re.findall(r"@jax_flash2_\w+_ragged\(.*tensor<2x3xi32>\)? ?[-,)]", text)) == 2


def test_no_platform_but_these():
    with pytest.raises(NotImplementedError, match=r"no kernel for platform 'tpu'.*xla"):
        lowered("tpu", *QKV)
    assert "jax_flash2" not in lowered("tpu", *QKV, implementation="xla")


def lowered_decoding(platform, dtype=jnp.bfloat16, **arguments):
    arrays = [jax.ShapeDtypeStruct(x.shape, dtype) for x in QKV]
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    call = jax.jit(functools.partial(decode_attention, **arguments))
    return call.trace(*arrays, lengths).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_lowering_of_decoding(platform):
    text = lowered_decoding(platform, scale=-2, local_window_size=(3, 5))
    attributes = {"scale": "2.000000e+00 : f64", "window_left": "3 : i64"}
    assert custom_calls(text) == [("jax_flash2_decode", attributes)]
    assert "jax_flash2_guard" not in text


def test_platforms_of_decoding():
    with pytest.raises(
        NotImplementedError, match=r"decode_attention: there is no kernel for .*tpu"
    ):
        lowered_decoding("tpu")
    assert "jax_flash2" not in lowered_decoding("tpu", implementation="xla")
    with (
        jax.enable_x64(True),
        pytest.raises(NotImplementedError, match=r"decode_attention: .*no float64 kernel for CUDA"),
    ):
        lowered_decoding("cuda", jnp.float64)


def test_a_family_of_cuda_kernels_is_for_cuda():
    calls = custom_calls(lowered("cuda", *QKV, implementation="cuda_sm80"))
    assert [spec["family"] for _, spec in calls] == ['"sm80"', '"sm80"']
    with pytest.raises(NotImplementedError, match=r"cuda_sm80.*needs a CUDA device.*'cpu'"):
        lowered("cpu", *QKV, implementation="cuda_sm80")


def test_float64_is_for_the_cpu():
    with jax.enable_x64(True):
        arrays = [jax.ShapeDtypeStruct(x.shape, jnp.float64) for x in QKV]
        assert len(custom_calls(lowered("cpu", *arrays))) == 2
        with pytest.raises(NotImplementedError, match=r'no float64 kernel for CUDA.*"xla"'):
            lowered("cuda", *arrays)


def test_cuda_without_cuda_kernels(monkeypatch):
    """On a machine with a GPU it is an error; without, it is lowering for another machine."""
    monkeypatch.setattr(_ffi, "_cuda", None)
    monkeypatch.setattr(_ffi, "_has_cuda_device", lambda: True)
    with pytest.raises(NotImplementedError, match="this build has no CUDA kernels"):
        lowered("cuda", *QKV)


@pytest.mark.parametrize("module", [m for m in (_ffi._cpu, _ffi._cuda) if m], ids=str)
def test_built_for_a_version_that_jaxlib_has(module):
    _ffi.check_ffi_version(module.ffi_api_version(), _ffi.ffi_version_of_jaxlib())


@pytest.mark.parametrize(("major", "minor"), [(0, 1), (1, 0)])
def test_headers_newer_than_jaxlib_are_refused(major, minor):
    """Registered all the same, such handlers would break all of JAX."""
    built = _ffi._cpu.ffi_api_version()
    newer = built[0] + major, 100 * minor + built[1]
    with pytest.raises(ImportError, match=rf"built for version {newer[0]}\.{newer[1]} .*jaxlib"):
        _ffi.check_ffi_version(newer, _ffi.ffi_version_of_jaxlib())


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3, keep_unused=True)
def raw_call(target, spec, operands, memory):
    """A handler with all its results, workspaces too, in the memory given."""
    results = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in memory)
    return jax.ffi.ffi_call(target, results)(*operands, spec=dataclasses.asdict(spec))


@pytest.mark.parametrize(
    ("lengths", "splits"),
    [
        ((2, 8192, 8192, 32, 1), 16),  # 128 key blocks
        ((2, 8192, 8192, 32, 8), 2),  # 1024
        ((4, 8192, 8192, 32, 8), 1),
        ((1, 100, 100, 15, 3), 5),
        ((1, 100, 100, 4, 4), 1),
        ((1, 50, 100, 8, 1), 4),  # no more partial sums than N T
        ((1, 1, 4096, 8, 1), 1),
        ((0, 0, 0, 1, 1), 1),
    ],
)
def test_parts_of_a_group(lengths, splits):
    """Few key blocks: the query heads of a group are divided."""
    assert _ffi._cpu.group_splits(*lengths) == splits
    b, t, s, n, k = lengths
    qkv = (
        jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in ((b, t, n, 8), (b, s, k, 8), (b, s, k, 16))
    )
    *_, partial, _ = _ffi.backward_results(*qkv, "fused")
    assert partial.shape == (b, splits if splits > 1 else 0, s, k, 24)


def test_parts_of_a_group_with_an_open_batch():
    (b,) = jax.export.symbolic_shape("b")
    qkv = (jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype) for x in QKV)
    *_, partial, _ = _ffi.backward_results(*qkv, "fused")
    assert partial.shape == (b, 0, 7, 2, 24)


PLATFORMS = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("mode", ["fused", "deterministic", "split"])
def test_every_result_is_written(mode, ragged, platform):
    """Whatever results and workspaces held before, the results are the same, and finite."""
    device = jax.devices(platform)[0]
    rng = np.random.default_rng(0)
    b, t, s, n, k, h, hv = 2, 200, 170, 4, 2, 64, 72

    def normal(*shape, dtype="bfloat16"):
        return jax.device_put(rng.standard_normal(shape).astype(jnp.dtype(dtype)), device)

    spec = AttentionSpec(0.1, -UNBOUNDED, 20, "default", mode, "auto")
    qkv = normal(b, t, n, h), normal(b, s, k, h), normal(b, s, k, hv)
    cotangents = normal(b, t, n, hv), normal(b, n, t, dtype="float32")
    bounds = [np.array([[0, 200, 170], [-30, 150, 100]], np.int32)] if ragged else []

    def call(name, results, operands, number):
        memory = tuple(
            jax.device_put(
                np.full(r.shape, 2**30 if r.dtype == jnp.int32 else number, r.dtype), device
            )
            for r in results
        )
        target = f"jax_flash2_{name}_ragged" if ragged else f"jax_flash2_{name}"
        return raw_call(target, spec, (*operands, *bounds), memory)

    written = []
    for number in (0, np.nan):
        out, lse, _ = call("forward", _ffi.forward_results(*qkv), qkv, number)
        results = _ffi.backward_results(*qkv, mode)
        gradients = call("backward", results, (*qkv, out, lse, *cotangents), number)[:3]
        written.append([np.asarray(x, np.float32) for x in (out, lse, *gradients)])
    for name, clean, poisoned in zip(("out", "lse", "dq", "dk", "dv"), *written, strict=True):
        assert not np.isnan(poisoned).any(), name
        tolerance = 0.01 if mode == "fused" else 0
        np.testing.assert_allclose(poisoned, clean, tolerance, tolerance, err_msg=name)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("paged", [False, True])
def test_every_result_of_decoding_is_written(paged, platform):
    """Whatever results and workspaces held before, the results are the same."""
    device = jax.devices(platform)[0]
    rng = np.random.default_rng(0)
    b, t, s, n, k, h, hv = 3, 2, 4096, 8, 2, 64, 72
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, hv)
    if paged:
        shapes = shapes[0], (b * s // 16, 16, k, h), (b * s // 16, 16, k, hv)
    qkv = [rng.standard_normal(x).astype(jnp.bfloat16) for x in shapes]
    operands = [*qkv, np.array([4096, 0, 77], np.int32)]
    if paged:
        operands.append(rng.permutation(b * s // 16).reshape(b, -1).astype(np.int32))
    target = "jax_flash2_decode_paged" if paged else "jax_flash2_decode"
    results = _ffi.decode_results(*qkv)
    written = []
    for number in (0, 1, np.nan):
        memory = tuple(np.full(r.shape, number, r.dtype) for r in results)
        memory = jax.device_put(memory, device)
        out = raw_call(target, DecodeSpec(0.1, UNBOUNDED), jax.device_put(operands, device), memory)
        written.append([np.asarray(x, np.float32) for x in out[:2]])
    for x in written[1:]:
        np.testing.assert_array_equal(x[0], written[0][0])
        np.testing.assert_array_equal(x[1], written[0][1])
