"""A small GPT over bytes, shared by the examples: the model, its text, sampling, saving.

Flax nnx layers, with `jax_flash2.nnx.GroupedQueryAttention`: pre-norm blocks, rotary positions and
grouped heads (several query heads share one key/value head).
"""

import dataclasses
import json
import sysconfig
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_flash2
from jax_flash2.nnx import GroupedQueryAttention


@dataclasses.dataclass(frozen=True)
class Config:
    vocab: int = 256  # bytes
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    dtype: str = "float32"  # of activations and products; parameters stay float32


class Block(nnx.Module):
    def __init__(self, c: Config, rngs: nnx.Rngs, attend):
        linear = partial(nnx.Linear, use_bias=False, dtype=c.dtype, rngs=rngs)
        self.norm1 = nnx.RMSNorm(c.width, dtype=c.dtype, rngs=rngs)
        self.attention = GroupedQueryAttention(
            c.heads,
            c.width,
            num_kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            rope_theta=10_000.0,
            use_bias=False,
            out_kernel_init=nnx.initializers.zeros,  # a block starts as the identity: learns sooner
            attend=attend,
            dtype=c.dtype,
            rngs=rngs,
        )
        self.norm2 = nnx.RMSNorm(c.width, dtype=c.dtype, rngs=rngs)
        self.up = linear(c.width, 4 * c.width)
        self.down = linear(4 * c.width, c.width, kernel_init=nnx.initializers.zeros)

    def __call__(self, x, decode):
        x = x + self.attention(self.norm1(x), is_causal=True, **decode)
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs, attend=jax_flash2.attention):
        c = config
        self.embed = nnx.Embed(c.vocab, c.width, dtype=c.dtype, rngs=rngs)
        self.blocks = nnx.List([Block(c, rngs, attend) for _ in range(c.layers)])
        self.norm = nnx.RMSNorm(c.width, dtype=c.dtype, rngs=rngs)
        self.logits = nnx.Linear(c.width, c.vocab, use_bias=False, dtype=c.dtype, rngs=rngs)

    def __call__(self, tokens, **decode):
        """tokens int [batch, length] -> logits float32 [batch, length, vocab]

        With decode=True the tokens follow those of the cache; query_seq_lengths int32 [batch] says
        how many of them count.
        """
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, decode)
        return self.logits(self.norm(x)).astype(jnp.float32)

    def init_cache(self, batch, length):
        """For `batch` texts of at most `length` tokens."""
        for block in self.blocks:
            block.attention.init_cache((batch, length, block.attention.in_features))


def save(path, model: GPT, config: Config):
    """One .npz file: an array for each parameter, named by its path, and the configuration."""
    params = jax.tree.leaves_with_path(nnx.state(model, nnx.Param))
    arrays = {jax.tree_util.keystr(name): np.asarray(array) for name, array in params}
    np.savez(path, config=json.dumps(dataclasses.asdict(config)), **arrays)


def load(path) -> GPT:
    with np.load(path) as file:
        model = GPT(Config(**json.loads(str(file["config"]))), nnx.Rngs(0))
        graphdef, params = nnx.split(model, nnx.Param)
        params = jax.tree.map_with_path(
            lambda name, _: jnp.asarray(file[jax.tree_util.keystr(name)]), params
        )
    return nnx.merge(graphdef, params)


def generate(model: GPT, prompts: list[bytes], length: int, seed: int = 0, temperature=0.7):
    """`length` bytes more for each prompt: one call for all prompts, then one a byte.

    Returns the texts, prompts and all, and the logits that each new byte was drawn from, float32
    [batch, length, vocab].
    """
    counts = jnp.asarray([len(p) for p in prompts], jnp.int32)
    longest = max(map(len, prompts))
    padded = jnp.asarray([list(p.ljust(longest, b"\0")) for p in prompts], jnp.int32)
    graphdef, params = nnx.split(model, nnx.Param)
    key = jax.random.key(seed)
    tokens, logits = _generate(graphdef, params, padded, counts, length, key, temperature)
    texts = [p + bytes(t) for p, t in zip(prompts, np.asarray(tokens, np.uint8), strict=True)]
    return texts, logits


@partial(jax.jit, static_argnames=("graphdef", "length"))
def _generate(graphdef, params, prompts, counts, length, key, temperature):
    batch, longest = prompts.shape
    model = nnx.merge(graphdef, params)
    model.init_cache(batch, longest + length)
    logits = model(prompts, decode=True, query_seq_lengths=counts)
    last = jnp.take_along_axis(logits, counts[:, None, None] - 1, axis=1)[:, 0]
    with_cache, cache, params = nnx.split(model, nnx.Cache, nnx.Param)

    def add_one(carry, i):
        logits, cache = carry
        token = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
        model = nnx.merge(with_cache, cache, params)
        following = model(token[:, None], decode=True)[:, 0]
        return (following, nnx.state(model, nnx.Cache)), (token, logits)

    _, new = jax.lax.scan(add_one, (last, cache), jnp.arange(length))
    return [jnp.swapaxes(x, 0, 1) for x in new]


def load_text():
    """The source of Python's standard library as bytes: (training, held out), split by file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}
    files = [f for f in sorted(root.rglob("*.py")) if not skipped & set(f.relative_to(root).parts)]
    texts = [np.frombuffer(f.read_bytes(), np.uint8) for f in files]
    held_out = [text for i, text in enumerate(texts) if i % 10 == 0]
    training = [text for i, text in enumerate(texts) if i % 10]
    return np.concatenate(training), np.concatenate(held_out)
