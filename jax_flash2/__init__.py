"""FlashAttention-2 for JAX: exact attention in memory linear in the sequence length."""

from jax_flash2._attention import attention
from jax_flash2._decode import decode_attention
from jax_flash2._derivative import CHECKPOINT_NAMES
from jax_flash2._which import which_kernels

__version__ = "0.1.0"

__all__ = ["CHECKPOINT_NAMES", "attention", "decode_attention", "which_kernels"]
