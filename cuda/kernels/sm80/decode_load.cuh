// Decoding: the way into shared memory. One warp loads K, another V, each as far ahead as there is
// room; Q comes by the warps that compute.
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
    if (problem.pages.table == nullptr) return;
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
    if (problem.pages.table == nullptr) return int64_t(at.sequence) * problem.shape.kv_len + key;
    if (unsigned(page[g]) >= unsigned(problem.pages.count)) return -1;
    return int64_t(page[g]) * problem.pages.size +
           int(plan.page_groups.remainder(key / kPageMultiple)) * kPageMultiple;
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

  DecodeCursor<kKeys> next(problem, part.sequence, part.offset);
  GroupPages<kKeys> next_pages;
  next_pages.look_up(problem, plan, next);
  StageRing ring;
  for (int n = 0; n < part.count; ++n, ring.advance(plan.stages)) {
    const DecodeCursor<kKeys> at = next;
    const GroupPages<kKeys> pages = next_pages;
    if (n + 1 < part.count) {  // looked up a tile ahead, since the table is far away
      next.advance(problem, plan);
      next_pages.look_up(problem, plan, next);
    }
    const Element* const from_head = from + part.kv_head(plan, at.unit) * dim;
    const int first = at.first_key() + walk.row - at.tiles.keys.begin;
    const unsigned seen = at.tiles.keys.end - at.tiles.keys.begin;

    ptx::mbarrier_wait(shared.empty(ring.stage, side), ring.parity ^ 1);  // at first it is
    const KvTile tile = side == 0 ? shared.k(ring.stage) : shared.v(ring.stage);
    const uint32_t to[2] = {tile.address(walk.row, walk.col), tile.address(walk.row + 4, walk.col)};
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int64_t first_row = pages.row(problem, plan, at, g);
      if (problem.pages.table != nullptr && side == 0 && lane == 0) {
        shared.set_missing(ring.stage, g, first_row < 0);
      }
      const Element* row = from_head + (first_row < 0 ? 0 : first_row) * stride;
#pragma unroll
      for (int r = g * kPageMultiple; r < (g + 1) * kPageMultiple; r += 4, row += 4 * stride) {
        const bool inside = first_row >= 0 && unsigned(first + r) < seen;
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
