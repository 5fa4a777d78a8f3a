"""The static half of a call: what jit retraces for, and what the kernels get as attributes."""

import dataclasses
import math
from typing import ClassVar

import jax

# A band edge at or past this distance hides nothing; the same number as in cuda/core/mask.h.
UNBOUNDED = 2**29
BACKWARD_MODES = ("fused", "deterministic", "split")
# Values of `implementation` that hold a call to one family of CUDA kernels.
FAMILIES = {"cuda_sm80": "sm80"}


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The attributes of a kernel, named, ordered and typed as in cuda/core/spec.h.

    Query i sees key j iff band_lower <= j - i <= band_upper. Specs that compare equal share one
    compiled call, and 3 == 3.0: use `make_spec`, which makes each field of exactly its type.
    """

    scale: float
    band_lower: int
    band_upper: int
    precision: str  # "default", "high" or "highest": how float32 products are taken
    backward: str  # one of BACKWARD_MODES
    family: str  # CUDA kernels: "auto", the best for the device, or "sm80"
    caller: ClassVar[str] = "attention"  # whose errors name it


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """The attributes of a kernel that decodes; see AttentionSpec. Use `make_decode_spec`."""

    scale: float  # positive
    window_left: int  # keys that a query sees before its own position; UNBOUNDED: all
    family: ClassVar[str] = "auto"
    caller: ClassVar[str] = "decode_attention"


def make_spec(
    *, scale, is_causal, window, offset, precision, backward, dtype, implementation=None
) -> AttentionSpec:
    """The spec of a checked call; `offset` is the static part of the query offset.

    `scale` is positive: see `fold_scale`.
    """
    lower, upper = band(is_causal, window, offset)
    return AttentionSpec(
        scale=float(scale),
        band_lower=lower,
        band_upper=upper,
        precision=precision_name(precision) if dtype == "float32" else "default",
        backward="fused" if backward == "auto" else str(backward),
        family=FAMILIES.get(implementation, "auto"),
    )


def make_decode_spec(*, scale, window) -> DecodeSpec:
    """The spec of a checked call; `scale` is positive: see `fold_scale`."""
    left = UNBOUNDED if window is None else min(int(window[0]), UNBOUNDED)
    return DecodeSpec(scale=float(scale), window_left=left)


def fold_scale(scale) -> tuple[float, float]:
    """(factor of the query, positive scale): the kernels take the largest score for the heaviest.

    A tiny scale, 0 among them, goes into the query whole: LSE / scale has to be a float32.
    """
    if abs(scale) < 2.0**-104:
        return scale, 1.0
    return math.copysign(1.0, scale), abs(scale)


def band(is_causal, window, offset) -> tuple[int, int]:
    """Causal, window and offset as the one interval that j - i has to lie in."""
    left, right = (None, None) if window is None else window
    if is_causal:
        right = 0
    lower = -UNBOUNDED if left is None else int(offset) - int(left)
    upper = UNBOUNDED if right is None else int(offset) + int(right)
    # An edge may come to lie so far out that it hides everything: it must stay short of UNBOUNDED
    # on that side, which the kernels read as no edge at all.
    return max(-UNBOUNDED, min(lower, UNBOUNDED - 1)), min(UNBOUNDED, max(upper, 1 - UNBOUNDED))


def precision_name(precision) -> str:
    """One of JAX's names or aliases (such as "tensorfloat32") as "default", "high" or "highest"."""
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # as every other product in JAX
        try:
            precision = jax.lax.Precision(precision)
        except ValueError:  # an algorithm of XLA's, such as "F32_F32_F32": never give less
            precision = jax.lax.Precision.HIGHEST
    return jax.lax.Precision(precision).name.lower()
