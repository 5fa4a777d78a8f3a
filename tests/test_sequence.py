"""Where the tokens of a split sequence lie, and which of them see which."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash2 import _sequence, from_zigzag, to_zigzag
from jax_flash2._spec import make_spec

DEVICES = 4


def spec_of(is_causal=False, window=None):
    return make_spec(
        scale=1.0,
        is_causal=is_causal,
        window=window,
        offset=0,
        precision=None,
        backward="auto",
        dtype="float32",
    )


def mask_of(positions, is_causal, window, query_length, key_length):
    """bool [T, S] of global positions."""
    i, j = positions[0][:, None], positions[1][None, :]
    mask = (i < query_length) & (j < key_length)
    if is_causal:
        mask &= j <= i
    if window is not None:
        mask &= (i - window[0] <= j) & (j <= i + window[1])
    return mask


def mask_of_problem(spec, shape, problem):
    """bool [T, S] of the pairs that one problem covers and its bounds let see each other."""
    _, t, s = shape
    rows, keys, bounds = problem
    mask = np.zeros((t, s), bool)
    i, j = np.arange(t)[rows][:, None] - rows.indices(t)[0], np.arange(keys)[None, :]
    offset, query_length, key_length = (0, t, s) if bounds is None else np.asarray(bounds)
    distance = j - i - offset
    mask[rows, :keys] = (
        (spec.band_lower <= distance)
        & (distance <= spec.band_upper)
        & (i < query_length)
        & (j < key_length)
    )
    return mask


@pytest.mark.parametrize("lengths", [(None, None), (19, 22), (3, 0)], ids=str)
@pytest.mark.parametrize(
    ("placement", "is_causal", "window", "t", "s"),
    [
        ("contiguous", False, None, 6, 5),
        ("contiguous", True, None, 6, 5),
        ("contiguous", True, (7, 0), 6, 6),
        ("contiguous", False, (7, 2), 6, 6),
        ("zigzag", False, None, 6, 4),
        ("zigzag", True, None, 6, 6),
    ],
)
def test_problems_cover_what_the_whole_sequence_sees(placement, is_causal, window, t, s, lengths):
    spec, shape = spec_of(is_causal, window), ((), t, s)
    own_tokens = [np.arange(DEVICES * x) for x in (t, s)]
    if placement == "zigzag":
        own_tokens = [np.asarray(to_zigzag(x, DEVICES, 0)) for x in own_tokens]
    own_tokens = [x.reshape(DEVICES, -1) for x in own_tokens]
    traced = [None if x is None else jnp.int32(x) for x in lengths]
    full = [10**6 if x is None else x for x in lengths]
    steps = _sequence.steps((spec.band_lower, spec.band_upper), DEVICES, t, s)
    for own, source in itertools.product(range(DEVICES), repeat=2):
        expected = mask_of((own_tokens[0][own], own_tokens[1][source]), is_causal, window, *full)
        problems = _sequence.problems(spec, placement, DEVICES, shape, own, source, traced)
        masks = [mask_of_problem(spec, shape, x) for x in problems]
        np.testing.assert_array_equal(np.sum(masks, axis=0), expected)
        if (own - source) % DEVICES >= steps:
            assert not expected.any(), "a block that the ring does not bring"


def test_zigzag_work_is_balanced():
    spec, tokens = spec_of(is_causal=True), 8

    def work(placement, own):
        return sum(
            mask_of_problem(spec, ((), tokens, tokens), problem).sum()
            for source in range(DEVICES)
            for problem in _sequence.problems(
                spec, placement, DEVICES, ((), tokens, tokens), own, source, (None, None)
            )
        )

    assert len({work("zigzag", own) for own in range(DEVICES)}) == 1
    assert work("contiguous", DEVICES - 1) > 6 * work("contiguous", 0)


def test_steps_of_a_window():
    def steps(left, is_causal=True, s=10):
        spec = spec_of(is_causal, (left, 0) if is_causal else (left, left))
        return _sequence.steps((spec.band_lower, spec.band_upper), 8, 10, s)

    assert [steps(left) for left in (0, 1, 10, 11, 1000)] == [1, 2, 2, 3, 8]
    assert steps(1, is_causal=False) == 8
    assert steps(1, s=20) == 8


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_zigzag_order_and_its_inverse(axis):
    x = np.moveaxis(np.arange(3 * 12 * 2).reshape(3, 12, 2), 1, axis)
    zigzag = to_zigzag(x, 3, axis)
    np.testing.assert_array_equal(from_zigzag(zigzag, 3, axis), x)
    order = to_zigzag(np.arange(12), 3, 0).tolist()
    assert order == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]


@pytest.mark.parametrize("reorder", [to_zigzag, from_zigzag])
def test_zigzag_needs_two_parts_a_shard(reorder):
    with pytest.raises(ValueError, match=r"zigzag: x should be of a size along axis 1 that 2 \* 3"):
        reorder(np.zeros((2, 9)), 3, 1)
