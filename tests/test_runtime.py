"""How programs are run: buffers donated, many threads, many streams, as CUDA graphs."""

import concurrent.futures
import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from placements import normal

from jax_flash2 import attention

PLATFORMS = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]
MODES = ("deterministic", "split")  # repeatable


def qkv(seed, length=150, heads=(4, 2)):
    n, k = heads
    return [
        normal(2, length, x, 64, seed=seed + i, dtype=jnp.bfloat16) for i, x in enumerate((n, k, k))
    ]


def results(*arrays, mode=MODES[0]):
    """Output and gradients of one call."""
    call = functools.partial(attention, is_causal=True, backward=mode)
    out, vjp = jax.vjp(call, *arrays)
    return out, *vjp(out)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_donated_operands(platform):
    """The output takes the query's memory; a kernel reads the query until it ends."""
    with jax.default_device(jax.devices(platform)[0]):
        query, key, value = qkv(0)
        step = functools.partial(attention, is_causal=True)
        donating = jax.jit(step, donate_argnums=0)
        text = donating.lower(query, key, value).compile().as_text()
        assert re.search(r"input_output_alias=\{ *\{\}: \(0,", text)
        expected = got = query
        for _ in range(4):
            expected = jax.jit(step)(expected, key, value)
        for _ in range(4):
            before, got = got, donating(got, key, value)
            assert before.is_deleted()
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_many_threads(platform):
    """Each with a program and operands of its own, all at once, each time the same results."""
    device = jax.devices(platform)[0]
    jobs = [(mode, qkv(seed, 90 + 40 * seed)) for seed in range(2) for mode in MODES]
    calls = [jax.jit(functools.partial(results, mode=mode)) for mode, _ in jobs]
    jobs = [jax.device_put(arrays, device) for _, arrays in jobs]
    expected = [jax.device_get(call(*arrays)) for call, arrays in zip(calls, jobs, strict=True)]

    def work(i):
        return [jax.device_get(calls[i](*jobs[i])) for _ in range(10)]

    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        for i, repeats in enumerate(pool.map(work, range(len(jobs)))):
            for got in repeats:
                jax.tree.map(np.testing.assert_array_equal, got, expected[i])


@pytest.mark.gpu
def test_two_streams():
    """One program that runs two layers at a time, each on a CUDA stream of its own."""
    from jax.experimental.compute_on import compute_on

    def on_stream(number, function):
        kind = f"gpu_stream:{number}"
        if jax.__version_info__ < (0, 11):
            return compute_on(kind)(jax.jit(function))
        return compute_on(function, compute_type=kind, out_memory_spaces=jax.memory.Space.Device)

    @jax.jit
    def both(a, b):
        for _ in range(3):
            a = on_stream(1, lambda a: attention(*a, is_causal=True))(a), *a[1:]
            b = on_stream(2, lambda b: attention(*b, local_window_size=40))(b), *b[1:]
        return a[0], b[0]

    a, b = qkv(0, 700), qkv(5, 900)
    text = both.lower(a, b).compile().as_text()
    assert {"1", "2"} <= set(re.findall(r'_xla_stream_annotation="(\d)"', text))
    expected = []
    for arrays, masks in ((a, {"is_causal": True}), (b, {"local_window_size": 40})):
        query = arrays[0]
        for _ in range(3):
            query = attention(query, *arrays[1:], **masks)
        expected.append(query)
    for _ in range(20):
        jax.tree.map(np.testing.assert_array_equal, both(a, b), tuple(expected))


GRAPHS = """
import functools, sys
import jax, jax.numpy as jnp, numpy as np
from jax_flash2 import attention, decode_attention

def normal(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.bfloat16)

def layers(x, lengths, mode):
    for window in (None, 50):
        call = functools.partial(
            attention, key_value_seq_lengths=lengths, local_window_size=window, backward=mode
        )
        x = call(x, x[:, :, :2], x[:, :, 2:])
    return x

@functools.partial(jax.jit, donate_argnums=0)
def program(x, lengths):
    results = []
    for mode in ("deterministic", "split"):
        out, vjp = jax.vjp(lambda x: layers(x, lengths, mode), x)
        results += [out, vjp(out)[0]]
    results.append(decode_attention(x[:, :2], x[:, :, :2], x[:, :, 2:], lengths))
    return results

found = []
for i in range(6):  # from the second on it is a graph, for buffers that come and go
    x, lengths = (1 + i) * normal(2, 200, 4, 64), jnp.array([200 - 30 * i, 77], jnp.int32)
    found += [np.asarray(r, np.float32) for r in program(x, lengths)]
np.savez(sys.argv[1], *found)
"""


def thunks(text):
    """[(depth, kind)] of a dumped sequence of thunks, a line each, numbered or not."""
    lines = re.findall(r"^( *)(?:\d+: +)?(k[A-Z]\w+)", text, re.MULTILINE)
    return [(len(indent), kind) for indent, kind in lines]


@pytest.mark.gpu
def test_cuda_graphs(tmp_path):
    """All kernels run from a graph, and give the same as launched one by one, bitwise."""

    def run(name, *flags):
        flags = (os.environ.get("XLA_FLAGS", ""), *flags)
        environment = {**os.environ, "XLA_FLAGS": " ".join(flags)}
        file = tmp_path / f"{name}.npz"
        done = subprocess.run(
            [sys.executable, "-P", "-c", GRAPHS, str(file)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        with np.load(file) as results:
            return [results[key] for key in results.files]

    folder = tmp_path / "dump"
    captured = (
        "--xla_gpu_graph_min_graph_size=1",
        "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL",
        f"--xla_dump_to={folder}",
        "--xla_dump_hlo_module_re=jit_program",
    )
    with concurrent.futures.ThreadPoolExecutor() as pool:
        single = pool.submit(run, "single", "--xla_gpu_enable_command_buffer=")
        graphs, single = run("graphs", *captured), single.result()
    (dump,) = folder.glob("*thunk_sequence_after_thunk_passes*")
    kinds = thunks(dump.read_text())
    assert any(kind == "kCommandBuffer" for _, kind in kinds)
    calls = [depth for depth, kind in kinds if kind == "kCustomCall"]
    assert len(calls) == 9, "two forwards and two backwards in either mode, one that decodes"
    assert min(calls) > 0, "each inside of a command buffer"
    assert len(single) == len(graphs) == 30
    for x, y in zip(graphs, single, strict=True):
        assert np.isfinite(y).all()
        np.testing.assert_array_equal(x, y)
