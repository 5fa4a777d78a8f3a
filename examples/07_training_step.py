"""One training step of a decoder of a billion parameters, with our attention, cuDNN's and XLA's.

Run: python examples/07_training_step.py           on one GPU with 100 GB or more
     python examples/07_training_step.py --small   anywhere: the same, too small to tell anything
All three train the same model (examples/gpt.py, 32 query heads, 8 key/value heads of 128, bfloat16
over float32 parameters, AdamW) on the same random tokens, in turns. Prints the loss of the first
step, which all must share, and the median time of a step. XLA's attention keeps probabilities of
every query and key, so it is checkpointed: its forward runs twice.
"""

import argparse
import functools
import statistics
import time

import gpt
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tqdm import tqdm

import jax_flash2

LARGE = gpt.Config(
    vocab=32_000, layers=16, width=2048, heads=32, kv_heads=8, head_dim=128, dtype="bfloat16"
)
SMALL = gpt.Config(vocab=256, layers=2, width=64, heads=4, kv_heads=2, head_dim=16)
ROUNDS, STEPS_A_ROUND = 5, 3


def of_jax_nn(query, key, value, *, implementation, is_causal, **others):
    """What the layers of the model call, who leave the other arguments at their defaults."""
    masks = {name: x for name, x in others.items() if name not in ("precision", "backward")}
    assert not any(masks.values()), masks

    def call(query, key, value):
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=is_causal, implementation=implementation
        )

    return (jax.checkpoint(call) if implementation == "xla" else call)(query, key, value)


ATTENTION = {
    "ours": jax_flash2.attention,
    "cudnn": functools.partial(of_jax_nn, implementation="cudnn"),
    "xla": functools.partial(of_jax_nn, implementation="xla"),
}


def parse_args():
    on_cpu = jax.default_backend() == "cpu"
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--small", action="store_true", help="a model for any machine")
    p.add_argument("--batch", type=int, default=2, help="sequences a step")
    p.add_argument("--length", type=int, help="tokens a sequence; 8192, or 128 where it is small")
    names = [name for name in ATTENTION if name != "cudnn" or not on_cpu]
    p.add_argument("--attention", nargs="+", choices=names, default=names, help="which to compare")
    args = p.parse_args()
    if on_cpu and not args.small:
        p.error("JAX sees no GPU: --small runs on the CPU")
    args.length = args.length or (128 if args.small else 8192)
    return args


def training_step(graphdef, optimizer):
    """step(params, state, tokens) -> the same one step later, and the loss."""

    def loss_fn(params, tokens):
        logits = nnx.merge(graphdef, params)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit(donate_argnums=(0, 1))
    def step(params, state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def main():
    args = parse_args()
    config = SMALL if args.small else LARGE
    optimizer = optax.adamw(1e-4)
    shape = (args.batch, args.length + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, config.vocab)
    print(f"{jax.devices()[0].device_kind}: {config}, {args.batch} x {args.length:,} tokens")

    def start():
        params = jax.tree.map(jnp.copy, first_params)
        return params, optimizer.init(params)

    steps, times = {}, {}
    for name in tqdm(args.attention, desc="compiling", leave=False):
        model = gpt.GPT(config, nnx.Rngs(0), ATTENTION[name])
        graphdef, first_params = nnx.split(model, nnx.Param)  # the same each time
        del model
        steps[name] = training_step(graphdef, optimizer).lower(*start(), tokens).compile()
        *_, loss = steps[name](*start(), tokens)
        print(f"{name:5} loss of the first step {float(loss):.4f}")
        times[name] = []

    for _ in tqdm(range(ROUNDS), desc="rounds", leave=False):
        for name, step in steps.items():
            params, state, loss = step(*start(), tokens)  # warms up
            jax.block_until_ready(loss)
            begin = time.perf_counter()
            for _ in range(STEPS_A_ROUND):
                params, state, loss = step(params, state, tokens)
            jax.block_until_ready(loss)
            times[name].append((time.perf_counter() - begin) / STEPS_A_ROUND)
            del params, state  # before the next start

    count = sum(x.size for x in jax.tree.leaves(first_params))
    print(f"{count / 1e9:.3f} billion parameters")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        speed = args.batch * args.length / median
        print(f"{name:5} {1e3 * median:8.1f} ms a step, {speed:9,.0f} tokens/s")


if __name__ == "__main__":
    main()
