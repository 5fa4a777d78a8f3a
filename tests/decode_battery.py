"""The battery's rules (battery.py) for `decode_attention`."""

import functools
import math
import zlib

import battery
import jax
import jax.numpy as jnp
import numpy as np
from definition import attention as definition
from definition import mask_of

from jax_flash2 import decode_attention


def make_call(case, fmt):
    """(arrays, mask [*B, T, S]): dense caches, and the same in pages if the case has any."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    dense = case.as_case()
    mask = mask_of(dense)
    table = None
    if case.page_size:
        table, there = make_table(rng, case, dense.batch)
        mask = mask & there[..., None, :]
    rows, keys = mask.any(-1), mask.any(-2)

    def array(seen, *tail, amplitude=1.0):
        x = amplitude * rng.standard_normal((*seen.shape, *tail))
        poison = rng.choice([np.nan, np.inf, -np.inf], size=x.shape)
        seen = seen.reshape(*seen.shape, *[1] * len(tail))
        return np.where(seen, x, poison).astype(jnp.dtype(fmt.dtype))

    arrays = {
        "q": array(rows, case.n, case.h, amplitude=case.amplitude),
        "k": array(keys, case.k, case.h),
        "v": array(keys, case.k, case.hv),
        "lengths": np.reshape(np.array(case.lengths, np.int32), dense.batch),
    }
    if table is not None:
        arrays["table"] = table
    return arrays, mask


def make_table(rng, case, batch):
    """Ids in random order, with pages that nobody holds, and ids that name no page."""
    number = case.s // case.page_size
    held = math.prod(batch) * number
    pages = held + 3
    ids = rng.permutation(pages)[:held]
    missing = rng.random(held) < case.missing
    ids = np.where(missing, rng.choice([-1, pages, 2**31 - 1, -(2**31)], size=held), ids)
    there = np.repeat(~missing.reshape(*batch, number), case.page_size, axis=-1)
    return ids.reshape(*batch, number).astype(np.int32), there


def into_pages(x, table, page_size):
    """A dense cache [*B, S, ..] as the pages that the table names; all else is NaN."""
    pages = np.full((table.size + 3, page_size, *x.shape[-2:]), np.nan, x.dtype)
    blocks = x.reshape(-1, page_size, *x.shape[-2:])
    there = (table.reshape(-1) >= 0) & (table.reshape(-1) < len(pages))
    pages[table.reshape(-1)[there]] = blocks[there]
    return pages


def run(case, arrays, device, repeats=2, **arguments):
    """The results of several calls, each into memory full of NaN."""
    table = arrays.get("table")
    caches = [arrays["k"], arrays["v"]]
    if table is not None:
        caches = [into_pages(x, table, case.page_size) for x in caches]
    call = functools.partial(
        decode_attention,
        scale=case.scale,
        local_window_size=case.local_window_size,
        return_residual=True,
        **arguments,
    )
    step = jax.jit(
        lambda memory, table, *x: call(*x, page_table=table), donate_argnums=0, keep_unused=True
    )
    operands = jax.device_put((table, arrays["q"], *caches, arrays["lengths"]), device)
    shapes = jax.eval_shape(lambda table, *x: call(*x, page_table=table), *operands)
    results = []
    for _ in range(repeats):
        memory = [jax.device_put(np.full(x.shape, np.nan, x.dtype), device) for x in shapes]
        results.append([np.asarray(x) for x in step(memory, *operands)])
    return results


def check(case, fmt, device, **arguments):
    arrays, mask = make_call(case, fmt)
    with battery.x64_if_needed(fmt):
        (out, lse), *again = run(case, arrays, device, **arguments)
    inputs = {name: arrays[name] for name in ("q", "k", "v")}
    problem = {
        "mask": mask,
        "scale": 1 / math.sqrt(case.h) if case.scale is None else case.scale,
    }
    with np.errstate(all="ignore"):
        truth, naive = (
            definition(**{name: x.astype(work) for name, x in inputs.items()}, **problem, **how)
            for work, how in ((np.float64, {}), (fmt.work, {"fmt": fmt}))
        )
    floor = battery.rounding_floor(lse)
    rows = mask.any(-1)
    for name, got in (("out", out), ("lse", lse)):
        where = f"{case} {fmt} {name}"
        assert got.shape == truth[name].shape, where
        assert (got[~rows] == (-np.inf if name == "lse" else 0)).all(), f"{where}: unseen tokens"
        for measure, (error, allowed) in battery.errors(
            got, truth[name], naive[name], floor
        ).items():
            assert error <= allowed, f"{where}: {measure} error {error:.3g} > {allowed:.3g}"
    for results in again:
        for x, y in zip((out, lse), results, strict=True):
            np.testing.assert_array_equal(x, y)
