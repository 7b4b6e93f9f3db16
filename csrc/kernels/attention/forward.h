// Forward attention over one query tile: online softmax over tiles of kForwardKeys keys (FlashAttention-2),
// transposed.
//
//     S^T = K Q^T,    P^T = 2^(c (S^T - shift)),    O^T = O^T 2^(c (old shift - shift)) + V^T P^T
//
// Scores never reach memory. A block of scores is summed in registers and becomes weights in the same registers.
// That needs the shift before the row's maximum is known. So the shift is at least the largest score of some
// earlier block, and it is raised only when a score exceeds it by kSlack powers of two. Then O^T, the sums and the
// tile's weights are rescaled, which is rare. Results do not depend on the shift, and weights up to 2^kSlack cost
// no accuracy. Sums start at 0 and not at minus the shift, so that equal scores are equal numbers, however large.
//
// With AMX, a tile of scores is computed at once and read back block by block. The rest is the same.
#pragma once

#include "kernels/attention/forward_scratch.h"
#include "kernels/attention/lane_group.h"
#include "kernels/attention/layout.h"
#include "kernels/attention/query_tile.h"
#include "kernels/attention/softmax_weights.h"
#include "kernels/attention/store.h"
#include "kernels/flush.h"
#include "kernels/pack.h"
#include "kernels/product.h"
#include "kernels/tiles.h"
#include "kernels/unit.h"
#include "kernels/vec.h"
#include "kernels/vec_math.h"

namespace icae_fast::ICAE_UNIT {

// Write the log-sum-exp, and replace the sums by their reciprocals.
template <class T>
static void store_lse(const AttentionInput& in, const AttentionRow& row, const QueryTile& tile,
                      const ForwardScratch<T>& t, const AttentionOutput& to) {
  using C = typename Elem<T>::C;
  Softmax<C>& softmax = *t.softmax;
  const C scale = score_scale<C>(in.scale);
  for (int64_t l = 0; l < kLanes; l += Vec<C>::kWidth) {
    const V<C> total = load(softmax.sum + l);
    const V<C> lse = load(softmax.shift + l) * scale + log_of(total);
    store(softmax.shift + l, total == V<C>{} ? set1(-kInfinity<C>) : lse);
    store(softmax.sum + l, total == V<C>{} ? V<C>{} : C(1) / total);
  }
  for (int64_t l = 0; l < tile.lanes(); ++l) {
    static_cast<C*>(to.lse)[tile.head(l) * to.n + row.q_begin + tile.position(l) - to.first] = softmax.shift[l];
  }
}

template <class T>
static void forward_tile(const AttentionInput& in, const AttentionRow* key_rows, int64_t n_rows, int64_t kv_head,
                         int64_t tile_index, const NextTile& next_tile, const void* packed, void* scratch,
                         const AttentionOutput& to) {
  using P = Product<T>;
  using C = typename P::C;
  const FlushSubnormals flush;
  const AttentionRow& row = key_rows[0];
  const QueryTile tile(in, row, kv_head, tile_index);
  const ForwardScratch<T> t(in, Arena{static_cast<char*>(scratch)});
  const TileRegisters<P> use;
  const TileRows<T> rows{in, row, to, tile};
  const int64_t lanes = tile.lanes(), size = PackedKeys<T>::width(in);
  t.prefetch->plan(in, next_tile, to);
  pack_transposed<P, T>([&](int64_t l) { return rows.q(l); }, lanes, in.head_dim, in.scale < 0, t.q);
  if constexpr (P::kTiles) clear_past<P>(t.q, in.head_dim, size);
  for (int64_t l = 0; l < kLanes; ++l) {
    t.softmax->shift[l] = 0;
    t.softmax->limit[l] = -kInfinity<C>;
    t.softmax->sum[l] = 0;
  }
  const SoftmaxWeights<T> weights(C(exponent_scale(in.scale)));
  bool check_nan = false;
  if constexpr (!SoftmaxWeights<T>::kKeepsNan) {
    // Lanes past these hold old values of the thread's scratch.
    const int64_t packed_lanes = round_up(lanes, Vec<C>::kWidth);
    for (int64_t s = 0; s < ceil_div(in.head_dim, P::kPair) && !check_nan; ++s) {
      check_nan = !all_finite(t.q + s * kLanes * P::kPair, packed_lanes * P::kPair);
    }
  }
  for_vector_blocks(ceil_div(lanes, Vec<C>::kWidth), [&](int64_t n, int64_t width) {
    const int64_t lane = n * Vec<C>::kWidth;
    bool has_output = false;
    for (int64_t r = 0; r < n_rows; ++r) {
      const PackedKeys<T> keys(in, key_rows[r], kv_head, false, packed);
      t.range->set(in, key_rows[r], tile);
      const int64_t end = round_up(t.range->end, kPad);
      for (int64_t key = t.range->template first<P>(), next; key < t.range->end; key = next) {
        next = (key / kForwardKeys + 1) * kForwardKeys;
        const int64_t stop = at_most(next, end);
        if (width == 3) {
          LaneGroup<T, 3>{in, keys, t, lane, weights, check_nan, key, has_output}.attend(stop);
        } else if (width == 2) {
          LaneGroup<T, 2>{in, keys, t, lane, weights, check_nan, key, has_output}.attend(stop);
        } else {
          LaneGroup<T, 1>{in, keys, t, lane, weights, check_nan, key, has_output}.attend(stop);
        }
      }
    }
    for (int64_t d = 0; d < size && !has_output; ++d) clear(t.o + d * kLanes + lane, width * Vec<C>::kWidth);
  });
  t.prefetch->issue(kLanes);  // prefetch the remaining lanes
  store_lse(in, row, tile, t, to);
  if (to.partial) {
    store_transposed<C>(t.o, t.softmax->sum, lanes, in.head_dim,
                        [&](int64_t l) { return rows.template out<C>(l); });
  } else {
    store_transposed<T>(t.o, t.softmax->sum, lanes, in.head_dim,
                        [&](int64_t l) { return rows.template out<T>(l); });
  }
}

}  // namespace icae_fast::ICAE_UNIT
