"""Attention and its gradient in ten lines, held against the plain definition.

Run: python examples/01_attention.py
"""

import jax
import jax.numpy as jnp

from jax_flash2 import attention

batch, length, heads, kv_heads, head_dim = 2, 1024, 8, 2, 64
keys = jax.random.split(jax.random.key(0), 4)
q = jax.random.normal(keys[0], (batch, length, heads, head_dim))
k = jax.random.normal(keys[1], (batch, length, kv_heads, head_dim))  # 4 query heads share one
v = jax.random.normal(keys[2], (batch, length, kv_heads, head_dim))
weight = jax.random.normal(keys[3], q.shape)


def loss(q, k, v, implementation=None):
    out = attention(q, k, v, is_causal=True, implementation=implementation)
    return jnp.sum(out * weight)


gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), static_argnums=3)
value, grads = gradient(q, k, v, None)
plain_value, plain_grads = gradient(q, k, v, "xla")

print(f"device      {jax.devices()[0].device_kind}")
print(f"loss        {value:.4f}, plain definition {plain_value:.4f}")
for name, got, plain in zip(("dq", "dk", "dv"), grads, plain_grads, strict=True):
    error = jnp.max(jnp.abs(got - plain)) / jnp.max(jnp.abs(plain))
    print(f"{name} {got.shape!s:18} largest relative difference {error:.1e}")
