"""Times `jax_flash2.attention` on the CPU against `jax.nn.dot_product_attention`.

    python benchmarks/cpu.py --tokens 1024 4096 --head-dims 64 128

prints one row a problem: milliseconds of both, forward and gradient, and their ratio (below 1: ours
is faster). The gradient is `jax.value_and_grad` of `sum(out * g)` with respect to query, key and
value. Each time is the least of several runs, the two implementations taking turns, so that other
work on the machine disturbs both alike.
"""

import argparse
import itertools
import time
from functools import partial

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jax_flash2 import attention

PASSES = ("forward", "gradient")


def implementations(is_causal):
    """The two attentions, {name: {pass: jitted function of q, k, v, g}}."""
    functions = {
        "ours": partial(attention, is_causal=is_causal),
        "xla": partial(jax.nn.dot_product_attention, is_causal=is_causal, implementation="xla"),
    }

    def jitted(function):
        def loss(q, k, v, g):
            return jnp.sum(function(q, k, v) * g, dtype=jnp.float32)

        return {
            "forward": jax.jit(lambda q, k, v, g: function(q, k, v)),
            "gradient": jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))),
        }

    return {name: jitted(function) for name, function in functions.items()}


def seconds(function, arguments):
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def measure(dtype, tokens, head_dim, is_causal, options, advance):
    """The least milliseconds, {(pass, name): time}."""
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (options.batch, tokens, options.heads, head_dim)
    arguments = [jax.random.normal(key, shape, dtype) for key in keys]
    functions = implementations(is_causal)
    best = {}
    for which in PASSES:
        for name in functions:
            seconds(functions[name][which], arguments)  # compiles
            best[which, name] = float("inf")
        spent, runs = 0.0, 0
        while runs < options.repeats or (spent < options.seconds and runs < 20 * options.repeats):
            for name in functions:
                taken = seconds(functions[name][which], arguments)
                best[which, name] = min(best[which, name], 1e3 * taken)
                spent += taken
            runs += 1
        advance()
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--masks", nargs="+", choices=["full", "causal"], default=["full", "causal"]
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, at least")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each pass, at least")
    options = parser.parse_args()

    jax.config.update("jax_platforms", "cpu")
    cases = list(
        itertools.product(options.dtypes, options.head_dims, options.masks, options.tokens)
    )
    header = f"{'dtype':9} {'H':>4} {'mask':7} {'T = S':>6}"
    for which in PASSES:
        header += f" | {which + ': ours':>15} {'xla ms':>9} {'ours/xla':>8}"
    print(f"jax {jax.__version__}, batch {options.batch}, {options.heads} heads")
    print(header)
    with tqdm(total=len(cases) * len(PASSES), unit="pass", leave=False) as progress:
        for dtype, head_dim, mask, tokens in cases:
            progress.set_description(f"{dtype} H={head_dim} {mask} T={tokens}")
            best = measure(dtype, tokens, head_dim, mask == "causal", options, progress.update)
            row = f"{dtype:9} {head_dim:4} {mask:7} {tokens:6}"
            for which in PASSES:
                ours, xla = best[which, "ours"], best[which, "xla"]
                row += f" | {ours:15.2f} {xla:9.2f} {ours / xla:8.2f}"
            progress.write(row)


if __name__ == "__main__":
    main()
