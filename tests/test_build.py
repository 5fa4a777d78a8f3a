"""What was built, and what the build says when it cannot do what was asked."""

import importlib.util
import pathlib
import shutil
import subprocess
import sys
import zlib

import jax
import pytest

import jax_flash2
from jax_flash2 import _cpu

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = pathlib.Path(jax_flash2.__file__).parent
HAS_CUDA = importlib.util.find_spec("jax_flash2._cuda") is not None
needs_cuda_module = pytest.mark.skipif(not HAS_CUDA, reason=f"no CUDA: {_cpu.cuda_skipped()}")
MAX_COMPRESSED_BYTES = 25 << 20


def modules():
    return sorted(PACKAGE.glob("_cpu.*so")) + sorted(PACKAGE.glob("_cuda.*so"))


def test_modules_use_the_stable_abi_where_python_has_it():
    assert len(modules()) == 1 + HAS_CUDA
    if sys.version_info >= (3, 12):
        assert all(path.name.endswith(".abi3.so") for path in modules())


def test_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_a_build_has_cuda_or_says_why_not():
    assert bool(_cpu.cuda_skipped()) != HAS_CUDA


def test_headers_are_not_newer_than_jaxlib():
    header = pathlib.Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text()
    major, minor = _cpu.ffi_api_version()
    assert f"#define XLA_FFI_API_MAJOR {major}\n" in header
    runtime_minor = header.split("#define XLA_FFI_API_MINOR ")[1].split()[0]
    assert minor <= int(runtime_minor)


def test_modules_fit_into_a_wheel():
    compressed = sum(len(zlib.compress(path.read_bytes(), 6)) for path in modules())
    assert compressed <= MAX_COMPRESSED_BYTES


@needs_cuda_module
def test_cuda_module_brings_its_runtime():
    from jax_flash2 import _cuda

    text = pathlib.Path(_cuda.__file__).read_bytes()
    assert b"libcudart.so" not in text, "the CUDA runtime must be linked in"
    assert set(_cuda.registrations()) == set(_cpu.registrations())
    assert _cuda.attention_spec() == _cpu.attention_spec()
    assert _cuda.decode_spec() == _cpu.decode_spec()


@needs_cuda_module
def test_cuda_module_reports_what_it_holds():
    from jax_flash2 import _cuda

    info = _cuda.build_info()
    assert info["head_dims"] == sorted(info["head_dims"])
    assert info["head_dims"][-1] == _cuda.MAX_HEAD_DIM
    assert all(int(arch.split("-")[0].rstrip("a")) >= 80 for arch in info["archs"])
    devices, error = _cuda.device_report(), _cuda.driver_error()
    assert (error == "") == bool(devices)
    assert all(d.keys() == {"name", "compute_capability", "kernels"} for d in devices)


@pytest.fixture(scope="module")
def configure(tmp_path_factory):
    """Runs CMake up to the end of its configure step; without a compiler for CUDA."""
    path = f"{pathlib.Path(sys.executable).parent}:/usr/bin:/bin"
    cmake = shutil.which("cmake", path=path)

    def run(*options, **environment):
        build = tmp_path_factory.mktemp("configure")
        command = [cmake, "-G", "Ninja", "-S", ROOT, "-B", build]
        command += [f"-DPython_EXECUTABLE={sys.executable}"]
        command += [f"-DJAX_FLASH2_XLA_INCLUDE={jax.ffi.include_dir()}", *options]
        environment = {"PATH": path, "CUDACXX": "/nowhere/nvcc", **environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    return run


def test_cuda_without_a_compiler_names_the_ways_out(configure):
    status, text = configure("-DJAX_FLASH2_CUDA=on")
    assert status != 0
    assert "JAX_FLASH2_CUDA=on, but no working CUDA compiler (nvcc) was found" in text
    assert "install the CUDA toolkit" in text
    assert "JAX_FLASH2_NVCC=pypi" in text


def test_auto_without_a_compiler_builds_for_the_cpu_and_says_so(configure):
    status, text = configure("-DJAX_FLASH2_CUDA=auto")
    assert status == 0, text
    assert "building the CPU part only: no working CUDA compiler" in text


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (["-DJAX_FLASH2_CUDA=maybe"], {}, "should be auto, on or off, got 'maybe'"),
        ([], {"JAX_FLASH2_NVCC": "/usr/bin/nvcc"}, "should be unset or pypi, got '/usr/bin/nvcc'"),
        (["-DJAX_FLASH2_XLA_INCLUDE=/nowhere"], {}, "no xla/ffi/api/ffi.h in /nowhere"),
    ],
)
def test_wrong_options_are_named(configure, options, environment, message):
    status, text = configure(*options, **environment)
    assert status != 0
    assert message in text
