// dQ of the split mode on sm_90a, for float16 and bfloat16: no atomics, no workspace, every sum in one
// order.
//
//   1 A persistent thread block takes query tiles (block_q rows of one head) from a queue until it is
//     empty, and walks over the keys that they see, as the forward does.
//   2 The loader warp loads Q and dO of each warpgroup's rows, and K and V of one key block after the
//     other through a ring of stages each: K is read twice, first and last, and waits longer.
//   3 Each consumer warpgroup owns 64 rows. One step, with S of its key block at hand:
//     a  P = exp(scale S - LSE), under the product before;
//     b  dP = dO V^T arrives: V's stage is free. dS = P (dP - D); hide what the band hides;
//     c  S of the next block and dQ += dS K go to the tensor cores together. K's stage is free.
//   4 dQ, scaled, leaves from registers, while Q and dO of the next tile arrive.
#pragma once

#include "device/hide.cuh"
#include "device/math.cuh"
#include "device/store_rows.cuh"
#include "kernels/sm90/split_dq_plan.cuh"

namespace jax_flash2::sm90 {

// By one warp.
template <DqTiles kTiles>
JF2_DEVICE void load_dq(const DqParams& p, DqSmem<kTiles> smem, const CUtensorMap* q_map,
                        const CUtensorMap* k_map, const CUtensorMap* v_map,
                        const CUtensorMap* dout_map, int lane) {
  using KV = typename DqSmem<kTiles>::KV;
  using Q = typename DqSmem<kTiles>::Q;
  RingPlace<DqTile::kSlots> record;
  RingPlace<kTiles.k_stages> k;  // of the next tile of K
  RingPlace<kTiles.v_stages> v;
  uint32_t rows_parity = 1;
  uint32_t cleared = 0;
  int index = blockIdx.x;

  auto load_k = [&](const DqTile& tile, int key) __attribute__((always_inline)) {
    const uint32_t ready = smem.k_full(k.slot());
    // What lies past the buffer's end arrives as zeros.
    const bool clears = key < tile.visible.begin || (key + kTiles.block_k > tile.visible.end &&
                                                     tile.visible.end < p.shape.kv_len);
    const uint32_t full = clears ? smem.landed() : ready;
    ptx::mbarrier_wait(smem.k_empty(k.slot()), k.parity() ^ 1);
    if (lane == 0) {
      ptx::mbarrier_arrive_expect_tx(full, KV::kBytes);
      load_rows(smem.k(k.slot()), k_map, full, tile.kv_head, key, tile.batch);
    }
    if (clears) {
      ptx::mbarrier_wait(full, cleared++ & 1);
      clear_hidden_rows(smem.k(k.slot()), key, tile.visible, lane);
      if (lane == 0) ptx::mbarrier_arrive(ready);
    }
    k.advance();
    __syncwarp();  // no lane falls behind the barriers' phases
  };
  auto load_v = [&](const DqTile& tile, int key) __attribute__((always_inline)) {
    const uint32_t full = smem.v_full(v.slot());
    ptx::mbarrier_wait(smem.v_empty(v.slot()), v.parity() ^ 1);
    if (lane == 0) {
      ptx::mbarrier_arrive_expect_tx(full, KV::kBytes);
      load_rows(smem.v(v.slot()), v_map, full, tile.kv_head, key, tile.batch);
    }
    v.advance();
    __syncwarp();
  };

#pragma unroll 1
  while (true) {
    DqTile& tile = smem.tiles[record.slot()];
    ptx::mbarrier_wait(smem.record_empty(record.slot()), record.parity() ^ 1);
    __syncwarp();
    if (lane == 0) {
      fill_dq_tile<kTiles>(tile, p, index);
      // Asked for early: the round trip is over when it is needed.
      tile.next = tile.live ? atomicAdd(p.next_tile, 1) + int(gridDim.x) : index;
    }
    __syncwarp();
    const int blocks = tile.live ? tile.blocks : 0;
    auto load_queries = [&]() __attribute__((always_inline)) {
#pragma unroll 1
      for (int w = 0; w < kTiles.consumers; ++w) {
        ptx::mbarrier_wait(smem.rows_empty(w), rows_parity);
        __syncwarp();
        if (lane != 0) continue;
        const uint32_t full = smem.rows_full(w);
        if (blocks == 0) {
          ptx::mbarrier_arrive(full);
          continue;
        }
        constexpr int kRowBytes = 64 * kPanelRowBytes;  // of a panel
        ptx::mbarrier_arrive_expect_tx(full, 2 * Q::kPanels * kRowBytes);
#pragma unroll 1
        for (int panel = 0; panel < Q::kPanels; ++panel) {
          const uint32_t to = panel * Q::kPanelBytes + w * kRowBytes;
          ptx::tma_load_4d(smem.q().base + to, q_map, full, panel * kPanelCols, tile.head,
                           tile.row + w * 64, tile.batch);
          ptx::tma_load_4d(smem.dout().base + to, dout_map, full, panel * kPanelCols, tile.head,
                           tile.row + w * 64, tile.batch);
        }
      }
      rows_parity ^= 1;
    };
    if (blocks == 0) load_queries();
    if (!tile.live) break;
#pragma unroll 1
    for (int j = 0; j < blocks; ++j) {
      const int key = tile.first_key + j * kTiles.block_k;
      load_k(tile, key);
      if (j == 0) load_queries();
      load_v(tile, key);
    }
    index = tile.next;
    record.advance();
  }
}

template <DqTiles kTiles, typename Math>
struct DqRows {
  using Smem = DqSmem<kTiles>;
  using Element = typename Math::Element;
  static constexpr int kS = kTiles.block_k / 2, kD = kTiles.head_dim / 2;  // registers
  using ScoreMma = ptx::Wgmma<kTiles.block_k, Element>;
  using DqMma = ptx::Wgmma<kTiles.head_dim, Element>;

