"""`python -m jax_flash2` tells what is there, and its exit code whether it is right."""

import re
import subprocess
import sys

import jax

from jax_flash2 import __version__, _ffi


def run(tmp_path, *arguments):
    done = subprocess.run(
        [sys.executable, "-P", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    return done.returncode, done.stdout.rstrip().split("\n"), done.stderr


def test_all_is_well(tmp_path):
    code, lines, errors = run(tmp_path, "-m", "jax_flash2")
    assert code == 0, (lines, errors)
    assert re.fullmatch(r"jax_flash2 works here, on cpu( and gpu)?", lines[-1])
    assert lines[0].startswith(f"jax_flash2 {__version__}, Python {sys.version_info[0]}.")
    assert lines[1].startswith(f"jax {jax.__version__}, jaxlib ")
    assert sum(": right" in line for line in lines) >= 4
    cuda = next(line for line in lines if line.startswith("CUDA kernels: "))
    if _ffi._cuda is None:
        assert cuda == f"CUDA kernels: none in this build: {_ffi._cpu.cuda_skipped()}"
    else:
        assert all(str(arch) in cuda for arch in _ffi._cuda.build_info()["archs"])


def test_what_is_wrong_is_named(tmp_path):
    """No error is small enough, and one dtype has no kernel."""
    script = """if True:
        import sys
        from jax_flash2 import __main__ as main
        main.ALLOWED = {"cpu": {"float16": 1.0, "float32": 0.0, "int8": 1.0}, "gpu": {}}
        sys.exit(main.main())
    """
    code, lines, errors = run(tmp_path, "-c", script)
    assert code == 1, (lines, errors)
    assert lines[-1] == "jax_flash2 does NOT work here: wrong are cpu float32, cpu int8"
    assert any(re.search(r"cpu float16 .*: right$", line) for line in lines)
    assert any(re.search(r"cpu float32 .*: WRONG$", line) for line in lines)
    assert any(re.search(r"cpu int8 +FAILED: TypeError: jax_flash2.attention: ", x) for x in lines)
