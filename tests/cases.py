"""The one table of attention problems: the battery, and whoever times them, read it."""

import dataclasses
import random


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem, in the letters of the public contract; masks as `attention` takes them."""

    name: str
    batch: tuple[int, ...] = (2,)
    t: int = 64
    s: int = 64
    n: int = 2
    k: int = 2
    h: int = 64
    hv: int = 64
    scale: float | None = None
    is_causal: bool = False
    query_offset: int | tuple[int, ...] | None = None  # a tuple is traced, one entry a sequence
    query_seq_lengths: tuple[int, ...] | None = None
    key_value_seq_lengths: tuple[int, ...] | None = None
    local_window_size: int | tuple[int, int] | None = None
    amplitude: float = 1.0  # of the queries: peaked rows

    def __str__(self):
        return self.name


def _same_length(name, length, **fields):
    return Case(name, t=length, s=length, **fields)


_CAUSAL = {"is_causal": True}

SHAPES = [
    Case("one_token", batch=(1,), t=1, s=1, n=1, k=1, h=8, hv=8),
    Case("one_query", t=1, s=200, n=4, k=2),
    Case("one_key", t=130, s=1),
    Case("no_batch_axis", batch=(), t=33, s=47, h=16, hv=16),
    Case("three_batch_axes", batch=(2, 1, 3), t=17, s=31, h=16, hv=16),
    Case("odd_lengths", t=129, s=257),
    Case("more_queries_than_keys", t=300, s=70),
    _same_length("one_tile", 128),
    _same_length("one_past_a_tile", 129),
    _same_length("several_tiles", 384, batch=(1,)),
]

HEADS = [
    Case("grouped_heads", n=6, k=2, t=80, s=100),
    Case("one_kv_head", n=5, k=1, t=70, s=90, **_CAUSAL),
    Case("sixteen_heads_a_group", batch=(1,), n=16, k=1, t=40, s=140),
]

HEAD_DIMS = [
    *(
        _same_length(f"head_dim_{h}", 150, batch=(1,), n=2, k=1, h=h, hv=h, is_causal=bool(h % 64))
        for h in (1, 8, 20, 32, 72, 96, 100, 128, 160, 192, 200, 256)
    ),
    _same_length("head_dim_64_causal", 200, **_CAUSAL),
    _same_length("head_dim_128_causal", 200, batch=(1,), h=128, hv=128, **_CAUSAL),
    _same_length("head_dim_192_causal", 140, batch=(1,), h=192, hv=192, **_CAUSAL),
    _same_length("head_dim_256_causal", 140, batch=(1,), h=256, hv=256, **_CAUSAL),
    _same_length("value_dim_smaller", 150, batch=(1,), h=192, hv=128, **_CAUSAL),
    _same_length("value_dim_larger", 150, batch=(1,), h=32, hv=96),
    _same_length("value_dim_much_larger", 100, batch=(1,), h=24, hv=256),
    _same_length("value_dim_odd", 90, batch=(1,), h=13, hv=7),
]

MASKS = [
    Case("causal_t_below_s", t=70, s=200, **_CAUSAL),
    Case("causal_t_above_s", t=200, s=70, **_CAUSAL),
    Case("bottom_right", t=70, s=200, query_offset=130, **_CAUSAL),
    Case("bottom_right_t_above_s", t=200, s=70, query_offset=-130, **_CAUSAL),
    Case("offset_without_mask", t=70, s=60, query_offset=17),
    Case("offset_past_all_keys", t=70, s=60, query_offset=1000, **_CAUSAL),
    Case("offset_before_all_keys", t=70, s=60, query_offset=-1000, **_CAUSAL),
    Case("offset_traced", t=70, s=200, query_offset=(130, -30), **_CAUSAL),
    Case("offset_traced_and_window", t=200, s=170, query_offset=(-40, 300), local_window_size=64),
    _same_length("window", 300, batch=(1,), local_window_size=50),
    _same_length("window_of_one", 140, local_window_size=0),
    _same_length("window_left", 300, batch=(1,), local_window_size=(40, 0)),
    _same_length("window_right", 300, batch=(1,), local_window_size=(0, 40)),
    _same_length("window_causal", 300, batch=(1,), local_window_size=(100, 7), **_CAUSAL),
    _same_length("window_wide", 140, local_window_size=(10**6, 10**6)),
    Case("window_and_offset", t=150, s=300, local_window_size=(30, 20), query_offset=110),
    Case("window_off_the_keys", t=150, s=90, local_window_size=20),
]

LENGTHS = [
    Case("kv_lengths", batch=(4,), t=70, s=200, key_value_seq_lengths=(200, 129, 1, 0)),
    Case("query_lengths", batch=(4,), t=200, s=70, query_seq_lengths=(200, 129, 1, 0)),
    Case(
        "both_lengths",
        batch=(3,),
        t=200,
        s=200,
        n=4,
        query_seq_lengths=(200, 64, 77),
        key_value_seq_lengths=(60, 128, 77),
        **_CAUSAL,
    ),
    *(
        Case(
            f"both_lengths_head_dim_{h}",
            batch=(3,),
            t=200,
            s=200,
            k=1,
            h=h,
            hv=h,
            query_seq_lengths=(200, 64, 77),
            key_value_seq_lengths=(60, 128, 77),
        )
        for h in (128, 192)
    ),
    Case(
        "lengths_offset_and_window",
        batch=(2, 2),
        t=140,
        s=260,
        query_seq_lengths=(140, 100, 3, 130),
        key_value_seq_lengths=(260, 190, 150, 0),
        query_offset=(120, 90, 147, -5),
        local_window_size=(70, 3),
    ),
    Case(
        "lengths_out_of_range",
        t=30,
        s=40,
        query_seq_lengths=(1000, -3),
        key_value_seq_lengths=(-1, 1000),
    ),
    Case("lengths_without_a_batch_axis", batch=(), t=40, s=50, key_value_seq_lengths=(9,)),
]

ZEROS = [
    Case("no_queries", t=0, s=20),
    Case("no_keys", t=20, s=0),
    Case("no_batch", batch=(0,), t=20, s=20),
    Case("no_keys_ragged", t=20, s=0, key_value_seq_lengths=(0, 5)),
]

VALUES = [
    _same_length("peaked_40", 200, amplitude=40.0),
    _same_length("peaked_150", 200, amplitude=150.0, **_CAUSAL),
    _same_length("peaked_150_window", 200, amplitude=150.0, local_window_size=30),
    # Scores that outgrow float16 under the maximum of the first block, then a greater maximum.
    _same_length(
        "peaked_6_window",
        600,
        batch=(1,),
        n=6,
        k=6,
        h=256,
        amplitude=6.0,
        local_window_size=(250, 20),
    ),
    _same_length("scale_given", 70, scale=0.4),
    _same_length("scale_zero", 70, scale=0.0, **_CAUSAL),
    _same_length("scale_negative", 70, scale=-0.3, **_CAUSAL),
]


def _random_case(seed):
    """Any mask on any shape: what nobody thought of."""
    rng = random.Random(seed)
    t, s = (rng.choice([rng.randint(1, 40), rng.randint(41, 290)]) for _ in range(2))
    batch = (rng.randint(1, 3),)
    k = rng.randint(1, 3)

    def maybe(make):
        return make() if rng.random() < 0.5 else None

    def each(low, high):
        return tuple(rng.randint(low, high) for _ in range(batch[0]))

    return Case(
        f"random_{seed}",
        batch=batch,
        t=t,
        s=s,
        n=k * rng.randint(1, 3),
        k=k,
        h=rng.choice([64, rng.randint(1, 140)]),
        hv=rng.choice([64, rng.randint(1, 140)]),
        is_causal=rng.random() < 0.5,
        query_offset=maybe(lambda: rng.choice([s - t, rng.randint(-t, s), each(-t, s)])),
        query_seq_lengths=maybe(lambda: each(0, t)),
        key_value_seq_lengths=maybe(lambda: each(0, s)),
        local_window_size=maybe(lambda: (rng.randint(0, s), rng.randint(0, s))),
    )


RANDOM = [_random_case(seed) for seed in range(16)]

# Enough tiles for a GPU to be full several times over; the battery runs these apart. Some have so
# many keys that fused mode adds in any order on Hopper, too.
LARGE = [
    _same_length("long", 3000, batch=(1,), n=2, k=1, **_CAUSAL),
    _same_length("many_tiles", 520, batch=(4,), n=16, k=4),
    Case(
        "many_tiles_causal_128",
        batch=(2,),
        t=520,
        s=1100,
        n=24,
        k=3,
        h=128,
        hv=128,
        query_offset=580,
        **_CAUSAL,
    ),
    _same_length(
        "many_tiles_window_192",
        520,
        batch=(2,),
        n=16,
        k=4,
        h=192,
        hv=128,
        local_window_size=(150, 60),
    ),
    Case(
        "many_tiles_ragged",
        batch=(4,),
        t=520,
        s=1200,
        n=16,
        k=2,
        h=96,
        hv=96,
        query_seq_lengths=(520, 0, 129, 400),
        key_value_seq_lengths=(1200, 300, 128, 0),
        query_offset=(680, 0, 7, 0),
        **_CAUSAL,
    ),
]


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """One call of `decode_attention`, in the same letters; S is a multiple of page_size."""

    name: str
    lengths: tuple[int, ...]  # one entry a sequence
    batch: tuple[int, ...] | None = None  # None: one axis
    t: int = 1
    s: int = 192
    n: int = 4
    k: int = 2
    h: int = 64
    hv: int = 64
    scale: float | None = None
    local_window_size: int | tuple[int, int] | None = None
    page_size: int | None = None
    missing: float = 0.0  # the share of pages whose id names none
    amplitude: float = 1.0

    def __str__(self):
        return self.name

    def as_case(self):
        """The same numbers as attention, but for pages that are missing."""
        lengths = tuple(min(max(x, 0), self.s) for x in self.lengths)
        return Case(
            self.name,
            batch=(len(lengths),) if self.batch is None else self.batch,
            **{x: getattr(self, x) for x in ("t", "s", "n", "k", "h", "hv", "scale", "amplitude")},
            is_causal=True,
            query_offset=tuple(x - self.t for x in lengths),
            key_value_seq_lengths=lengths,
            local_window_size=self.local_window_size,
        )


_RAGGED = (192, 1, 0, 65, 128)

DECODE = [
    DecodeCase("one_sequence", (192,)),
    DecodeCase("no_batch_axis", (77,), batch=()),
    DecodeCase("two_batch_axes", (192, 5, 0, 64, 65, 130), batch=(2, 3)),
    DecodeCase("ragged", _RAGGED),
    DecodeCase("lengths_of_zero", (0, 0, 0)),
    DecodeCase("lengths_out_of_range", (1000, -7)),
    DecodeCase("one_head", (192, 100), n=1, k=1),
    DecodeCase("own_keys", (192, 100), n=3, k=3),
    DecodeCase("one_kv_head", (192, 100), n=5, k=1),
    DecodeCase("sixteen_heads_a_group", (192, 3), n=16, k=1),
    DecodeCase("forty_heads_a_group", (192, 3), n=40, k=1),
    DecodeCase("speculative", _RAGGED, t=4),
    DecodeCase("speculative_many_rows", (192, 7, 100), t=8, n=16, k=2),
    DecodeCase("more_rows_than_a_block", (192, 20, 100), t=37, n=8, k=2),
    DecodeCase("more_tokens_than_lengths", (3, 1, 0, 5), t=5),
    *(
        DecodeCase(f"head_dim_{h}", (190, 33), h=h, hv=h, t=2)
        for h in (1, 8, 20, 32, 72, 96, 128, 160, 192, 256)
    ),
    DecodeCase("head_dim_128_many_rows", (190, 33), h=128, hv=128, t=9),
    DecodeCase("head_dim_256_many_rows", (190, 33), h=256, hv=256, t=9),
    DecodeCase("value_dim_smaller", (190, 33), h=192, hv=128),
    DecodeCase("value_dim_larger", (190, 33), h=24, hv=256),
    DecodeCase("window", _RAGGED, local_window_size=50),
    DecodeCase("window_of_one", _RAGGED, local_window_size=0, t=3),
    DecodeCase("window_left", _RAGGED, local_window_size=(64, 7), t=5),
    DecodeCase("window_wide", _RAGGED, local_window_size=10**6),
    *(
        DecodeCase(f"pages_of_{size}", (192, 1, 0, 65, 130), page_size=size, t=2)
        for size in (16, 32, 48, 64, 96, 192)
    ),
    DecodeCase("pages_head_dim_96", (192, 100), page_size=16, h=96, hv=96),
    DecodeCase("pages_head_dim_256", (192, 100), page_size=16, h=256, hv=256),
    DecodeCase("pages_missing", (192, 0, 30, 100), page_size=16, missing=0.4, t=3),
    DecodeCase("pages_missing_large", (192, 190), page_size=96, missing=0.5, t=3),
    DecodeCase(
        "pages_missing_window", (192, 0, 30, 100), page_size=16, missing=0.4, local_window_size=53
    ),
    DecodeCase("pages_missing_all", (192, 50), page_size=32, missing=1.0),
    DecodeCase("pages_window", (192, 150, 40), page_size=32, local_window_size=70, t=2),
    DecodeCase("no_queries", (5, 7), t=0),
    DecodeCase("no_keys", (0, 3), s=0),
    DecodeCase("no_batch", ()),
    DecodeCase("many_short", tuple(i * 7 % 31 for i in range(100)), s=32),
    DecodeCase("many_sequences", _RAGGED * 8, h=128, hv=128, n=8),
    DecodeCase("many_sequences_in_pages", _RAGGED * 8, page_size=16, missing=0.2, t=3),
    DecodeCase("many_sequences_window", _RAGGED * 8, local_window_size=50, t=2),
    DecodeCase("long", (4096, 3000), s=4096),
    DecodeCase("long_and_short", (10, 4000, 0, 70), s=4096, t=2),
    DecodeCase("peaked_40", (192, 100), amplitude=40.0),
    DecodeCase("peaked_150", (4096, 100), s=4096, amplitude=150.0),
    DecodeCase("scale_given", (192, 100), scale=0.4),
    DecodeCase("scale_zero", (192, 100), scale=0.0),
    DecodeCase("scale_negative", (192, 100), scale=-0.3, t=3),
]

# Sequences that many thread blocks of a GPU share, and blocks that have parts of many.
LARGE_DECODE = [
    DecodeCase("shared_by_many", (20000,), s=20000, n=8, k=2, h=128, hv=128),
    DecodeCase("shared_by_some", (3000, 5000, 0, 77) * 4, s=5000, n=32, k=8, h=128, hv=128),
    DecodeCase(
        "in_pages", (3000, 4992, 0, 77) * 4, s=4992, n=16, k=4, t=3, h=96, hv=96, page_size=48
    ),
    DecodeCase("many_rows", (3000, 5000, 0, 77) * 2, s=5000, n=40, k=2, t=4),
    DecodeCase("heads_that_do_not_divide", (4000, 1, 3000), s=4000, n=20, k=20, h=64),
    DecodeCase("windows", (20000, 100), s=20000, n=8, k=2, t=2, local_window_size=7000),
]

CASES = [*SHAPES, *HEADS, *HEAD_DIMS, *MASKS, *LENGTHS, *ZEROS, *VALUES, *RANDOM]
assert len({case.name for case in CASES + LARGE}) == len(CASES + LARGE)
assert len({case.name for case in DECODE + LARGE_DECODE}) == len(DECODE + LARGE_DECODE)


def by_name(*names):
    table = {case.name: case for case in CASES + LARGE}
    return [table[name] for name in names]
