"""GB/s of decoding on a GPU: one new token a sequence, jax_flash2 against cuDNN.

Run: python -P benchmarks/decode.py [--impl ours,cudnn] [--json FILE]

32 query heads over 8 key/value heads of dim 128, bfloat16, random. The implementations of a case
take turns; a figure is the median over the rounds of the time that the GPU's profiler (CUPTI) sums
over the kernels of a call, launches not included. Bytes are those that must move: keys and values
of the tokens that there are, queries and outputs. What fits into L2 stays there between calls.

  ours   jax_flash2.decode_attention; "pages of n": the cache in pages, in random order
  cudnn  jax.nn.dot_product_attention(implementation="cudnn"), with lengths where they differ
"""

import argparse
import json
import statistics
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler
from tqdm import tqdm

import jax_flash2

N, K, H = 32, 8, 128
ROUNDS, ITERATIONS = 3, 5

# Name, batch, keys, share of the keys that every other sequence has, page size.
CASES = [
    ("1 x 1k", 1, 1024, 1.0, None),
    ("1 x 4k", 1, 4096, 1.0, None),
    ("8 x 2k", 8, 2048, 1.0, None),
    ("1 x 64k", 1, 65536, 1.0, None),
    ("16 x 8k", 16, 8192, 1.0, None),
    ("64 x 8k", 64, 8192, 1.0, None),
    ("64 x 8k, half at 10%", 64, 8192, 0.1, None),
    ("64 x 8k, pages of 16", 64, 8192, 1.0, 16),
    ("64 x 8k, pages of 64", 64, 8192, 1.0, 64),
]


def make_operands(case):
    """(query, keys, values, lengths, page table or None) of a case."""
    _, batch, length, share, page_size = case
    keys = jax.random.split(jax.random.key(0), 3)
    normal = partial(jax.random.normal, dtype=jnp.bfloat16)
    lengths = jnp.where(jnp.arange(batch) % 2 == 1, int(share * length), length)
    query = normal(keys[0], (batch, 1, N, H))
    shape, table = (batch, length, K, H), None
    if page_size is not None:
        pages = batch * length // page_size
        shape = (pages, page_size, K, H)
        table = np.random.default_rng(0).permutation(pages).reshape(batch, -1)
        table = jnp.asarray(table, jnp.int32)
    caches = (normal(key, shape) for key in keys[1:])
    return query, *caches, lengths.astype(jnp.int32), table


def ours(case, query, keys, values, lengths, table):
    return jax_flash2.decode_attention(query, keys, values, lengths, page_table=table)


def cudnn(case, query, keys, values, lengths, table):
    if table is not None:
        raise NotImplementedError("pages")
    ragged = {} if case[3] == 1.0 else {"key_value_seq_lengths": lengths}
    return jax.nn.dot_product_attention(query, keys, values, implementation="cudnn", **ragged)


IMPLEMENTATIONS = {"ours": ours, "cudnn": cudnn}


def measure(case, names, bar):
    """({implementation: microseconds}, bytes that must move) of one case."""
    operands = make_operands(case)
    calls, times = {}, {name: [] for name in names}
    for name in names:
        call = jax.jit(partial(IMPLEMENTATIONS[name], case))
        try:
            jax.block_until_ready(call(*operands))
        except (NotImplementedError, ValueError, RuntimeError) as error:
            bar.write(f"{case[0]}: no {name}: {str(error).splitlines()[0][:80]}")
            continue
        calls[name] = call
    for _ in range(ROUNDS):
        for name, call in calls.items():
            _, milliseconds = profiler.measure(call, iterations=ITERATIONS)(*operands)
            times[name] += [1e3 * x for x in np.atleast_1d(milliseconds)]
    moved = 2 * H * (2 * K * int(operands[3].sum()) + 2 * N * case[1])
    return {name: statistics.median(x) if x else None for name, x in times.items()}, moved


def main():
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--impl", default=",".join(IMPLEMENTATIONS))
    p.add_argument("--json", help="also write the rows here, one a line")
    args = p.parse_args()
    names = args.impl.split(",")
    rows = []
    for case in (bar := tqdm(CASES)):
        bar.set_description(case[0])
        results, moved = measure(case, names, bar)
        rows.append({"case": case[0], "bytes": moved, **results})
        jax.clear_caches()
    print(f"\n{jax.devices()[0].device_kind}, jax {jax.__version__}, microseconds (GB/s)\n")
    print("| case | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for row in rows:
        figures = (
            "" if row[n] is None else f"{row[n]:.1f} ({row['bytes'] / row[n] / 1e3:.0f})"
            for n in names
        )
        print(f"| {row['case']} | " + " | ".join(figures) + " |")
    if args.json:
        with open(args.json, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
