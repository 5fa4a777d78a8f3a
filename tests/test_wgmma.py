"""The wrappers of wgmma, every shape and layout, against a plain product: tests/cuda/wgmma.cu."""

import pathlib
import shutil
import subprocess

import jax
import pytest

HERE = pathlib.Path(__file__).resolve().parent


@pytest.mark.gpu
def test_every_shape_and_layout(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc to compile the test with")
    if jax.devices("gpu")[0].compute_capability != "9.0":
        pytest.skip("wgmma is Hopper's")
    binary = tmp_path / "wgmma"
    flags = ["-std=c++20", "-cudart", "static", "-gencode=arch=compute_90a,code=sm_90a"]
    source = HERE / "cuda" / "wgmma.cu"
    subprocess.run([nvcc, *flags, f"-I{HERE.parent / 'cuda'}", "-o", binary, source], check=True)
    run = subprocess.run([binary], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert run.stdout.strip().endswith("108 passed, 0 failed")
