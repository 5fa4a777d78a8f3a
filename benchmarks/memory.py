"""Temporary memory of forward and backward by length: jax_flash2 against the plain definition.

Run: python benchmarks/memory.py                  the table by length, and memory.png
     python benchmarks/memory.py --length 131072  runs one length, both ways (for a GPU)

The figures are XLA's own, `compiled.memory_analysis().temp_size_in_bytes`: what a program needs
beside its inputs and outputs. The kernels' workspaces are in them, for they are declared to XLA;
the few tiles that each CPU thread keeps for itself are not.
The plain definition is `jax.nn.dot_product_attention(implementation="xla")`.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

import jax_flash2

PLAIN = partial(jax.nn.dot_product_attention, implementation="xla")
LENGTHS = [2**i for i in range(10, 18)]


def parse_args():
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--length", type=int, help="run this length instead of the table")
    p.add_argument("--heads", type=int, default=1)
    p.add_argument("--kv-heads", type=int, default=1)
    p.add_argument("--head-dim", type=int, default=128)
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--backward", default="auto")
    p.add_argument("--plot", type=Path, default=Path(__file__).with_name("memory.png"))
    return p.parse_args()


def shapes(args, length):
    return [
        jax.ShapeDtypeStruct((1, length, heads, args.head_dim), jnp.dtype(args.dtype))
        for heads in (args.heads, args.kv_heads, args.kv_heads)
    ]


def compile_gradient(attention, operands):
    """Causal forward and backward, compiled for shapes alone: nothing is allocated."""

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, is_causal=True).astype(jnp.float32))

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*operands).compile()


def temporary_bytes(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


def size(n):
    return f"{n / 1e9:,.3g} GB" if n >= 1e9 else f"{n / 1e6:.3g} MB"


def run(name, attention, operands):
    """Compiles and runs it, and says what it took, or that there is not the memory for it."""
    try:
        compiled = compile_gradient(attention, operands)
        print(f"{name:10}  temporary memory {size(temporary_bytes(compiled))}", flush=True)
        jax.block_until_ready(compiled(*operands))
        begin = time.perf_counter()
        gradients = jax.block_until_ready(compiled(*operands))[1]
        seconds = time.perf_counter() - begin
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        print(f"{name:10}  cannot be allocated: {str(error).splitlines()[0]}")
        return
    assert all(jnp.all(jnp.isfinite(g)) for g in gradients), "a gradient is not finite"
    print(f"{name:10}  ran in {1e3 * seconds:.1f} ms, all gradients finite")


def table(ours, args):
    """Prints a Markdown table; returns its columns (lengths, ours, plain), bytes."""
    print("| length | jax_flash2 | bytes a token | plain definition |\n|---|---|---|---|")
    columns = [], [], []
    for length in LENGTHS:
        flash, plain = (
            temporary_bytes(compile_gradient(attention, shapes(args, length)))
            for attention in (ours, PLAIN)
        )
        print(f"| {length} | {size(flash)} | {flash / length:.0f} | {size(plain)} |")
        for column, x in zip(columns, (length, flash, plain), strict=True):
            column.append(x)
    return columns


def plot(path, args, lengths, ours, plain):
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained", dpi=120)
    for values, color, text in (
        (plain, "#c0392b", "plain definition"),
        (ours, "#1f5fa8", "jax_flash2"),
    ):
        axes.plot(lengths, values, "o-", color=color, ms=4)
        axes.annotate(
            f"{text}\n{size(values[-1])}",
            (lengths[-1], values[-1]),
            (8, 0),
            textcoords="offset points",
            color=color,
            va="center",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda n, _: size(n))
    axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
    axes.set(xlabel="query and key length", ylabel="temporary memory")
    axes.set_title(
        f"Forward and backward, {args.heads} causal head, {args.dtype}, "
        f"head dim {args.head_dim}, {jax.default_backend().upper()}",
        loc="left",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#eeeeee")
    figure.savefig(path)


def main():
    args = parse_args()
    ours = partial(jax_flash2.attention, backward=args.backward)
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, {args}\n")
    if args.length is None:
        plot(args.plot, args, *table(ours, args))
        print(f"\nwritten {args.plot}")
        return
    keys = jax.random.split(jax.random.key(0), 3)
    operands = [
        jax.random.normal(key, x.shape, x.dtype)
        for key, x in zip(keys, shapes(args, args.length), strict=True)
    ]
    if stats := device.memory_stats():
        print(f"{'device':10}  {size(stats['bytes_limit'])} for JAX")
    run("jax_flash2", ours, operands)
    run("plain", PLAIN, operands)


if __name__ == "__main__":
    main()
