"""Trains a small GPT on the source of Python's standard library; two minutes on two CPU cores.

Run: python examples/02_train_gpt.py
Prints the loss on held-out files beside the text's unigram entropy, the least that a model blind to
context can reach; plots both; saves the parameters; prints a sample.
"""

import argparse
import sys
import time
from pathlib import Path

import gpt
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

EVALUATIONS = 16  # of the held-out loss, evenly over the run
HELD_OUT_WINDOWS = 64
WARM_UP_STEPS = 50


def parse_args():
    on_cpu = jax.default_backend() == "cpu"
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--seconds", type=float, default=90, help="train for this long")
    p.add_argument("--steps", type=int, default=10**6, help="stop sooner, after this many steps")
    p.add_argument("--batch", type=int, default=4 if on_cpu else 64, help="sequences a step")
    p.add_argument("--length", type=int, default=256, help="bytes a sequence")
    p.add_argument("--dtype", default="float32" if on_cpu else "bfloat16", help="of activations")
    p.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    p.add_argument("--seed", type=int, default=0, help="of parameters, data order and sample")
    p.add_argument("--out", type=Path, default=Path("."), help="folder for gpt_loss.png, gpt.npz")
    return p.parse_args()


def windows(text, starts, length):
    """int32 [len(starts), length + 1]: inputs and, one further, targets."""
    return jnp.asarray(text[starts[:, None] + np.arange(length + 1)], jnp.int32)


def unigram_entropy(text):
    share = np.bincount(text) / len(text)
    share = share[share > 0]
    return -np.sum(share * np.log(share))


def train(args, config, training, held_out):
    """Returns the model, the loss of each step, the held-out losses as (steps, loss) pairs, and the
    number of tokens a second."""
    graphdef, params = nnx.split(gpt.GPT(config, nnx.Rngs(args.seed)), nnx.Param)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(args.rate, b2=0.95, weight_decay=0.1)
    )
    state = optimizer.init(params)

    def loss_fn(params, tokens):
        logits = nnx.merge(graphdef, params)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    # The share of the peak learning rate is an operand, not a schedule inside optax: a run that
    # ends by the clock does not know its number of steps.
    @jax.jit(donate_argnums=(0, 1))
    def train_step(params, state, tokens, share):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        updates = jax.tree.map(lambda u: share * u, updates)
        return optax.apply_updates(params, updates), state, loss

    evaluate = jax.jit(loss_fn)
    starts = np.linspace(0, len(held_out) - args.length - 1, HELD_OUT_WINDOWS, dtype=int)
    held_out = windows(held_out, starts, args.length)
    losses, held_out_losses = [], [(0, float(evaluate(params, held_out)))]
    any_batch = windows(training, np.zeros(args.batch, int), args.length)
    train_step = train_step.lower(params, state, any_batch, 1.0).compile()  # ahead of the clock

    rng = np.random.default_rng(args.seed)
    progress, begin = 0.0, time.perf_counter()
    bar_format = "{percentage:3.0f}% |{bar}| {elapsed}{postfix}"
    with tqdm(total=1, mininterval=0.5, bar_format=bar_format) as bar:
        while progress < 1:
            starts = rng.integers(len(training) - args.length, size=args.batch)
            tokens = windows(training, starts, args.length)
            share = min((len(losses) + 1) / WARM_UP_STEPS, 1) * (1 - progress)
            params, state, loss = train_step(params, state, tokens, share)
            losses.append(float(loss))
            seconds = time.perf_counter() - begin
            progress = min(max(seconds / args.seconds, len(losses) / args.steps), 1)
            if progress >= len(held_out_losses) / EVALUATIONS:
                held_out_losses.append((len(losses), float(evaluate(params, held_out))))
            speed = len(losses) * args.batch * args.length / seconds
            bar.set_postfix_str(
                f"loss {np.mean(losses[-20:]):.3f}, held out {held_out_losses[-1][1]:.3f}, "
                f"{speed:,.0f} tokens/s",
                refresh=False,
            )
            bar.update(progress - bar.n)
    return nnx.merge(graphdef, params), losses, held_out_losses, speed


def plot(path, tokens_a_step, losses, held_out_losses, entropy):
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    blue, red = "#1f5fa8", "#c0392b"
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained", dpi=150)
    million_tokens = np.arange(len(losses) + 1) * tokens_a_step / 1e6
    axes.plot(million_tokens[1:], losses, color="#b5cae2", lw=0.8, label="training, each step")
    steps, values = map(np.array, zip(*held_out_losses, strict=True))
    axes.plot(million_tokens[steps], values, "o-", color=blue, ms=4, label="held-out files")
    axes.axhline(entropy, color=red, ls="--", lw=1.2, label="unigram entropy of the held-out files")
    for y, color in ((entropy, red), (values[-1], blue)):
        right = axes.get_yaxis_transform()  # x = 1 is the right edge
        axes.text(1.01, y, f"{y:.2f}", color=color, va="center", transform=right)
    axes.set(xlabel="training bytes, millions", ylabel="loss, nats a byte", ylim=(1, None))
    axes.set_title("A small GPT learns the source of Python's standard library", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee")
    axes.legend(frameon=False)
    figure.savefig(path)


def main():
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    config = gpt.Config(dtype=args.dtype)
    training, held_out = gpt.load_text()
    print(f"{jax.devices()[0].device_kind}: {config}")
    print(f"{len(training):,} bytes to train on, {len(held_out):,} held out")
    model, losses, held_out_losses, speed = train(args, config, training, held_out)

    gpt.save(args.out / "gpt.npz", model, config)
    entropy = unigram_entropy(held_out)
    plot(args.out / "gpt_loss.png", args.batch * args.length, losses, held_out_losses, entropy)
    prompt = b"def "
    (sample,), _ = gpt.generate(model, [prompt], args.length - len(prompt), args.seed)
    loss = held_out_losses[-1][1]
    print(f"sample\n------\n{sample.decode(errors='replace')}\n------")
    print(f"steps            {len(losses)}, {speed:,.0f} tokens a second")
    print(f"held-out loss    {loss:.3f} nats a byte")
    print(f"unigram entropy  {entropy:.3f} nats a byte")
    print(f"written          {args.out / 'gpt_loss.png'}, {args.out / 'gpt.npz'}")
    if not loss < entropy:
        sys.exit("The held-out loss did not fall below the unigram entropy: train for longer.")


if __name__ == "__main__":
    main()
