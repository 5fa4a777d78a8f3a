"""Before jax is imported: test the installed package, and let several processes share one GPU."""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The source tree holds no compiled modules; `python -m pytest` would put it first.
sys.path[:] = [p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT]
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_collection_modifyitems(items):
    if any(device.platform == "gpu" for device in jax.devices()):
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and JAX sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
