// Query tiles, and the range of keys that each lane reads (causal mask and sliding window).
#pragma once

#include "kernels/tiles.h"
#include "kernels/unit.h"
#include "kernels/vec.h"

namespace icae_fast::ICAE_UNIT {

// The lanes of one query tile.
struct QueryTile {
  int64_t first_position, n_positions, first_head, n_heads;

  QueryTile(const AttentionInput& in, const AttentionRow& row, int64_t kv_head, int64_t tile) {
    const int64_t chunk = tile % in.head_chunks() * in.heads_per_tile();
    first_position = tile / in.head_chunks() * in.positions_per_tile();
    n_positions = at_most(in.positions_per_tile(), row.n_queries - first_position);
    first_head = kv_head * in.group() + chunk;
    n_heads = at_most(in.heads_per_tile(), in.group() - chunk);
    int64_t lane = 0;
    for (int64_t p = 0; p < n_positions; ++p) {
      for (int64_t h = 0; h < n_heads; ++h, ++lane) {
        positions[lane] = static_cast<int32_t>(first_position + p);
        heads[lane] = static_cast<int32_t>(first_head + h);
      }
    }
  }
  int64_t lanes() const { return n_positions * n_heads; }
  int64_t position(int64_t lane) const { return positions[lane]; }
  int64_t head(int64_t lane) const { return heads[lane]; }

 private:
  int32_t positions[kLanes], heads[kLanes];  // per lane: dividing each time would cost as much as copying the lane
};

// Lane l reads keys [low[l], high[l]).
template <class C>
struct KeyRange {
  typename Vec<C>::Int low[kLanes], high[kLanes];
  int64_t begin, end;          // keys that any lane reads
  int64_t all_begin, all_end;  // keys that every lane reads

  // Set the ranges of the tile's lanes. Other lanes up to `filled`, which a kernel also computes, read no key.
  void set(const AttentionInput& in, const AttentionRow& row, const QueryTile& tile, int64_t filled = kLanes) {
    const int64_t lanes = tile.lanes();
    begin = all_end = row.n_keys;
    end = all_begin = 0;
    for (int64_t l = 0; l < filled; ++l) {
      const int64_t after = l < lanes ? row.position(tile.position(l)) + 1 : 0;
      high[l] = at_least(0, at_most(after, row.n_keys));
      low[l] = in.window == 0 ? 0 : at_least(0, after - in.window);
      if (l >= lanes) continue;
      begin = at_most(begin, low[l]);
      end = at_least(end, high[l]);
      all_begin = at_least(all_begin, low[l]);
      all_end = at_most(all_end, high[l]);
    }
    begin = begin / kPad * kPad;
  }
  // First key to compute: keys before `begin` that complete a tile are masked.
  template <class P>
  int64_t first() const {
    return P::kTiles ? begin / kTileDepth * kTileDepth : begin;
  }
  bool cut(int64_t from, int64_t to) const { return from < all_begin || to > all_end; }

  ICAE_INLINE I<C> reads(int64_t key, I<C> low_lanes, I<C> high_lanes) {
    const I<C> k = set1_int<C>(key);
    return (k >= low_lanes) & (k < high_lanes);
  }
};

}  // namespace icae_fast::ICAE_UNIT
