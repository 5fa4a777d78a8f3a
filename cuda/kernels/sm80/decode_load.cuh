// Decoding: the way into shared memory. One warp loads K, another V, each as far ahead as there is
// room; Q comes by the warps that compute.
#pragma once

#include "kernels/sm80/decode_shared.cuh"

namespace jax_flash2::sm80 {

// Where the groups of 16 keys of a tile begin, as rows of k and v seen as [.., K, H] and
// [.., K, Hv]. Neighbours of a group lie together. -1: the group has no page.
template <int kKeys>
struct GroupRows {
  static constexpr int kGroups = kKeys / kPageMultiple;
  int64_t row[kGroups];

  JF2_DEVICE GroupRows(const DecodeProblem& problem, const DecodePlan& plan,
                       const DecodeCursor<kKeys>& at) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int key = at.first_key() + g * kPageMultiple;
      row[g] = int64_t(at.sequence) * problem.shape.kv_len + key;
      if (problem.pages.table == nullptr) continue;
      row[g] = 0;
      if (key >= at.tiles.keys.end || key + kPageMultiple <= at.tiles.keys.begin) continue;
      const int group = key / kPageMultiple, index = int(plan.page_groups.quotient(group));
      const int page =
          problem.pages.table[int64_t(at.sequence) * problem.pages.per_sequence + index];
      row[g] = unsigned(page) < unsigned(problem.pages.count)
                   ? int64_t(page) * problem.pages.size +
                         (group - index * int(plan.page_groups.d)) * kPageMultiple
                   : -1;
    }
  }
};

// The warp that loads K (side 0) or V (side 1): all tiles of the block's part, each as soon as there
// is room for it. Keys that no row sees, and those without a page, become zeros.
template <typename Config>
JF2_DEVICE void run_loader(const DecodeShared<Config>& shared, const DecodeProblem& problem,
                           const DecodePlan& plan, const DecodePart& part, int side, int lane) {
  using KvTile = typename DecodeShared<Config>::KvTile;
  using Element = typename Config::Element;
  using Walk = ChunkWalk<32, KvTile>;
  constexpr int kKeys = Config::kKeys, kGroups = DecodeShared<Config>::kGroups;
  static_assert(Walk::kRowStep == 4, "two steps a repetition of the swizzle, four a group of keys");
  const Walk walk(lane);
  const int dim = side == 0 ? problem.shape.head_dim : problem.shape.value_dim;
  const int64_t stride = int64_t(problem.shape.kv_heads) * dim;
  const Element* const from =
      static_cast<const Element*>(side == 0 ? problem.k : problem.v) + walk.row * stride + walk.col;

  DecodeCursor<kKeys> at(problem, part.sequence, part.offset);
  StageRing ring;
  for (int n = 0; n < part.count; ++n, ring.advance(plan.stages)) {
    // Looked up while the stages are still full.
    if (n > 0) at.advance(problem, plan);
    const GroupRows<kKeys> rows(problem, plan, at);
    const Element* const from_head = from + part.kv_head(plan, at.unit) * dim;
    const int first = at.first_key() + walk.row - at.tiles.keys.begin;
    const unsigned seen = at.tiles.keys.end - at.tiles.keys.begin;

    ptx::mbarrier_poll(shared.empty(ring.stage, side), ring.parity ^ 1);  // at first it is
    const KvTile tile = side == 0 ? shared.k(ring.stage) : shared.v(ring.stage);
    const uint32_t to[2] = {tile.address(walk.row, walk.col), tile.address(walk.row + 4, walk.col)};
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (problem.pages.table != nullptr && side == 0 && lane == 0) {
        shared.set_missing(ring.stage, g, rows.row[g] < 0);
      }
      const Element* row = from_head + (rows.row[g] < 0 ? 0 : rows.row[g]) * stride;
#pragma unroll
      for (int r = g * kPageMultiple; r < (g + 1) * kPageMultiple; r += 4, row += 4 * stride) {
        const bool inside = rows.row[g] >= 0 && unsigned(first + r) < seen;
#pragma unroll
        for (int c = 0; c < KvTile::kCols; c += Walk::kPanelCols) {
          ptx::cp_async_16(KvTile::step(to[r / 4 % 2], r / 8 * 8, c), row + c,
                           inside && walk.col + c < dim ? 16 : 0);
        }
      }
    }
    ptx::cp_async_mbarrier_arrive(shared.full(ring.stage, side));
    ptx::mbarrier_arrive(shared.full(ring.stage, side));
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
