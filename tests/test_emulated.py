"""The Hopper kernels without a GPU: their sources, compiled for the host, run small random problems
on an emulated machine with a random schedule: tests/cuda/emulated/."""

import os
import pathlib
import shlex
import shutil
import subprocess

import pytest

HERE = pathlib.Path(__file__).resolve().parent
EMULATED = HERE / "cuda" / "emulated"
HEAD_DIMS = [64, 96, 128, 192, 256]  # whether this build holds them or not
PROBLEMS, LONGEST = 12, 300  # of each direction and head dim; queries

# -O2 would take longer to compile than its code saves. Fibers jump between stacks, which
# _FORTIFY_SOURCE takes for an error. A tensor map as a parameter is aligned more than GCC passed
# parameters long ago, of which it warns.
FLAGS = ["-std=c++20", "-O1", "-ftree-vectorize", "-U_FORTIFY_SOURCE", "-Wno-psabi"]

# What can go wrong with the machine, and what a driver then says.
FAULTS = {
    "lost-arrival": "deadlock of block",
    "early-signal": "",  # something was read too early: whatever came of it
    "dirty-padding": "is nan",
}


def compile_driver(direction, head_dim, program):
    names = ["c++", "g++", "clang++"]
    compiler = shlex.split(os.environ.get("CXX", "")) or list(filter(shutil.which, names))[:1]
    if not compiler:
        pytest.skip("no C++ compiler to compile the kernels with: set CXX, or install g++")
    includes = [f"-I{EMULATED}", f"-I{HERE.parent / 'cuda'}"]
    source = EMULATED / f"{direction}.cc"
    options = [*FLAGS, *includes, f"-DHEAD_DIM={head_dim}"]
    subprocess.run([*compiler, *options, "-o", program, source], check=True)


def run(program, *fault):
    command = [program, "0", str(PROBLEMS), str(LONGEST), *fault]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["backward", "forward"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_problems_pass_and_faults_are_found(tmp_path, direction, head_dim):
    program = tmp_path / direction
    compile_driver(direction, head_dim, program)
    result = run(program)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == f"{PROBLEMS} problems passed\n"
    for fault, report in FAULTS.items():
        result = run(program, fault)
        assert result.returncode == 1, f"{fault}: {result.stdout}{result.stderr}"
        assert result.stdout.startswith("FAILED") and report in result.stdout
