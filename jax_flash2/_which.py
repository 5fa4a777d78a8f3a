"""`which_kernels`: what a call would run, asked of the same code that chooses when it runs."""

import inspect
import re
from typing import NamedTuple

import jax

from jax_flash2 import _checks, _ffi
from jax_flash2._attention import attention, checked, kernel_call


class Kernel(NamedTuple):
    """What computes one pass of a call."""

    family: str
    """"sm90": made for Hopper; "sm80": for every GPU since Ampere; "cpu"; "xla"."""
    head_dim: int | None
    """The compiled head dim that H and Hv run on; None where each runs as it is."""
    reason: str
    """Why these, and not others."""


class Kernels(NamedTuple):
    """What `which_kernels` returns."""

    forward: Kernel
    backward: Kernel
    mode: str | None
    """How the backward works: "fused", "deterministic" or "split", on Hopper not always as asked:
    where another is faster, and no less repeatable, it serves; None for "xla"."""


def which_kernels(query, key, value, *, device=None, **arguments) -> Kernels:
    """The kernels that a call of `attention` would run, and why; runs none of them.

    Args:
      query, key, value, arguments: as `attention` takes them; the arrays may also be
        `jax.ShapeDtypeStruct`.
      device: where the call would run: a jax.Device, or a GPU that need not be here, by its
        compute capability, such as "9.0". None is the device of `query`, else JAX's default.

    Returns:
      Kernels(forward, backward, mode), the first two of them Kernel(family, head_dim, reason).

    Raises:
      What `attention` raises for that call on that device.
    """
    bound = inspect.signature(attention).bind(query, key, value, **arguments)
    bound.apply_defaults()
    arguments = dict(list(bound.arguments.items())[3:])
    _checks.flag("return_residual", arguments.pop("return_residual"))
    if not all(hasattr(x, "dtype") and hasattr(x, "shape") for x in (query, key, value)):
        query, key, value = map(jax.numpy.asarray, (query, key, value))
    backward, implementation = arguments["backward"], arguments["implementation"]
    definition = checked(query, key, value, **arguments)
    if implementation == "xla":
        plain = Kernel("xla", None, "the plain definition was asked for")
        return Kernels(plain, plain, None)
    spec, _, _ = kernel_call(query, backward, implementation, **definition)

    platform, capability = _locate(query if device is None else device)
    _ffi.check_platform(platform, query.dtype, spec.family)
    if platform == "cpu":
        host = Kernel("cpu", None, f"platform cpu; instruction set {_ffi.instruction_set()}")
        return Kernels(host, host, spec.backward)
    chosen = _ffi.select(query, key, value, spec, capability)
    return Kernels(Kernel(**chosen["forward"]), Kernel(**chosen["backward"]), chosen["mode"])


def _locate(device):
    """(platform as XLA lowers for it, compute capability of a GPU) of a device, or of an array."""
    if isinstance(device, str):
        if not re.fullmatch(r"\d+\.\d", device):
            raise _checks.wrong(
                ValueError, "device", 'a jax.Device or a compute capability such as "9.0"', device
            )
        return "cuda", _capability(device)
    if not isinstance(device, jax.Device):
        device = _device_of(device)
    if device.platform != "gpu":
        return device.platform, None
    if "cuda" not in device.client.platform_version.lower():
        return "rocm", None
    return "cuda", _capability(device.compute_capability)


def _capability(text):
    major, minor = text.split(".")
    return int(major), int(minor)


def _device_of(x):
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        return min(x.devices(), key=lambda device: device.id)
    default = jax.config.jax_default_device
    return default if isinstance(default, jax.Device) else jax.devices(default)[0]
