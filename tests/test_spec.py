"""The spec: the same list in Python and in C++, and the band that masks fold into."""

import dataclasses

import jax
import numpy as np
import pytest
from cases import CASES
from definition import mask_of

from jax_flash2 import _checks, _ffi, _spec

MODULES = [m for m in (_ffi._cpu, _ffi._cuda) if m is not None]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_fields_are_those_of_the_kernels(module):
    """A difference in order would swap two attributes of one type in silence."""
    for spec, members in (
        (_spec.AttentionSpec, module.attention_spec()),
        (_spec.DecodeSpec, module.decode_spec()),
    ):
        fields = [(f.name, f.type.__name__) for f in dataclasses.fields(spec)]
        assert [tuple(member) for member in members] == fields


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_constants_are_those_of_the_kernels(module):
    for name in ("TOKEN_TILE", "HEAD_DIM_TILE", "MAX_HEAD_DIM", "SEMAPHORE_ROWS", "ROW_STATS"):
        assert getattr(module, name) == getattr(_ffi, name)
    for name in ("QUEUES", "DECODE_BLOCKS", "DECODE_ROWS"):
        assert getattr(module, name) == getattr(_ffi, name)
    assert module.PAGE_MULTIPLE == _checks.PAGE_MULTIPLE


def spec(**changes):
    arguments = {
        "scale": 1,
        "is_causal": True,
        "window": (np.int32(3), np.int64(4)),
        "offset": np.int64(2),
        "precision": "high",
        "backward": "auto",
        "dtype": "float32",
    }
    return _spec.make_spec(**(arguments | changes))


def test_every_field_is_of_its_type():
    made = spec()
    for field in dataclasses.fields(made):
        assert type(getattr(made, field.name)) is field.type
    assert made == _spec.AttentionSpec(1.0, -1, 2, "high", "fused", "auto")


def test_specs_are_hashable_and_frozen():
    assert hash(spec()) == hash(spec())
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec().scale = 2.0


def test_precision_matters_to_float32_alone():
    assert spec(dtype="bfloat16", precision="highest").precision == "default"
    assert spec(precision=jax.lax.Precision.HIGHEST).precision == "highest"
    assert spec(precision="tensorfloat32").precision == "high"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, "default"),
        ("highest", "highest"),
        ("tensorfloat32", "high"),
        ("F32_F32_F32", "highest"),
    ],
)
def test_precision_of_none_is_jax_s_own(setting, expected):
    with jax.default_matmul_precision(setting):
        assert spec(precision=None).precision == expected
        assert spec(precision="default").precision == "default"


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (0.3, (1, 0.3)),
        (-0.3, (-1, 0.3)),
        (0.0, (0, 1)),
        (-1e-40, (-1e-40, 1)),
        (1e-33, (1e-33, 1)),
        (1e-30, (1, 1e-30)),
    ],
)
def test_scale_is_positive(scale, expected):
    assert _spec.fold_scale(scale) == expected


@pytest.mark.parametrize("case", CASES, ids=str)
def test_band_is_the_mask(case):
    """For each sequence the interval allows what causal, window and offset allow."""
    window = case.local_window_size
    window = (window, window) if isinstance(window, int) else window
    is_traced = isinstance(case.query_offset, tuple)
    lower, upper = _spec.band(case.is_causal, window, 0 if is_traced else case.query_offset or 0)
    traced = np.reshape(case.query_offset, (*case.batch, 1, 1)) if is_traced else 0
    distance = np.arange(case.s) - np.arange(case.t)[:, None] - traced
    above = distance >= lower if lower > -_spec.UNBOUNDED else True
    below = distance <= upper if upper < _spec.UNBOUNDED else True
    full = dataclasses.replace(case, query_seq_lengths=None, key_value_seq_lengths=None)
    expected = mask_of(full)
    np.testing.assert_array_equal(np.broadcast_to(above & below, expected.shape), expected)


def test_edges_far_out():
    far = 2**29
    assert _spec.band(False, None, far) == (-far, far)
    assert _spec.band(True, None, far) == (-far, far)  # sees every key: no edge
    assert _spec.band(True, None, -far) == (-far, 1 - far)  # sees none: still an edge
    assert _spec.band(False, (0, 0), far) == (far - 1, far)
    assert _spec.band(False, (2**30, 2**30), 0) == (-far, far)


def test_a_decode_spec_is_of_its_types():
    made = _spec.make_decode_spec(scale=np.float32(2), window=(np.int32(3), 4))
    assert made == _spec.DecodeSpec(2.0, 3)
    assert [type(x) for x in dataclasses.astuple(made)] == [float, int]
    assert _spec.make_decode_spec(scale=1, window=None).window_left == _spec.UNBOUNDED
    assert _spec.make_decode_spec(scale=1, window=(2**30, 0)).window_left == _spec.UNBOUNDED


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(2.0, (1.0, 2.0)), (-0.5, (-1.0, 0.5)), (0.0, (0.0, 1.0)), (-1e-40, (-1e-40, 1.0))],
)
def test_the_scale_of_the_kernels_is_positive(scale, expected):
    assert _spec.fold_scale(scale) == expected
