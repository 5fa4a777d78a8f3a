"""TFLOP/s of attention on a GPU, jax_flash2 against the peers that are installed.

Run: python -P benchmarks/gpu.py --json gpu.jsonl --plot gpu.png
     python -P benchmarks/gpu.py --read gpu.jsonl --plot gpu.png, to print and draw them again

Prints a table, a row a case and pass; the JSON file has the same rows, one a line. The figure
(matplotlib draws it) shows TFLOP/s by length, a row a head dim, out of the grid "core". --grid and
--impl choose less than everything.

Every case is 16k tokens of random bfloat16 at model width 2048 (4096 for grouped heads). The
implementations of a case take turns; a figure is the median over the rounds of the wall time of a
few calls in a row, launches included. The matrix products that the mask keeps are counted: 2 of
them forward, 5 backward, a causal mask keeping half. "backward" is the gradient alone, out of
residuals that stay on the GPU.

  ours       jax_flash2.attention
  ours_sm80  the same, held to the kernels that every GPU since Ampere runs
  cudnn      jax.nn.dot_product_attention(implementation="cudnn")
  fa3        FlashAttention-3 through JAX, where the package dew-flash-attn-cu13 is installed
  torch_fa2  FlashAttention-2 of torch.nn.functional.scaled_dot_product_attention, where torch is
"""

import argparse
import json
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
from tqdm import tqdm

import jax_flash2

TOKENS = 16384
ROUNDS = 5


def make_cases(grid):
    """[(name, B, T, N, K, H, is_causal, window)] of one grid."""
    if grid == "core":
        heads_and_dims = ((16, 128), (32, 64), (8, 256))
        return [
            (f"d{h} s{t} {'causal' if causal else 'full'}", TOKENS // t, t, n, n, h, causal, None)
            for n, h in heads_and_dims
            for t in (1024, 4096, 16384)
            for causal in (False, True)
        ]
    if grid == "gqa":
        return [
            ("gqa 32/8 d128 s2048 causal", 8, 2048, 32, 8, 128, True, None),
            ("gqa 32/8 d128 s8192 causal", 2, 8192, 32, 8, 128, True, None),
            ("mqa 32/1 d128 s8192 causal", 2, 8192, 32, 1, 128, True, None),
            ("gqa 64/8 d64 s8192 causal", 2, 8192, 64, 8, 64, True, None),
        ]
    if grid == "window":
        return [("window 1024 d128 s16384 causal", 1, 16384, 16, 16, 128, True, (1023, 0))]
    if grid == "short":
        return [
            ("d64 s512 full", 64, 512, 16, 16, 64, False, None),
            ("d128 s512 causal", 32, 512, 16, 16, 128, True, None),
        ]
    raise SystemExit(f"no grid {grid!r}: core, gqa, window or short")


def kept_pairs(t, causal, window):
    if not causal:
        return t * t
    if window is None:
        return t * t / 2
    return sum(min(i, window[0]) + 1 for i in range(t))


def jax_calls(attention, case):
    """(forward, backward), each a function that starts one call."""
    _, b, t, n, k, h, causal, window = case
    keys = jax.random.split(jax.random.key(0), 4)
    normal = partial(jax.random.normal, dtype=jnp.bfloat16)
    q, g = (normal(key, (b, t, n, h)) for key in keys[:2])
    key, value = (normal(key, (b, t, k, h)) for key in keys[2:])
    call = jax.jit(partial(attention, is_causal=causal, local_window_size=window))
    _, vjp = jax.jit(lambda *qkv: jax.vjp(call, *qkv))(q, key, value)
    backward = jax.jit(lambda vjp, g: vjp(g))
    return partial(call, q, key, value), partial(backward, vjp, g)


def torch_calls(case):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    _, b, t, n, k, h, causal, window = case
    if window is not None:
        raise NotImplementedError("a window")
    make = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    q, g = make(b, n, t, h).requires_grad_(), make(b, n, t, h)
    key, value = (make(b, k, t, h).requires_grad_() for _ in range(2))

    def forward():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, key, value, is_causal=causal, enable_gqa=n != k)

    def forward_alone():
        with torch.no_grad():
            return forward()

    out = forward()
    backward = partial(torch.autograd.grad, out, (q, key, value), g, retain_graph=True)
    return forward_alone, backward


def fa3_attention(query, key, value, *, is_causal, local_window_size):
    import dew_flash_attn

    window = (-1, -1) if local_window_size is None else local_window_size
    return dew_flash_attn.flash_mha(query, key, value, is_causal=is_causal, window_size=window)


