"""A training step over eight devices: two parts of the batch, four of the heads and hidden units.

Run: python examples/06_sharded_training.py
The devices are simulated on the CPU, unless JAX_PLATFORMS says otherwise. Metadata say over which
mesh axis a parameter is split, the optimizer's state follows, and jit does the rest: the compiled
step sums over "model" what the split projections leave apart, and over "data" the gradients.
Nothing is gathered, neither heads nor keys nor tokens. The losses are those of one device.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )

import collections
import re
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_flash2.nnx import GroupedQueryAttention

LAYERS, WIDTH, VOCAB = 2, 64, 256
BATCH, LENGTH, STEPS = 8, 64, 20
DATA, MODEL = 2, 4


def over(*axes):
    return {"out_sharding": axes}


class Block(nnx.Module):
    def __init__(self, rngs):
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.norm1 = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = GroupedQueryAttention(
            num_heads=8,
            in_features=WIDTH,
            num_kv_heads=4,
            rope_theta=10_000.0,
            use_bias=False,
            kernel_metadata=over(None, "model", None),  # width, heads, head dim
            out_kernel_metadata=over("model", None, None),  # heads, head dim, width
            rngs=rngs,
        )
        self.norm2 = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up = linear(WIDTH, 4 * WIDTH, kernel_metadata=over(None, "model"))
        self.down = linear(4 * WIDTH, WIDTH, kernel_metadata=over("model", None))

    def __call__(self, x):
        x = x + self.attention(self.norm1(x), is_causal=True)
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.logits = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.logits(x)


def batches():
    """The bytes of this file, int32 [STEPS, BATCH, LENGTH + 1]."""
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8)
    starts = np.random.default_rng(0).integers(len(text) - LENGTH, size=(STEPS, BATCH, 1))
    return text[starts + np.arange(LENGTH + 1)].astype(np.int32)


def train(data, model):
    """(losses, the model and its optimizer in the end, compiled step) on a mesh of that shape."""
    devices = jax.devices()[: data * model]
    axes = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((data, model), ("data", "model"), axis_types=axes, devices=devices)
    with jax.set_mesh(mesh):
        gpt = GPT(nnx.Rngs(0))
        optimizer = nnx.Optimizer(gpt, optax.adam(3e-3), wrt=nnx.Param)
        graphdef, state = nnx.split((gpt, optimizer))

        def loss_fn(gpt, tokens):
            logits = gpt(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        def step(state, tokens):
            gpt, optimizer = nnx.merge(graphdef, state)
            loss, gradient = nnx.value_and_grad(loss_fn)(gpt, tokens)
            optimizer.update(gpt, gradient)
            return nnx.state((gpt, optimizer)), loss

        steps = [jax.device_put(tokens, P("data")) for tokens in batches()]
        where = (jax.tree.map(lambda x: x.sharding, state), None)
        compiled = jax.jit(step, donate_argnums=0, out_shardings=where).lower(state, steps[0])
        compiled = compiled.compile()
        losses = []
        for tokens in steps:
            state, loss = compiled(state, tokens)
            losses.append(float(loss))
    return losses, nnx.merge(graphdef, state), compiled


def collectives(compiled):
    """Counter of (kind, number of devices that take part) in the compiled program."""
    found = collections.Counter()
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    for kind, rest in re.findall(rf" ({kinds})(?:-start)?\((.*)", compiled.as_text()):
        first_group = re.search(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\})", rest)
        size, members = first_group.groups() if first_group else (None, "")
        found[kind, int(size) if size else len(members.split(","))] += 1
    return found


one, _, _ = train(1, 1)
losses, (gpt, optimizer), compiled = train(DATA, MODEL)
attention, up = gpt.blocks[0].attention, gpt.blocks[0].up
for name, module in (("query", attention.query), ("key", attention.key), ("up", up)):
    kernel = module.kernel[...]
    print(f"{name:6} {kernel.shape}, on each device {kernel.addressable_shards[0].data.shape}")
state = jax.tree.leaves(nnx.state((gpt, optimizer)))
whole, part = (
    sum(x.nbytes for x in y) for y in (state, [x.addressable_shards[0].data for x in state])
)
print(f"state  {whole:,} bytes with the optimizer's, on each device {part:,}")
print(f"losses {losses[0]:.4f} ... {losses[-1]:.4f}")
print(f"       largest difference from one device {max(abs(np.subtract(losses, one))):.1e}")
for (kind, size), number in collectives(compiled).items():
    axis = {MODEL: "model", DATA: "data", MODEL * DATA: "data and model"}[size]
    print(f"{number} {kind} over {axis}")