  const DqParams& p;
  const Smem smem;
  const int warpgroup, row_in_tile, lane;  // row g = lane / 4 of the warp

  float s[kS], dp[kS], dq[kD];
  uint32_t packed_ds[kS / 2];
  float lse[2], delta[2];  // of rows g and g + 8: -LSE * log2(e), -D

  // x = A B^T of the warpgroup's rows of Q or dO and a tile of K or V.
  JF2_DEVICE void issue_scores(float (&x)[kS], typename Smem::Q rows, typename Smem::KV keys) {
    const uint32_t a =
        ptx::opaque(rows.k_major() + Smem::Q::k_major_offset(ptx::uniform(warpgroup * 64), 0));
    const uint32_t b = ptx::opaque(keys.k_major());
    ptx::wgmma_fence();
#pragma unroll
    for (int d = 0; d < kTiles.head_dim; d += 16)
      ScoreMma::template ss<false, false>(x, a + Smem::Q::k_major_offset(0, d),
                                          b + Smem::KV::k_major_offset(0, d), d > 0);
    ptx::wgmma_commit();
  }
  JF2_DEVICE void issue_dq(typename Smem::KV k) {
    const uint32_t b = ptx::opaque(k.outer_major());
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kTiles.block_k; i += 16) {
      const uint32_t (&a)[4] = *reinterpret_cast<const uint32_t (*)[4]>(&packed_ds[i / 4]);
      DqMma::template rs<true>(dq, a, b + Smem::KV::outer_major_offset(i), 1);
    }
    ptx::wgmma_commit();
  }
  template <int kCount>
  static JF2_DEVICE void pin(float (&values)[kCount]) {
#pragma unroll
    for (float& value : values) ptx::pin(value);
  }
  JF2_DEVICE void start(const DqTile& tile) {
    const int64_t head = int64_t(tile.batch) * p.shape.query_heads + tile.head;
    const int64_t first = head * round_up(p.shape.query_len, kTokenTile) + tile.row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t i = first + row_in_tile + half * 8;
      const char* const terms = p.row_terms + i / kTermTile * 2 * kTermBytes;
      lse[half] = load_terms(terms, int(i % kTermTile)) * p.scale_log2;
      delta[half] = load_terms(terms + kTermBytes, int(i % kTermTile));
    }
#pragma unroll
    for (float& x : dq) x = 0.f;
    pin(dq);
  }
  // S -> P.
  JF2_DEVICE void exponentiate() {
#pragma unroll
    for (int i = 0; i < kS; ++i) s[i] = ptx::ex2(fmaf(s[i], p.scale_log2, lse[i >> 1 & 1]));
  }
  // P, dP -> dS.
  JF2_DEVICE void score_gradients() {
#pragma unroll
    for (int i = 0; i < kS; ++i) dp[i] = s[i] * (dp[i] + delta[i >> 1 & 1]);
  }
  // dS becomes 0 where the band hides, of the block of keys at `key`.
  JF2_DEVICE void hide(const DqTile& tile, int key) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = min(tile.row + row_in_tile + half * 8, tile.band.query_length - 1);
      hide_in_row<kTiles.block_k>(seen_by(tile.band, row, key, lane), 0.f,
                                  [&](int j, int e) -> float& { return dp[j * 4 + half * 2 + e]; });
    }
  }
  JF2_DEVICE void pack() {
#pragma unroll
    for (int i = 0; i < kS / 2; ++i) packed_ds[i] = pack2<Element>(dp[2 * i], dp[2 * i + 1]);
  }
  JF2_DEVICE void store(const DqTile& tile) {
    const Shape& shape = p.shape;
    const int row = tile.row + row_in_tile;
    // A row that sees nothing has no gradient, whatever its padding held.
    bool sees[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = row + half * 8;
      sees[half] = i < tile.band.query_length && tile.band.lo(i) < tile.band.hi(i);
    }
    const int64_t stride = int64_t(shape.query_heads) * shape.head_dim;
    Element* const to = static_cast<Element*>(p.dq) +
                        (int64_t(tile.batch) * shape.query_len + row) * stride +
                        int64_t(tile.head) * shape.head_dim;
    store_rows<kD / 4>(to, stride, shape.query_len - row, shape.head_dim, lane,
                       [&](int j, int half) {
                         const float* const x = &dq[j * 4 + half * 2];
                         return sees[half] ? pack2<Element>(x[0] * p.scale, x[1] * p.scale) : 0u;
                       });
  }
};

