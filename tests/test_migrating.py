"""What docs/migrating.md tells to write runs, argument for argument."""

import ast
import functools
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jax_flash2
import jax_flash2.linen
import jax_flash2.nnx

PAGE = Path(__file__).resolve().parents[1] / "docs" / "migrating.md"
ROWS = [
    row
    for row in re.findall(r"^\| (.+?) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    if row[0] != "you wrote"
]
CODES = [
    pytest.param(code, "linen" in old, id=code)
    for old, new in ROWS
    for code in re.findall(r"`([^`]+)`", new)
]


@functools.cache
def names(linen):
    modules = jax_flash2.linen if linen else jax_flash2.nnx
    rngs = nnx.Rngs(0)
    layer = jax_flash2.nnx.GroupedQueryAttention(8, 512, rngs=rngs)
    layer.init_cache((2, 64, 512))
    q, k = jnp.ones((2, 4, 8, 16)), jnp.ones((2, 4, 2, 16))
    cache = jnp.ones((2, 32, 2, 16))  # two sequences, or two pages
    return {
        **{"functools": functools, "jax": jax, "jnp": jnp, "nnx": nnx},
        **{x: getattr(jax_flash2, x) for x in jax_flash2.__all__},
        "GroupedQueryAttention": modules.GroupedQueryAttention,
        "attention_fn": modules.attention_fn,
        **{"rngs": rngs, "layer": layer, "new": layer, "old": layer},
        **{"x": jnp.ones((2, 4, 512)), "prompt": jnp.ones((2, 4, 512))},
        **{"q": q, "k": k, "v": k, "qkv": jnp.ones((2, 4, 3, 2, 16)), "s": 0.5},
        **{"k_cache": cache, "v_cache": cache, "n": jnp.array([3, 4])},
        "t": jnp.array([[1], [0]]),
    }


@pytest.mark.parametrize(("code", "linen"), CODES)
def test_what_you_write_now(code, linen):
    space = names(linen)
    argument = re.fullmatch(r"(\w+)=(.*)", code)
    if argument:
        takers = jax_flash2.attention, nnx.MultiHeadAttention.__init__
        assert any(argument[1] in inspect.signature(f).parameters for f in takers)
        eval(argument[2], space)
    elif code.startswith("context_parallel_attention("):
        call = ast.parse(code, mode="eval").body
        given = {x.arg: None for x in call.keywords}
        inspect.signature(space[call.func.id]).bind(*call.args, **given)
    elif "(" in code:
        eval(code, space)


def test_there_are_three_tables():
    text = PAGE.read_text()
    assert text.count("| you wrote | you write now |") == 3
    assert len(CODES) > 25
    for link, anchor in re.findall(r"\]\((\w+\.md)#([\w-]+)\)", text):
        titles = re.findall(r"^#+ (.+)$", (PAGE.parent / link).read_text(), re.MULTILINE)
        assert anchor in [x.lower().replace(" ", "-") for x in titles]
