"""What jax.checkpoint saves, computes again or sends to the host, by counting kernels."""

import re

import jax
import jax.numpy as jnp
import pytest
from placements import assert_close, normal

from jax_flash2 import CHECKPOINT_NAMES, attention

pytestmark = pytest.mark.usefixtures("on_cpu")

B, T, N, H, LAYERS = 2, 9, 4, 8, 3
POLICIES = jax.checkpoint_policies
OFFLOAD = POLICIES.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=list(CHECKPOINT_NAMES),
    offload_src="device",
    offload_dst="pinned_host",
)
NAMED = POLICIES.save_only_these_names(*CHECKPOINT_NAMES)


def operands():
    return normal(B, T, N * H, seed=0), 0.3 * normal(LAYERS, N * H, N * H, seed=1)


def block(x, weight):
    heads = jnp.tanh(x @ weight).reshape(B, T, N, H)
    return x + attention(heads, heads, heads, is_causal=True).reshape(x.shape), None


def unrolled(block, x, weights):
    for weight in weights:
        x, _ = block(x, weight)
    return x


def scanned(block, x, weights):
    return jax.lax.scan(block, x, weights)[0]


def gradient(network, block):
    return jax.jit(jax.grad(lambda *x: (network(block, *x) ** 2).sum(), (0, 1)))


def kernels(lowered):
    """(forward, backward) kernels in the compiled program; the body of a loop counts once."""
    text = lowered.compile().as_text()
    return tuple(
        len(re.findall(f'custom_call_target="jax_flash2_{name}"', text))
        for name in ("forward", "backward")
    )


@pytest.mark.parametrize("network", [unrolled, scanned], ids=["unrolled", "scan over layers"])
@pytest.mark.parametrize(
    ("policy", "forwards"),
    [(NAMED, 1), (OFFLOAD, 1), (POLICIES.nothing_saveable, 2), (POLICIES.everything_saveable, 1)],
    ids=["names", "offload", "nothing", "everything"],
)
def test_kernels_of_a_layer(network, policy, forwards):
    """Saved by name, on the device or the host, the forward kernel does not run twice."""
    expected = gradient(network, block)(*operands())
    checkpointed = gradient(network, jax.checkpoint(block, policy=policy))
    layers = LAYERS if network is unrolled else 1
    assert kernels(checkpointed.lower(*operands())) == (forwards * layers, layers)
    assert_close(checkpointed(*operands()), expected, 1e-6)


def test_offloaded_is_what_is_named():
    """On a GPU output and log-sum-exp go to pinned memory of the host, and come back; no more."""
    traced = gradient(scanned, jax.checkpoint(block, policy=OFFLOAD)).trace(*operands())
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    moves = r"@annotate_device_placement.*buffer_placement = \"(\w+)\".* -> tensor<(\w+)>"
    out, lse = f"{B}x{T}x{N}x{H}xf32", f"{B}x{N}x{T}xf32"
    assert sorted(re.findall(moves, text)) == sorted(
        [(place, shape) for place in ("pinned_host", "device") for shape in (out, lse)]
    )


def test_kernels_of_a_layer_without_checkpoint():
    for network, layers in ((unrolled, LAYERS), (scanned, 1)):
        assert kernels(gradient(network, block).lower(*operands())) == (layers, layers)
