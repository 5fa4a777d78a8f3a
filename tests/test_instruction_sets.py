"""The CPU kernels for lesser machines than this one, by a part of the battery in a process each."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jax_flash2 import _ffi

ROOT = Path(__file__).resolve().parents[1]
LEVELS = ["baseline", "avx2", "avx512", "avx512bf16"]  # each has all of those before it
BEST = _ffi.instruction_set()
# Of test_attention.py and test_decode.py; "one_kv_head" is in both.
CASES = ["value_dim_odd", "one_kv_head", "lengths_offset_and_window", "pages_missing_large"]


@pytest.mark.parametrize("level", LEVELS[: LEVELS.index(BEST)])
def test_battery(level):
    environment = {**os.environ, "JAX_FLASH2_CPU_ISA": level}

    def python(*arguments):
        done = subprocess.run(
            [sys.executable, "-P", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    script = "from jax_flash2 import _ffi; print(_ffi.instruction_set())"
    assert python("-c", script).strip() == level
    files = ("tests/test_attention.py", "tests/test_decode.py")
    chosen = f"battery and cpu and ({' or '.join(CASES)})"
    printed = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files)
    passed = int(re.search(r"(\d+) passed", printed)[1])
    assert passed == 4 * (len(CASES) + 1), "each in four formats"
