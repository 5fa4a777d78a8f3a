"""Trains the small GPT over several machines: batch, sequence and heads split over one mesh.

Run, on eight simulated CPU devices:
    python examples/03_multi_host.py --cpu-devices 8
in two processes of four, as if on two machines; the second with --id 1, in another shell:
    python examples/03_multi_host.py --cpu-devices 4 \\
        --coordinator localhost:9876 --processes 2 --id 0
on machines with GPUs, a process on each; under Slurm JAX finds out the rest by itself:
    python examples/03_multi_host.py --mesh 2 4 2 --coordinator HOST:9876 --processes 2 --id 0
    srun --ntasks-per-node 1 python examples/03_multi_host.py --mesh 2 4 2 --distributed

The first axis of the mesh, "data", is the one that goes from machine to machine. The losses are the
same however many processes and devices there are, up to rounding.
"""

import argparse
import re
from functools import partial

import gpt
import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash2

# Over which mesh axis a parameter is split, by its path; the optimizer's moments lie as it does.
# "data" holds copies, and "seq" too. Everything else is whole on every device.
SPLIT = {
    r"(query|key|value)'\]\['kernel": P(None, "model", None),  # width, heads, head dim
    r"out'\]\['kernel": P("model", None, None),  # heads, head dim, width
    r"up'\]\['kernel": P(None, "model"),
    r"down'\]\['kernel": P("model", None),
}


def parse_args():
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--mesh", type=int, nargs=3, default=(2, 2, 2), help="data, seq, model")
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--batch", type=int, default=8, help="sequences a step, of all devices")
    p.add_argument("--length", type=int, default=256, help="bytes a sequence")
    p.add_argument("--rate", type=float, default=3e-3, help="learning rate")
    p.add_argument("--coordinator", help="host:port of process 0")
    p.add_argument("--processes", type=int, help="how many there are")
    p.add_argument("--id", type=int, help="which one this is, from 0 on")
    p.add_argument("--distributed", action="store_true", help="ask the cluster for all that")
    p.add_argument("--cpu-devices", type=int, help="simulate this many in this process")
    return p.parse_args()


def start(args):
    """Before anything asks JAX for its devices."""
    if args.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    if args.coordinator or args.distributed:
        jax.distributed.initialize(args.coordinator, args.processes, args.id)


def split_attention(mesh):
    """`attention` where "seq" splits the tokens, in zigzag placement, and "model" the heads."""
    spec = P("data", "seq", "model")

    def attend(query, key, value, **arguments):
        local = partial(
            jax_flash2.context_parallel_attention,
            axis_name="seq",
            placement="zigzag",
            **arguments,
        )
        return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)(query, key, value)

    return attend


def shardings(mesh, tree):
    """Where the parameters lie, and all that has an array for each of them."""

    def sharding(path, x):
        name = jax.tree_util.keystr(path)
        specs = (spec for pattern, spec in SPLIT.items() if re.search(pattern, name) and x.ndim)
        return NamedSharding(mesh, next(specs, P()))

    return jax.tree.map_with_path(sharding, tree)


def main():
    args = parse_args()
    start(args)
    mesh = jax.make_mesh(
        tuple(args.mesh), ("data", "seq", "model"), axis_types=(AxisType.Auto,) * 3
    )
    on_first = jax.process_index() == 0
    config = gpt.Config(layers=2)
    make_model = partial(gpt.GPT, config, attend=split_attention(mesh))
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_model(rngs=nnx.Rngs(0))))
    optimizer = optax.adamw(args.rate)

    def initial():
        params = nnx.state(make_model(rngs=nnx.Rngs(0)), nnx.Param)
        return params, optimizer.init(params)

    # Made where it lies: no machine ever holds all of it.
    where = shardings(mesh, jax.eval_shape(initial))
    params, state = jax.jit(initial, out_shardings=where)()

    # The text in zigzag order, and the place in the sequence that each byte comes from.
    positions = jax_flash2.to_zigzag(np.arange(args.length), mesh.shape["seq"], axis=0)

    def loss_fn(params, tokens, targets):
        logits = nnx.merge(graphdef, params)(tokens, input_positions=positions)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=(*where, None))
    def train_step(params, state, tokens, targets):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens, targets)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    text, _ = gpt.load_text()
    rng = np.random.default_rng(0)
    by_token = NamedSharding(mesh, P("data", "seq"))

    def batch():
        """(tokens, targets), of which each process keeps what its devices need."""
        starts = rng.integers(len(text) - args.length, size=args.batch)
        places = starts[:, None] + np.asarray(positions)
        shape = places.shape
        return [
            jax.make_array_from_callback(shape, by_token, lambda part, x=x: x[part])
            for x in (text[places].astype(np.int32), text[places + 1].astype(np.int32))
        ]

    if on_first:
        _, seq, model = args.mesh
        query, key = (
            jax.ShapeDtypeStruct((args.length // seq, n // model, config.head_dim), config.dtype)
            for n in (config.heads, config.kv_heads)
        )
        method, reason = jax_flash2.context_parallel_method(
            query, key, seq, placement="zigzag", is_causal=True
        )
        kernel = params["blocks"][0]["attention"]["query"]["kernel"][...]
        print(f"{jax.process_count()} processes, {jax.device_count()} devices, {dict(mesh.shape)}")
        print(f"attention  {method}: {reason}")
        part = kernel.addressable_shards[0].data.shape
        print(f"query kernel {kernel.shape}, on each device {part}")
    for step in range(args.steps):
        params, state, loss = train_step(params, state, *batch())
        if on_first:
            print(f"step {step} loss {float(loss):.5f}", flush=True)


if __name__ == "__main__":
    main()
