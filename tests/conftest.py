"""Before jax is imported: the installed package, eight CPU devices, one GPU for many processes."""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The source tree holds no compiled modules; `python -m pytest` would put it first.
sys.path[:] = [p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT]
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# For test_partition.py; a call that names no other runs on the first alone.
_devices = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_devices}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_collection_modifyitems(items):
    if any(device.platform == "gpu" for device in jax.devices()):
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and JAX sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def on_cpu():
    """For a whole file: `pytestmark = pytest.mark.usefixtures("on_cpu")`."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield
