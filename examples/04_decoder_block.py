"""A decoder block in ten lines: grouped heads, rotary positions, a gradient, and a cache.

Run: python examples/04_decoder_block.py
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jax_flash2.nnx import GroupedQueryAttention


class Block(nnx.Module):
    def __init__(self, width, rngs, **heads):
        self.norm1 = nnx.RMSNorm(width, rngs=rngs)
        self.attention = GroupedQueryAttention(in_features=width, rngs=rngs, **heads)
        self.norm2 = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x, decode=False):
        x = x + self.attention(self.norm1(x), is_causal=True, decode=decode)
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


batch, length, width = 2, 128, 256
block = Block(width, nnx.Rngs(0), num_heads=8, num_kv_heads=2, rope_theta=10_000.0)
x = jax.random.normal(jax.random.key(1), (batch, length, width))


@nnx.jit
def value_and_gradient(block, x):
    return nnx.value_and_grad(lambda block: jnp.mean(block(x) ** 2))(block)


@nnx.jit
def step(block, x):
    return block(x, decode=True)


loss, gradient = value_and_gradient(block, x)
size = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
whole = nnx.jit(lambda block, x: block(x))(block, x)
block.attention.init_cache(x.shape)
parts = [step(block, x[:, :120])]  # all at once, and the rest token by token
parts += [step(block, x[:, i : i + 1]) for i in range(120, length)]
difference = jnp.max(jnp.abs(jnp.concatenate(parts, axis=1) - whole))

kernel = block.attention.key.kernel.shape
print(f"key kernel  {kernel}: width, key/value heads, head dim")
print(f"loss        {loss:.4f}, norm of its gradient {size:.4f}")
print(
    f"cache       {block.attention.cached_key.shape}, with {block.attention.cache_index[0]} tokens"
)
print(f"by token    largest difference from the whole {difference:.1e}")