template <DqTiles kTiles, typename Math>
JF2_DEVICE void consume_dq(const DqParams& p, DqSmem<kTiles> smem) {
  const int lane = threadIdx.x & 31, warpgroup = ptx::uniform(threadIdx.x / 128) - 1;
  DqRows<kTiles, Math> c{p, smem, warpgroup, int(threadIdx.x - 128) / 32 * 16 + (lane >> 2), lane};
  RingPlace<DqTile::kSlots> record;
  RingPlace<kTiles.k_stages> k;  // of the block in hand, then of the next
  RingPlace<kTiles.v_stages> v;
  uint32_t rows_parity = 0;

  auto arrive = [&](uint32_t barrier) __attribute__((always_inline)) {
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(barrier);
  };
  auto await_k = [&]() __attribute__((always_inline)) {
    ptx::mbarrier_wait(smem.k_full(k.slot()), k.parity());
  };
  auto await_v = [&]() __attribute__((always_inline)) {
    ptx::mbarrier_wait(smem.v_full(v.slot()), v.parity());
  };
  auto release_v = [&]() __attribute__((always_inline)) {
    arrive(smem.v_empty(v.slot()));
    v.advance();
  };
  // Passes over key blocks that the warpgroup's rows do not see, when they have arrived.
  auto skip = [&](int blocks) __attribute__((always_inline)) {
#pragma unroll 1
    for (int i = 0; i < blocks; ++i) {
      await_k();
      arrive(smem.k_empty(k.slot()));
      k.advance();
      await_v();
      release_v();
    }
  };

#pragma unroll 1
  while (true) {
    ptx::mbarrier_wait(smem.rows_full(warpgroup), rows_parity);
    rows_parity ^= 1;
    const DqTile& tile = smem.tiles[record.slot()];
    if (!tile.live) break;
    const int first_row = ptx::uniform(tile.row) + warpgroup * 64;
    const int first_key = ptx::uniform(tile.first_key), blocks = ptx::uniform(tile.blocks);
    // Key blocks, counted from the tile's first: those that some row sees, and those that every row sees
    // whole. Worked out once, and not from the band in every step, which costs head dim 64 a fifth.
    const Range own = tile.band.keys_of({first_row, first_row + 64});
    const Range whole = tile.band.keys_seen_by_all({first_row, first_row + 64});
    const auto blocks_to = [&](int key) {
      return ptx::uniform((key - first_key) / kTiles.block_k);
    };
    const int begin = own.empty() ? 0 : blocks_to(own.begin);
    const int end = own.empty() ? 0 : blocks_to(own.end + kTiles.block_k - 1);
    const int whole_begin = blocks_to(whole.begin + kTiles.block_k - 1);
    const int whole_end = blocks_to(whole.end);
    c.start(tile);
    skip(begin);
    int block = begin;  // in hand

    auto take_s = [&]() __attribute__((always_inline)) {
      c.pin(c.s);
      c.exponentiate();
    };
    // One block, whose P is at hand; P of the next along with it unless this is the last. Nothing is
    // in flight before or after.
    auto step = [&]<bool kLast>() __attribute__((always_inline)) {
      const int now = k.slot();
      k.advance();
      await_v();
      c.issue_scores(c.dp, smem.dout(), smem.v(v.slot()));
      ptx::wgmma_wait<0>();
      c.pin(c.dp);
      release_v();
      if constexpr (kLast) arrive(smem.rows_empty(warpgroup));
      c.score_gradients();
      if (block < whole_begin || block >= whole_end)
        c.hide(tile, first_key + block * kTiles.block_k);
      c.pack();
      ++block;
      if constexpr (!kLast) {
        await_k();
        c.issue_scores(c.s, smem.q(), smem.k(k.slot()));
      }
      c.issue_dq(smem.k(now));
      if constexpr (!kLast) {
        ptx::wgmma_wait<1>();
        take_s();
      }
      ptx::wgmma_wait<0>();
      c.pin(c.dq);
      arrive(smem.k_empty(now));
    };

    if (begin < end) {
      await_k();
      c.issue_scores(c.s, smem.q(), smem.k(k.slot()));
      ptx::wgmma_wait<0>();
      take_s();
#pragma unroll 1
      for (int left = end - begin; left > 1; --left) step.template operator()<false>();
      step.template operator()<true>();
    } else {
      arrive(smem.rows_empty(warpgroup));
    }
    skip(blocks - end);
    c.store(tile);
    arrive(smem.record_empty(record.slot()));
    record.advance();
  }
}

