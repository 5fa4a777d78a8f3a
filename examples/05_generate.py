"""Text from the small GPT of 02_train_gpt.py, with a key/value cache: a prefill, then byte by byte.

Run: python examples/02_train_gpt.py && python examples/05_generate.py
The prompts differ in length: each has its own place in the cache. Every byte's logits are held
against a forward over the whole text, which knows no cache.
"""

import argparse
import time
from pathlib import Path

import gpt
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

PROMPTS = [b"def ", b"class Parser:\n    ", b"import os\nimport "]


def timed(function, *args):
    """(result, seconds) of a second call, which compiles nothing."""
    function(*args)
    begin = time.perf_counter()
    return jax.block_until_ready(function(*args)), time.perf_counter() - begin


def parse_args():
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model", type=Path, default=Path("gpt.npz"), help="that 02_train_gpt.py wrote")
    p.add_argument("--length", type=int, default=200, help="bytes to add to each prompt")
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args()


def main():
    args = parse_args()
    if not args.model.is_file():
        raise SystemExit(f"There is no {args.model}: run 02_train_gpt.py first, or give --model.")
    model = gpt.load(args.model)
    (texts, logits), seconds = timed(gpt.generate, model, PROMPTS, args.length, args.seed)

    graphdef, params = nnx.split(model, nnx.Param)
    forward = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
    difference, whole_seconds = 0.0, 0.0
    for prompt, text, cached in zip(PROMPTS, texts, logits, strict=True):
        tokens = jnp.asarray([list(text)], jnp.int32)
        whole, one = timed(forward, params, tokens)
        whole = whole[0, len(prompt) - 1 : -1]
        difference = max(difference, float(jnp.max(jnp.abs(whole - cached))))
        whole_seconds += one * args.length
        print(f"{text.decode(errors='replace')}\n------")
    largest = float(np.max(np.abs(logits)))
    made = len(PROMPTS) * args.length
    print(f"logits      largest {largest:.2f}, largest difference without a cache {difference:.1e}")
    print(f"speed       {made / seconds:,.0f} bytes a second")
    print(f"no cache    {made / whole_seconds:,.0f}, were the whole text computed for each byte")
    if not difference < 1e-3 * largest:
        raise SystemExit("The cache changes the logits.")


if __name__ == "__main__":
    main()
