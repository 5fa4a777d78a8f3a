"""`python -m jax_flash2`: what is installed, what it would use here, and whether that is right."""

import functools
import platform
import sys

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from jax_flash2 import __version__, _ffi, attention, decode_attention, which_kernels
from jax_flash2._spec import BACKWARD_MODES

# The largest error that a right kernel makes, relative to the largest value. On a GPU, products of
# float32 are by default taken in TF32, as XLA's own are.
ALLOWED = {
    "cpu": {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-5, "float64": 1e-13},
    "gpu": {"float16": 4e-3, "bfloat16": 3e-2, "float32": 4e-3},
}


def main() -> int:
    print_versions()
    print_kernels()
    print("\nSelf-check against the definition: largest error of out, LSE, dQ, dK, dV, decoding")
    failed = [
        f"{device.platform} {dtype}"
        for device in devices_to_check()
        for dtype, allowed in ALLOWED[device.platform].items()
        if not passes(device, dtype, allowed)
    ]
    if failed:
        print(f"\njax_flash2 does NOT work here: wrong are {', '.join(failed)}")
        return 1
    print(f"\njax_flash2 works here, on {' and '.join(d.platform for d in devices_to_check())}")
    return 0


def print_versions():
    built, runtime = _ffi.built_modules()["cpu"].ffi_api_version(), _ffi.ffi_version_of_jaxlib()
    print(f"jax_flash2 {__version__}, Python {platform.python_version()}")
    print(f"jax {jax.__version__}, jaxlib {jaxlib.__version__}")
    print("XLA FFI {}.{}, built for {}.{}".format(*runtime, *built))
    print(f"JAX's devices: {', '.join(map(str, jax.devices()))}")


def print_kernels():
    modules = _ffi.built_modules()
    print(f"\nCPU kernels: yes; this machine runs those for {_ffi.instruction_set()}")
    if "CUDA" not in modules:
        print(f"CUDA kernels: none in this build: {modules['cpu'].cuda_skipped()}")
        return
    info = modules["CUDA"].build_info()
    print(
        f"CUDA kernels: for {', '.join(map(str, info['archs']))}; head dims up to "
        f"{', '.join(map(str, info['head_dims']))}; by nvcc {info['nvcc']}"
    )
    gpus = modules["CUDA"].device_report()
    for gpu in gpus:
        capability = ".".join(map(str, gpu["compute_capability"]))
        kernels = gpu["kernels"] or "no kernel of this build"
        print(f"  {gpu['name']} (compute capability {capability}) runs {kernels}")
        if gpu["kernels"]:
            print_selection(capability)
    if not gpus:
        print(f"  no GPU here: {modules['CUDA'].driver_error()}")
    elif all(device.platform == "cpu" for device in jax.devices()):
        print("  JAX does not see the GPU: is JAX installed with CUDA, as jax[cuda13]?")


def print_selection(capability):
    for dtype in ALLOWED["gpu"]:
        x = jax.ShapeDtypeStruct((1, 1, 1, 64), dtype)
        forward, backward, _ = which_kernels(x, x, x, device=capability)
        print(f"    {dtype}: forward {forward.family} ({forward.reason}),")
        print(f"    {'':{len(dtype)}}  backward {backward.family} ({backward.reason})")


def devices_to_check():
    """One device of each platform that the kernels are for."""
    devices = []
    for name in ("cpu", "cuda"):
        try:
            devices.append(jax.devices(name)[0])
        except RuntimeError:  # JAX has no such platform
            continue
    return devices


def passes(device, dtype, allowed) -> bool:
    name = f"  {device.platform} {dtype:9}"
    try:
        with jax.enable_x64(dtype == "float64"), jax.default_device(device):
            error = self_check(dtype)
    except Exception as exception:
        print(f"{name} FAILED: {type(exception).__name__}: {exception}")
        return False
    right = error <= allowed  # false of NaN
    print(f"{name} {error:.1e}, allowed {allowed:.0e}: {'right' if right else 'WRONG'}")
    return right


def self_check(dtype) -> float:
    """The largest relative error of forward, gradients and decoding, with every mask at once."""
    rng = np.random.default_rng(0)
    batch, t, s, n, k, h = 2, 150, 200, 4, 2, 64
    shapes = [(t, n, h), (s, k, h), (s, k, h), (t, n, h), (t, n)]
    *arrays, dlse = (jnp.asarray(rng.standard_normal((batch, *x)), dtype) for x in shapes)
    wide = jnp.promote_types(dtype, jnp.float32)
    lengths = jnp.array([s - 7, s], jnp.int32)

    def evaluate(arrays, **arguments):
        def call(*qkv):
            return attention(
                *qkv,
                is_causal=True,
                query_offset=s - t,
                local_window_size=(120, 0),
                query_seq_lengths=jnp.array([t, t - 20], jnp.int32),
                key_value_seq_lengths=lengths,
                return_residual=True,
                **arguments,
            )

        *qkv, dout = arrays
        (out, lse), vjp = jax.vjp(call, *qkv)
        return (out, jnp.where(lse > -jnp.inf, lse, 0), *vjp((dout, dlse.astype(lse.dtype))))

    def decode(arrays, **arguments):
        query, *caches = arrays[:3]
        return decode_attention(
            query[:, -3:],
            *caches,
            lengths,
            local_window_size=120,
            return_residual=True,
            **arguments,
        )

    def plain(arrays):
        out = evaluate(arrays, implementation="xla", precision="highest")
        return *out, *decode(arrays, implementation="xla")

    def kernels(arrays, mode):
        return *evaluate(arrays, backward=mode), *decode(arrays)

    expected = jax.jit(plain)([x.astype(wide) for x in arrays])
    return max(
        float(jnp.abs(x.astype(wide) - y).max() / jnp.abs(y).max())
        for mode in BACKWARD_MODES
        for x, y in zip(
            jax.jit(functools.partial(kernels, mode=mode))(arrays), expected, strict=True
        )
    )


if __name__ == "__main__":
    sys.exit(main())