template <int kHeadDim, typename Math>
__global__ void __launch_bounds__(dq_tiles(kHeadDim).threads(), 1)
    split_dq_kernel(const __grid_constant__ CUtensorMap q_map,
                    const __grid_constant__ CUtensorMap k_map,
                    const __grid_constant__ CUtensorMap v_map,
                    const __grid_constant__ CUtensorMap dout_map,
                    const __grid_constant__ DqParams p) {
  constexpr DqTiles kTiles = dq_tiles(kHeadDim);
  using Smem = DqSmem<kTiles>;
  extern __shared__ uint8_t shared[];
  const uint32_t unaligned = ptx::shared_address(shared), base = (unaligned + 1023) & ~1023u;
  const Smem smem{base,
                  reinterpret_cast<DqTile*>(shared + (base - unaligned) + Smem::kTileRecords)};
  const int thread = threadIdx.x, warp = ptx::uniform(thread / 32);
  if (thread == 0) {
    constexpr int kWarps = 4 * kTiles.consumers;
    for (int w = 0; w < kTiles.consumers; ++w) {
      ptx::mbarrier_init(smem.rows_full(w), 1);
      ptx::mbarrier_init(smem.rows_empty(w), 4);
    }
    for (int i = 0; i < kTiles.k_stages; ++i) {
      ptx::mbarrier_init(smem.k_full(i), 1);
      ptx::mbarrier_init(smem.k_empty(i), kWarps);
    }
    for (int i = 0; i < kTiles.v_stages; ++i) {
      ptx::mbarrier_init(smem.v_full(i), 1);
      ptx::mbarrier_init(smem.v_empty(i), kWarps);
    }
    for (int i = 0; i < DqTile::kSlots; ++i) ptx::mbarrier_init(smem.record_empty(i), kWarps);
    ptx::mbarrier_init(smem.landed(), 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();  // the barriers stand
  if (warp < 4) {
    ptx::setmaxnreg_dec<kTiles.producer_registers>();
    if (warp == 0) load_dq<kTiles>(p, smem, &q_map, &k_map, &v_map, &dout_map, thread);
  } else {
    ptx::setmaxnreg_inc<kTiles.consumer_registers>();
    consume_dq<kTiles, Math>(p, smem);
  }
}

}  // namespace jax_flash2::sm90
