"""The compiled kernels: loads the modules, registers their targets, and calls them.

Every buffer is dense, and all its leading axes are batch axes. Workspaces are results too: XLA
plans their memory.
"""

import dataclasses
import importlib.util
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import jaxlib
from jax.export import DisabledSafetyCheck
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

try:
    from jax_flash2 import _cpu
except ImportError as error:
    raise ImportError(
        f"jax_flash2: the compiled module _cpu does not load ({error}). The package was imported "
        f"from {pathlib.Path(__file__).parent}. If that is the source tree, run from another "
        "folder or with `python -P`, so that the installed package is found, or `pip install -e .`."
    ) from error

if importlib.util.find_spec("jax_flash2._cuda") is None:
    _cuda = None
else:
    from jax_flash2 import _cuda

TOKEN_TILE = _cpu.TOKEN_TILE
HEAD_DIM_TILE = _cpu.HEAD_DIM_TILE
MAX_HEAD_DIM = _cpu.MAX_HEAD_DIM
SEMAPHORE_ROWS = _cpu.SEMAPHORE_ROWS
ROW_STATS = _cpu.ROW_STATS
QUEUES = _cpu.QUEUES
DECODE_BLOCKS = _cpu.DECODE_BLOCKS
DECODE_ROWS = _cpu.DECODE_ROWS
HEAD_DIM_MULTIPLE = 8


def ffi_version_of_jaxlib() -> tuple[int, int]:
    """(major, minor) of XLA's FFI; the headers that jaxlib ships are the only public place."""
    header = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header.read_text()))
    return int(found["MAJOR"]), int(found["MINOR"])


def check_ffi_version(built: tuple[int, int], runtime: tuple[int, int]):
    """Handlers newer than jaxlib would break all of JAX, hence before any is registered."""
    if built[0] != runtime[0] or built[1] > runtime[1]:
        raise ImportError(
            f"jax_flash2 was built for version {built[0]}.{built[1]} of XLA's FFI, and the jaxlib "
            f"installed, {jaxlib.__version__}, has {runtime[0]}.{runtime[1]}. Upgrade jax and "
            "jaxlib, or build jax_flash2 again against this jaxlib."
        )


def built_modules():
    """{platform, as XLA names it: compiled module} of this build."""
    return {"cpu": _cpu} if _cuda is None else {"cpu": _cpu, "CUDA": _cuda}


def _register():
    modules = built_modules()
    for module in modules.values():
        check_ffi_version(module.ffi_api_version(), ffi_version_of_jaxlib())
    for platform, module in modules.items():
        for target, handler in module.registrations().items():
            jax.ffi.register_ffi_target(target, handler, platform=platform)


_register()

# jax.export.export(..., disabled_checks=DISABLED_EXPORT_CHECKS) lets our custom calls pass.
DISABLED_EXPORT_CHECKS = tuple(map(DisabledSafetyCheck.custom_call, _cpu.registrations()))


def forward(q, k, v, bounds, spec):
    """(out [*B, T, N, Hv], lse [*B, N, T]) of one call; `bounds` is None or int32 [*B, 3]."""
    return _call("jax_flash2_forward", forward_results(q, k, v), (q, k, v), bounds, spec)[:2]


def forward_results(q, k, v):
    """What the forward writes: out, lse; next_tile."""
    *batch, t, n, _ = q.shape
    return (
        jax.ShapeDtypeStruct((*batch, t, n, v.shape[-1]), q.dtype),
        jax.ShapeDtypeStruct((*batch, n, t), stats_dtype(q.dtype)),
        jax.ShapeDtypeStruct((*batch, 1), jnp.int32),
    )


def backward(q, k, v, out, lse, dout, dlse, bounds, spec):
    """(dq, dk, dv) of one call."""
    results = backward_results(q, k, v, spec.backward)
    operands = (q, k, v, out, lse, dout, dlse)
    return _call("jax_flash2_backward", results, operands, bounds, spec)[:3]


def backward_results(q, k, v, mode):
    """What the backward writes: dq, dk, dv; then row_stats, dq_accum, semaphores, dkv_partial,
    the shares of dK and dV that are still to be summed, if there are several, and queues."""
    *batch, t, n, h = q.shape
    s, k_heads, hv = v.shape[-3:]
    splits = _group_splits(math.prod(batch), t, s, n, k_heads)
    t_padded = _round_up(t, TOKEN_TILE)
    accum_dim = 0 if mode == "split" else _round_up(h, HEAD_DIM_TILE)
    semaphores = 0 if mode == "split" else t_padded // SEMAPHORE_ROWS
    return (
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)),
        jax.ShapeDtypeStruct((*batch, n, ROW_STATS, t_padded), stats_dtype(q.dtype)),
        jax.ShapeDtypeStruct((*batch, n, t_padded, accum_dim), jnp.float32),
        jax.ShapeDtypeStruct((*batch, n, semaphores), jnp.int32),
        jax.ShapeDtypeStruct(
            (*batch, splits if splits > 1 else 0, s, k_heads, h + hv), jnp.float32
        ),
        jax.ShapeDtypeStruct((*batch, QUEUES), jnp.int32),
    )