IMPLEMENTATIONS = {
    "ours": partial(jax_calls, jax_flash2.attention),
    "ours_sm80": partial(jax_calls, partial(jax_flash2.attention, implementation="cuda_sm80")),
    "cudnn": partial(jax_calls, partial(jax.nn.dot_product_attention, implementation="cudnn")),
    "fa3": partial(jax_calls, fa3_attention),
    "torch_fa2": torch_calls,
}


def seconds(call, name, repeats):
    begin = time.perf_counter()
    for _ in range(repeats):
        result = call()
    if name.startswith("torch"):
        import torch

        torch.cuda.synchronize()
    else:
        jax.block_until_ready(result)
    return (time.perf_counter() - begin) / repeats


def measure(case, names, bar):
    """{(implementation, pass): TFLOP/s} of one case."""
    name, b, t, n, _, h, causal, window = case
    calls = {}
    for implementation in names:
        try:
            pair = IMPLEMENTATIONS[implementation](case)
        except (ImportError, NotImplementedError, ValueError, RuntimeError) as error:
            bar.write(f"{name}: no {implementation}: {str(error).splitlines()[0][:80]}")
            continue
        calls |= {(implementation, "forward"): pair[0], (implementation, "backward"): pair[1]}
    times = {key: [] for key in calls}
    for key, call in calls.items():
        seconds(call, key[0], 2)  # compiles, warms up
    for _ in range(ROUNDS):
        for key, call in calls.items():
            times[key].append(seconds(call, key[0], 5))
    flops = 4 * b * n * h * kept_pairs(t, causal, window)
    return {
        key: flops * (1 if key[1] == "forward" else 2.5) / statistics.median(x) / 1e12
        for key, x in times.items()
    }


def measure_all(cases, names):
    """The rows, one a case and pass: {"case", "pass", implementation: TFLOP/s or None}."""
    rows = []
    for case in (bar := tqdm(cases)):
        bar.set_description(case[0])
        results = measure(case, names, bar)
        for direction in ("forward", "backward"):
            row = {"case": case[0], "pass": direction}
            rows.append(row | {n: results.get((n, direction)) for n in names})
        jax.clear_caches()
    return rows


def print_table(rows, names):
    print("| case | pass | " + " | ".join(names) + " |\n|---|---|" + "---|" * len(names))
    for row in rows:
        figures = ("" if row[n] is None else f"{row[n]:.0f}" for n in names)
        print(f"| {row['case']} | {row['pass']} | " + " | ".join(figures) + " |")


def plot(path, rows, names):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    table = {(row["case"], row["pass"]): row for row in rows}
    core = [case for case in make_cases("core") if (case[0], "forward") in table]
    if not core:
        raise SystemExit('--plot draws the grid "core", and there is no row of it')
    dims = sorted({case[5] for case in core})
    columns = [(d, m) for d in ("forward", "backward") for m in (False, True)]
    figure, grid = plt.subplots(
        len(dims), 4, figsize=(13, 2.9 * len(dims)), squeeze=False, layout="constrained", dpi=110
    )
    for h, line in zip(dims, grid, strict=True):
        for (direction, causal), axes in zip(columns, line, strict=True):
            cases = [case for case in core if case[5] == h and case[6] == causal]
            lengths = [case[2] for case in cases]
            for name in names:
                values = [table[case[0], direction][name] for case in cases]
                if any(values):
                    heavy = name == "ours"
                    axes.plot(lengths, values, "o-", ms=4, lw=2.5 if heavy else 1.2, label=name)
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
            axes.set_ylim(bottom=0)
            title = f"head dim {h}, {'causal' if causal else 'full'}, {direction}"
            axes.set_title(title, loc="left", fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#eeeeee")
        line[0].set_ylabel("TFLOP/s")
    grid[0][0].legend(fontsize=8, frameon=False)
    figure.savefig(path)


def main():
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--grid", default="core,gqa,window,short")
    p.add_argument("--impl", default=",".join(IMPLEMENTATIONS))
    p.add_argument("--json", help="also write the rows here, one a line")
    p.add_argument("--plot", help="also draw them here, a PNG")
    p.add_argument("--read", help="measure nothing: the rows of this file")
    args = p.parse_args()
    names = args.impl.split(",")
    if args.read:
        with open(args.read) as file:
            rows = [json.loads(line) for line in file]
        names = [name for name in names if all(name in row for row in rows)]
    else:
        rows = measure_all([c for grid in args.grid.split(",") for c in make_cases(grid)], names)
        print(f"\n{jax.devices()[0].device_kind}, jax {jax.__version__}, TFLOP/s\n")
    print_table(rows, names)
    if args.json:
        with open(args.json, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    if args.plot:
        plot(args.plot, rows, names)


if __name__ == "__main__":
    main()
