// Decoding: the way into shared memory. One warp loads K, another V, ahead of the warps that compute;
// Q comes by these.
#pragma once

#include "kernels/sm80/decode_shared.cuh"

namespace jax_flash2::sm80 {

// The pages of a tile's groups of 16 keys, as the table names them.
template <int kKeys>
struct GroupPages {
  static constexpr int kGroups = kKeys / kPageMultiple;
  int page[kGroups] = {};

  // Of the groups that hold keys which a row sees; the table is read nowhere else.
  JF2_DEVICE void look_up(const DecodeProblem& problem, const DecodePlan& plan,
                          const DecodeCursor<kKeys>& at) {
    const int32_t* const table =
        problem.pages.table + int64_t(at.sequence) * problem.pages.per_sequence;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int key = at.first_key() + g * kPageMultiple;
      const bool seen = key < at.tiles.keys.end && key + kPageMultiple > at.tiles.keys.begin;
      page[g] = seen ? table[plan.page_groups.quotient(key / kPageMultiple)] : 0;
    }
  }
  // Where group g begins, as a row of k and v seen as [.., K, H] and [.., K, Hv]. Neighbours of a
  // group lie together. -1: the group has no page.
  JF2_DEVICE int64_t row(const DecodeProblem& problem, const DecodePlan& plan,
                         const DecodeCursor<kKeys>& at, int g) const {
    const int key = at.first_key() + g * kPageMultiple;
    if (unsigned(page[g]) >= unsigned(problem.pages.count)) return -1;
    return int64_t(page[g]) * problem.pages.size +
           int(plan.page_groups.remainder(key / kPageMultiple)) * kPageMultiple;
  }
};

// Until a loader may ask for another batch: at most `ahead`, 2 or 4, are under way then.
JF2_DEVICE void wait_for_batches(int ahead) {
  if (ahead == 4) {
    ptx::cp_async_wait<3>();
  } else {
    ptx::cp_async_wait<1>();
  }
}

// The warp that loads K (side 0) or V (side 1): all tiles of the block's part, each as soon as there
// is room for it and at most plan.ahead batches of keys are under way. Keys that no row sees, and
// those without a page, become zeros.
template <typename Config, bool kPaged>
JF2_DEVICE void run_loader(const DecodeShared<Config>& shared, const DecodeProblem& problem,
                           const DecodePlan& plan, const DecodePart& part, int side, int lane) {
  using KvTile = typename DecodeShared<Config>::KvTile;
  using Element = typename Config::Element;
  using Walk = ChunkWalk<32, KvTile>;
  constexpr int kKeys = Config::kKeys, kBatch = Config::kBatch, kStep = Walk::kRowStep;
  constexpr int kGroup = kPaged ? kPageMultiple : kBatch;  // keys that lie together
  static_assert(kStep == 4, "two steps a repetition of the swizzle, four a group of keys");
  const Walk walk(lane);
  const int dim = side == 0 ? problem.shape.head_dim : problem.shape.value_dim;
  const int64_t stride = int64_t(problem.shape.kv_heads) * dim;
  const Element* const from =
      static_cast<const Element*>(side == 0 ? problem.k : problem.v) + walk.row * stride + walk.col;

  DecodeCursor<kKeys> at(problem, part.sequence, part.length, part.offset);
  GroupPages<kKeys> pages;
  if constexpr (kPaged) pages.look_up(problem, plan, at);
  StageRing ring;
  for (int n = 0; n < part.count; ring.advance(plan.stages)) {
    const Element* const from_head = from + part.kv_head(plan, at.unit) * dim;
    const Range seen = {at.tiles.keys.begin - at.first_key(), at.tiles.keys.end - at.first_key()};
    const bool whole = seen.begin <= 0 && seen.end >= kKeys && dim == KvTile::kCols;

    if (n >= plan.stages) ptx::mbarrier_wait(shared.empty(ring.stage, side), ring.parity ^ 1);
    const KvTile tile = side == 0 ? shared.k(ring.stage) : shared.v(ring.stage);
    const uint32_t to[2] = {tile.address(walk.row, walk.col),
                            tile.address(walk.row + kStep, walk.col)};
#pragma unroll
    for (int g = 0; g < kKeys; g += kGroup) {
      if (g % kBatch == 0) wait_for_batches(plan.ahead);
      int64_t first_row = int64_t(at.sequence) * problem.shape.kv_len + at.first_key() + g;
      bool missing = false;
      if constexpr (kPaged) {
        first_row = pages.row(problem, plan, at, g / kGroup);
        missing = first_row < 0;
        if (missing) first_row = 0;
        if (side == 0 && lane == 0) shared.set_missing(ring.stage, g / kGroup, missing);
      }
      const Element* row = from_head + first_row * stride;
      if (whole && !missing) {  // a loader's own instructions take time, too
#pragma unroll
        for (int r = g; r < g + kGroup; r += kStep, row = ptx::opaque(row + kStep * stride)) {
#pragma unroll
          for (int c = 0; c < KvTile::kCols; c += Walk::kPanelCols)
            ptx::cp_async_16(KvTile::step(to[r / kStep % 2], r / 8 * 8, c), row + c, 16);
        }
      } else {
#pragma unroll
        for (int r = g; r < g + kGroup; r += kStep, row = ptx::opaque(row + kStep * stride)) {
          const bool inside = !missing && contains(seen, walk.row + r);
#pragma unroll
          for (int c = 0; c < KvTile::kCols; c += Walk::kPanelCols) {
            ptx::cp_async_16(KvTile::step(to[r / kStep % 2], r / 8 * 8, c), row + c,
                             inside && walk.col + c < dim ? 16 : 0);
          }
        }
      }
      if ((g + kGroup) % kBatch == 0) ptx::cp_async_commit();
    }
    if (n == 0) __syncthreads();  // the barriers are there; sooner nobody needs them
    ptx::cp_async_mbarrier_arrive(shared.full(ring.stage, side));
    if (lane == 0) ptx::mbarrier_arrive(shared.full(ring.stage, side));
    if (++n == part.count) break;
    at.advance(problem, plan);
    if constexpr (kPaged) pages.look_up(problem, plan, at);
  }
  ptx::cp_async_wait<0>();
}

// Q of a block's rows, zeros past them; by the warps that compute.
template <typename Config>
JF2_DEVICE void load_rows(const DecodeShared<Config>& shared, const DecodeProblem& problem,
                          const DecodePlan& plan, const DecodeRows& rows, int thread) {
  using QTile = typename DecodeShared<Config>::QTile;
  using Element = typename Config::Element;
  using Walk = ChunkWalk<kDecodeWarps * 32, QTile>;
  const Walk walk(thread);
  const Shape& shape = problem.shape;
  const uint32_t to = shared.q().address(walk.row, walk.col);
#pragma unroll
  for (int r = 0; r < QTile::kRows; r += Walk::kRowStep) {
    const int i = walk.row + r;
    const Element* const from = static_cast<const Element*>(problem.q) +
                                rows.index(shape, plan, i < rows.count ? i : 0) * shape.head_dim +
                                walk.col;
#pragma unroll
    for (int c = 0; c < QTile::kCols; c += Walk::kPanelCols) {
      const bool inside = i < rows.count && walk.col + c < shape.head_dim;
      ptx::sts_128(QTile::step(to, r, c),
                   inside ? *reinterpret_cast<const uint4*>(from + c) : make_uint4(0, 0, 0, 0));
    }
  }
}

}  // namespace jax_flash2::sm80
