"""FlashAttention-2 for JAX: exact attention in memory linear in the sequence length."""

from jax_flash2._attention import attention
from jax_flash2._context import context_parallel_attention, context_parallel_method
from jax_flash2._decode import decode_attention
from jax_flash2._derivative import CHECKPOINT_NAMES
from jax_flash2._ffi import DISABLED_EXPORT_CHECKS
from jax_flash2._ring import ring_attention
from jax_flash2._sequence import from_zigzag, to_zigzag
from jax_flash2._which import which_kernels

__version__ = "0.1.0"

__all__ = [
    "CHECKPOINT_NAMES",
    "DISABLED_EXPORT_CHECKS",
    "attention",
    "context_parallel_attention",
    "context_parallel_method",
    "decode_attention",
    "from_zigzag",
    "ring_attention",
    "to_zigzag",
    "which_kernels",
]
