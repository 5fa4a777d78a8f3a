"""Temporary memory of one device by the number of devices that share a sequence.

By a ring, by all-to-all, and by the gather of keys and values that `jit` makes of split sequences.

Run: python benchmarks/ring_memory.py      the table, and ring_memory.png

Every device keeps the same number of tokens, so that the sequence grows with the devices. These are
CPU devices that XLA simulates; nothing is allocated. The figures are XLA's own, for forward and
backward of one causal layer: `compiled.memory_analysis().temp_size_in_bytes`, beside inputs and
outputs.
"""

import argparse
import os
from functools import partial
from pathlib import Path

DEVICES = [2, 4, 8, 16, 32]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES[-1]}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import matplotlib  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import jax_flash2  # noqa: E402

SEQ = P(None, "seq")
COLOURS = {"ring": "#1f5fa8", "all-to-all": "#7fa650", "gather": "#c0392b"}


def parse_args():
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--tokens", type=int, default=8192, help="on each device")
    p.add_argument("--heads", type=int, default=32)
    p.add_argument("--kv-heads", type=int, default=8)
    p.add_argument("--head-dim", type=int, default=128)
    p.add_argument("--plot", type=Path, default=Path(__file__).with_name("ring_memory.png"))
    return p.parse_args()


def attentions(mesh):
    """{name: function of the whole query, key and value}"""

    def split(method):
        call = partial(
            jax_flash2.context_parallel_attention,
            axis_name="seq",
            method=method,
            placement="zigzag",
            is_causal=True,
        )
        return jax.shard_map(call, mesh=mesh, in_specs=(SEQ, SEQ, SEQ), out_specs=SEQ)

    return {
        "ring": split("ring"),
        "all-to-all": split("all_to_all"),
        "gather": partial(jax_flash2.attention, is_causal=True),
    }


def temporary_bytes(attention, operands):
    """Of one device, for value and gradients."""

    def loss(q, k, v):
        return attention(q, k, v).astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*operands).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def measure(args, devices):
    mesh = jax.make_mesh(
        (devices,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    sharding = NamedSharding(mesh, SEQ)
    operands = [
        jax.ShapeDtypeStruct(
            (1, devices * args.tokens, heads, args.head_dim), jnp.bfloat16, sharding=sharding
        )
        for heads in (args.heads, args.kv_heads, args.kv_heads)
    ]
    return {name: temporary_bytes(f, operands) for name, f in attentions(mesh).items()}


def plot(path, args, rows):
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained", dpi=120)
    width = 0.8 / len(COLOURS)
    for i, (name, colour) in enumerate(COLOURS.items()):
        x = [j + (i - 1) * width for j in range(len(rows))]
        bars = axes.bar(x, [row[name] / 1e6 for row in rows.values()], width, color=colour)
        axes.bar_label(bars, fmt="{:.0f}", fontsize=7, color=colour)
        bars.set_label(name)
    axes.set_xticks(range(len(rows)), [f"{n}\n{n * args.tokens // 1024}k" for n in rows])
    axes.set(xlabel="devices, and tokens of the sequence", ylabel="temporary memory a device, MB")
    axes.set_title(
        f"Causal layer, {args.tokens // 1024}k tokens a device, {args.heads}/{args.kv_heads} heads "
        f"of {args.head_dim}, bfloat16, forward and backward",
        loc="left",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def main():
    args = parse_args()
    print(f"jax {jax.__version__}, {args}\n")
    print(f"| devices | tokens | {' | '.join(COLOURS)} |\n|{'---|' * (2 + len(COLOURS))}")
    rows = {}
    for devices in DEVICES:
        rows[devices] = measure(args, devices)
        figures = " | ".join(f"{rows[devices][name] / 1e6:,.0f} MB" for name in COLOURS)
        print(f"| {devices} | {devices * args.tokens:,} | {figures} |", flush=True)
    plot(args.plot, args, rows)
    print(f"\nwritten {args.plot}")


if __name__ == "__main__":
    main()
