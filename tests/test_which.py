"""`which_kernels` says what a call would run. CUDA's choices can be asked for with no GPU here."""

import re

import jax
import jax.numpy as jnp
import pytest

from jax_flash2 import _ffi, attention, which_kernels

needs_cuda_module = pytest.mark.skipif(_ffi._cuda is None, reason="no CUDA kernels in this build")


def arrays(dtype="bfloat16", h=64, hv=None, s=40):
    shapes = (2, 50, 4, h), (2, s, 2, h), (2, s, 2, hv or h)
    return [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes]


def on_gpu(*args, device="9.0", **arguments):
    return which_kernels(*args, device=device, **arguments)


def test_on_the_cpu():
    kernels = which_kernels(*arrays(), device=jax.devices("cpu")[0], backward="split")
    assert kernels.forward == kernels.backward
    assert kernels.forward.family == "cpu"
    assert re.search(r"(avx512bf16|avx512|avx2|baseline)$", kernels.forward.reason)
    assert kernels.mode == "split"


def test_the_device_is_that_of_query():
    cpu = jax.devices("cpu")[0]
    on_cpu = [jax.device_put(jnp.zeros(x.shape, x.dtype), cpu) for x in arrays()]
    assert which_kernels(*on_cpu).forward.family == "cpu"
    with jax.default_device(cpu):
        assert which_kernels(*arrays()).forward.family == "cpu"
        assert jax.jit(lambda *x: which_kernels(*x).forward.family == "cpu")(*on_cpu)


def test_the_plain_definition():
    kernels = which_kernels(*arrays(h=1000), implementation="xla")
    assert kernels.forward.family == kernels.backward.family == "xla"
    assert kernels.mode is None


def test_wrong_calls_fail_as_they_do_in_attention():
    wrong_calls = [
        (arrays()[:2] + arrays(s=41)[2:], {}),
        (arrays(h=1000), {}),
        (arrays(), {"backward": "fast"}),
        (arrays(), {"implementation": "cuda_sm80"}),
        (arrays(), {"is_causal": 1}),
        (arrays(), {"return_residual": None}),
    ]
    with jax.default_device(jax.devices("cpu")[0]):
        for shapes, arguments in wrong_calls:
            zeros = [jnp.zeros(x.shape, x.dtype) for x in shapes]
            with pytest.raises(Exception) as expected:
                jax.block_until_ready(attention(*zeros, **arguments))
            with pytest.raises(expected.type) as got:
                which_kernels(*shapes, **arguments)
            assert str(got.value) == str(expected.value)


def test_a_wrong_device_is_named():
    with pytest.raises(ValueError, match=r'compute capability such as "9\.0", got sm_90'):
        which_kernels(*arrays(), device="sm_90")


def test_without_cuda_kernels(monkeypatch):
    monkeypatch.setattr(_ffi, "_cuda", None)
    with pytest.raises(NotImplementedError, match="this build has no CUDA kernels"):
        on_gpu(*arrays())


@needs_cuda_module
def test_on_hopper():
    has_sm90 = any(str(arch).startswith("90") for arch in _ffi._cuda.build_info()["archs"])
    for dtype in ("float16", "bfloat16"):
        kernel = on_gpu(*arrays(dtype)).forward
        assert kernel.family == ("sm90" if has_sm90 else "sm80")
        assert kernel.head_dim == 64
        assert kernel.reason
        kernels = on_gpu(*arrays(dtype))
        assert kernels.backward == kernels.forward
        for mode in ("deterministic", "split"):
            assert on_gpu(*arrays(dtype), backward=mode) == kernels._replace(mode=mode)
    for mode, h, s, on_sm90 in (
        ("fused", 64, 1024, "deterministic"),
        ("fused", 128, 1025, "fused"),
        ("deterministic", 128, 1025, "deterministic"),
        ("fused", 192, 1025, "split"),
        ("deterministic", 256, 1024, "split"),
    ):
        assert on_gpu(*arrays(h=h, s=s), backward=mode).mode == (on_sm90 if has_sm90 else mode)
    single = on_gpu(*arrays("float32")).forward
    assert (single.family, single.head_dim) == ("sm80", 64)
    assert on_gpu(*arrays(s=0)).forward == ("sm80", 64, "there are no keys")
    asked = on_gpu(*arrays(), implementation="cuda_sm80")
    assert asked.forward == asked.backward == ("sm80", 64, "these were asked for")


@needs_cuda_module
@pytest.mark.parametrize("device", ["8.0", "8.6"])
def test_on_ampere(device):
    if not _ffi._cuda.select_code(*map(int, device.split("."))):
        pytest.skip(f"this build has no code for {device}")
    kernels = on_gpu(*arrays(), device=device)
    assert kernels.forward == kernels.backward == ("sm80", 64, "the GPU is not a Hopper")
    assert kernels.mode == "fused"


@needs_cuda_module
def test_head_dims_round_up_to_a_compiled_one():
    compiled = _ffi._cuda.build_info()["head_dims"]
    for h, hv in ((1, 1), (64, 64), (65, 8), (8, 65), (192, 128), (256, 256)):
        kernels = on_gpu(*arrays(h=h, hv=hv))
        expected = min(x for x in compiled if x >= max(h, hv))
        assert kernels.forward.head_dim == kernels.backward.head_dim == expected


@needs_cuda_module
def test_a_gpu_that_no_code_is_for():
    with pytest.raises(NotImplementedError, match=r"compute capability 7\.5.*CUDA_ARCHS=75"):
        on_gpu(*arrays(), device="7.5")
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="no float64 kernel"):
        on_gpu(*arrays("float64"))


@pytest.mark.gpu
def test_on_this_gpu():
    gpu = jax.devices("gpu")[0]
    kernels = which_kernels(*arrays(), device=gpu)
    assert kernels == which_kernels(*arrays(), device=gpu.compute_capability)
    assert kernels.forward.family == ("sm90" if gpu.compute_capability == "9.0" else "sm80")