def decode(q, k, v, lengths, page_table, spec):
    """(out [*B, T, N, Hv], lse [*B, N, T]) of one call that decodes; lengths int32 [*B].

    k and v are [*B, S, K, H] and [*B, S, K, Hv]; with a page table, int32 [*B, P], they are
    [pages, page size, K, H] and [pages, page size, K, Hv].
    """
    target, operands = "jax_flash2_decode", (q, k, v, lengths)
    if page_table is not None:
        target, operands = f"{target}_paged", (*operands, page_table)
    results = decode_results(q, k, v)
    return jax.ffi.ffi_call(target, results)(*operands, spec=dataclasses.asdict(spec))[:2]


def decode_results(q, k, v):
    """What decoding writes: out, lse; pieces, which thread blocks of a GPU leave for each other
    where they share a sequence."""
    *batch, t, n, _ = q.shape
    rows = t * (n // k.shape[-2])
    rows = min(rows, DECODE_ROWS) if isinstance(rows, int) else DECODE_ROWS
    piece = _cpu.decode_piece_floats(rows, v.shape[-1])
    return (
        jax.ShapeDtypeStruct((*batch, t, n, v.shape[-1]), q.dtype),
        jax.ShapeDtypeStruct((*batch, n, t), stats_dtype(q.dtype)),
        jax.ShapeDtypeStruct((DECODE_BLOCKS, piece), jnp.float32),
    )


def _group_splits(*lengths):
    """The kernels' rule; one where jax.export leaves a length open."""
    return _cpu.group_splits(*lengths) if all(isinstance(x, int) for x in lengths) else 1


def stats_dtype(dtype):
    """The log-sum-exp of 16-bit inputs is float32."""
    return jnp.promote_types(dtype, jnp.float32)


def pad_head_dim(x):
    """The kernels take head dims in multiples of 8; zeros there change nothing."""
    pad = -x.shape[-1] % HEAD_DIM_MULTIPLE
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)]) if pad else x


def _call(target, results, operands, bounds, spec):
    if bounds is not None:
        target, operands = f"{target}_ragged", (*operands, bounds)
    return jax.ffi.ffi_call(target, results)(*operands, spec=dataclasses.asdict(spec))


def guard(operands, spec):
    """The operands, with errors of our own where the call's lowering would fail."""
    return _guard.bind(*operands, caller=spec.caller, family=spec.family)


def _round_up(x, multiple):
    return (x + multiple - 1) // multiple * multiple


def _lower_guard(ctx, *operands, caller, family):
    for platform in ctx.module_context.platforms:
        # Lowering for a machine elsewhere (jax.export) is no error.
        elsewhere = platform == "cuda" and not _has_cuda_device()
        check_platform(platform, ctx.avals_in[0].dtype, family, elsewhere, caller)
    return operands


def check_platform(platform, dtype, family, elsewhere=False, caller="attention"):
    """Raises where XLA would find no kernel, or one that refuses: an earlier and clearer text."""
    way_out = 'Run it on the CPU (jax.default_device), or use implementation="xla".'
    if platform not in ("cpu", "cuda"):
        raise NotImplementedError(
            f"jax_flash2.{caller}: there is no kernel for platform {platform!r}. {way_out}"
        )
    if platform != "cuda" and family != "auto":
        raise NotImplementedError(
            f'jax_flash2.{caller}: implementation="cuda_{family}" needs a CUDA device, and '
            f"this call is for platform {platform!r}. Leave implementation out."
        )
    if platform == "cuda" and dtype == jnp.float64:
        raise NotImplementedError(
            f"jax_flash2.{caller}: there is no float64 kernel for CUDA. {way_out}"
        )
    if platform == "cuda" and _cuda is None and not elsewhere:
        raise NotImplementedError(
            f"jax_flash2.{caller}: this build has no CUDA kernels ({_cpu.cuda_skipped()}). "
            f"Build it again with nvcc on the PATH. {way_out}"
        )


def instruction_set() -> str:
    """That of the CPU kernels: of what this machine has, the best that they were compiled for."""
    return _cpu.instruction_set()


def select(q, k, v, spec, capability):
    """{pass: {"family", "head_dim", "reason"}, "mode": how the backward works} of a call on a
    GPU of that compute capability."""
    major, minor = capability
    if not _cuda.select_code(major, minor):
        archs = ", ".join(map(str, _cuda.build_info()["archs"]))
        raise NotImplementedError(
            f"jax_flash2.attention: this build has CUDA kernels for {archs}, none of which a GPU "
            f"of compute capability {major}.{minor} runs. Build it again with "
            f"JAX_FLASH2_CUDA_ARCHS={major}{minor}, for compute capability 8.0 and up."
        )
    return _cuda.select(
        batch=math.prod(q.shape[:-3]),
        query_len=q.shape[-3],
        kv_len=k.shape[-3],
        query_heads=q.shape[-2],
        kv_heads=k.shape[-2],
        head_dim=q.shape[-1],
        value_dim=v.shape[-1],
        dtype=q.dtype.name,
        spec=dataclasses.asdict(spec),
        major=major,
    )


def _has_cuda_device():
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


# An identity on a kernel's operands that leaves nothing behind in the program. Its lowering is the
# first to know the platform.
_guard = Primitive("jax_flash2_guard")
_guard.multiple_results = True
_guard.def_impl(lambda *operands, **_: operands)
_guard.def_abstract_eval(lambda *operands, **_: operands)
mlir.register_lowering(_guard, _lower_guard)
batching.primitive_batchers[_guard] = lambda operands, axes, **parameters: (
    _guard.bind(*operands, **parameters),
    axes,
)
