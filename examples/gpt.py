"""A small GPT over bytes, shared by the examples: the model, its text, sampling, saving.

Flax nnx layers around `jax_flash2.attention`: pre-norm blocks, rotary positions, and grouped heads
(several query heads share one key/value head).
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


@dataclasses.dataclass(frozen=True)
class Config:
    vocab: int = 256  # bytes
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    dtype: str = "float32"  # of activations and products; parameters stay float32


def rotary(x):
    """Turns the channels of x [batch, token, head, dim] by angles that grow with the position."""
    low, high = jnp.split(x, 2, axis=-1)
    rates = 10_000.0 ** -jnp.linspace(0, 1, low.shape[-1], endpoint=False)
    angles = (jnp.arange(x.shape[1])[:, None] * rates)[:, None, :]
    sin, cos = jnp.sin(angles).astype(x.dtype), jnp.cos(angles).astype(x.dtype)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


class Attention(nnx.Module):
    def __init__(self, c: Config, rngs: nnx.Rngs):
        project = partial(nnx.LinearGeneral, c.width, use_bias=False, dtype=c.dtype, rngs=rngs)
        self.query = project((c.heads, c.head_dim))
        self.key = project((c.kv_heads, c.head_dim))
        self.value = project((c.kv_heads, c.head_dim))
        self.out = nnx.LinearGeneral(
            (c.heads, c.head_dim),
            c.width,
            axis=(-2, -1),
            use_bias=False,
            kernel_init=nnx.initializers.zeros,  # a block starts as the identity: learns sooner
            dtype=c.dtype,
            rngs=rngs,
        )

    def __call__(self, x):
        query, key = rotary(self.query(x)), rotary(self.key(x))
        return self.out(jax_flash2.attention(query, key, self.value(x), is_causal=True))


class Block(nnx.Module):
    def __init__(self, c: Config, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=False, dtype=c.dtype, rngs=rngs)
        self.norm1 = nnx.RMSNorm(c.width, dtype=c.dtype, rngs=rngs)
        self.attention = Attention(c, rngs)
        self.norm2 = nnx.RMSNorm(c.width, dtype=c.dtype, rngs=rngs)
        self.up = linear(c.width, 4 * c.width)
        self.down = linear(4 * c.width, c.width, kernel_init=nnx.initializers.zeros)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        c = config
        self.embed = nnx.Embed(c.vocab, c.width, dtype=c.dtype, rngs=rngs)
        self.blocks = nnx.List([Block(c, rngs) for _ in range(c.layers)])
        self.norm = nnx.RMSNorm(c.width, dtype=c.dtype, rngs=rngs)
        self.logits = nnx.Linear(c.width, c.vocab, use_bias=False, dtype=c.dtype, rngs=rngs)

    def __call__(self, tokens):
        """tokens int [batch, length] -> logits float32 [batch, length, vocab]"""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x)).astype(jnp.float32)


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


def generate(model: GPT, prompt: bytes, length: int, seed: int = 0, temperature: float = 0.7):
    """The prompt, continued to `length` bytes (no more than the model was trained on)."""
    graphdef, params = nnx.split(model, nnx.Param)

    @jax.jit
    def run(params, tokens):
        def add_one(i, tokens):
            # The whole text again for each byte: causal, so what lies ahead of i plays no part.
            logits = nnx.merge(graphdef, params)(tokens)[0, i - 1]
            key = jax.random.fold_in(jax.random.key(seed), i)
            return tokens.at[0, i].set(jax.random.categorical(key, logits / temperature))

        return jax.lax.fori_loop(len(prompt), length, add_one, tokens)

    tokens = jnp.asarray([list(prompt.ljust(length, b"\0"))], jnp.int32)
    return bytes(np.asarray(run(params, tokens))[0].tolist())


def load_text():
    """The source of Python's standard library as bytes: (training, held out), split by file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}
    files = [f for f in sorted(root.rglob("*.py")) if not skipped & set(f.relative_to(root).parts)]
    texts = [np.frombuffer(f.read_bytes(), np.uint8) for f in files]
    held_out = [text for i, text in enumerate(texts) if i % 10 == 0]
    training = [text for i, text in enumerate(texts) if i % 10]
    return np.concatenate(training), np.concatenate(held_out)
