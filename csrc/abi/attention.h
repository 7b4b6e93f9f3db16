// Attention: rows of a packed batch, what the kernels of a unit do with them.
#pragma once

#include <cstdint>

#include "abi/numbers.h"

namespace icae_fast {

// A query tile is up to kLanes (position, query head) pairs that share one key/value head. 48 is a multiple of
// every vector width here and of the usual group sizes 1, 2, 3, 4, 6, 8, 12 and 16.
constexpr int64_t kLanes = 48;
// Packed keys of a row, and packed head dimensions, are padded with zeros to a multiple of this or more: no
// micro-kernel has more rows.
constexpr int64_t kPad = 8;
// Keys that a task packs, a multiple of all tiles of keys.
constexpr int64_t kPackedKeys = 256;
// With this many lanes or fewer in a row, packing its keys costs more than it saves: at 32 rows of 300 keys, groups
// of 3 heads of 64, bf16, one thread with AVX-512, 3 lanes take 1.9 ms and packed 7.4, 12 lanes 3.9 and 7.6, 15
// lanes 6.7 and 7.5.
constexpr int64_t kFewLanes = 12;

// Element strides of a (T, H, D) tensor whose last stride is 1.
struct Strided {
  const void* data;
  int64_t row, head;
};

struct AttentionInput {
  Strided q, k, v;
  int64_t q_heads, kv_heads, head_dim, n_queries;
  double scale;
  int64_t window;                // 0 for no window
  int64_t packed_keys;           // of all rows together, for one key/value head
  bool one_head_packed = false;  // what is packed is of one key/value head, that which a call is about

  int64_t packed_heads() const { return one_head_packed ? 1 : kv_heads; }
  int64_t group() const { return q_heads / kv_heads; }
  int64_t heads_per_tile() const { return at_most(group(), kLanes); }
  int64_t head_chunks() const { return ceil_div(group(), heads_per_tile()); }
  int64_t positions_per_tile() const { return kLanes / heads_per_tile(); }
};

// One row of the pack: where its queries and keys are. n_keys counts the keys in use. Queries are the last ones of
// the row, or stand where `positions` says, counted from the row's first key.
struct AttentionRow {
  int64_t q_begin, n_queries, k_begin, n_keys;
  int64_t packed_begin;                // where its packed keys begin; a multiple of key_pad
  int64_t partial_begin;               // backward: where its slices' partial sums begin, in keys
  int64_t n_slices;                    // backward: into how many tasks the queries of a key/value head are cut
  int64_t key_pad;                     // the kernels'
  const int32_t* positions = nullptr;  // of the queries, less `key_position`
  int64_t key_position = 0;

  int64_t position(int64_t query) const {
    return positions == nullptr ? query + n_keys - n_queries : positions[query] - key_position;
  }
  int64_t padded_keys() const { return round_up(n_keys, key_pad); }
  int64_t n_tiles(const AttentionInput& in) const {
    return ceil_div(n_queries, in.positions_per_tile()) * in.head_chunks();
  }
};

// Results of the queries from `first` on, `n` of them.
struct AttentionOutput {
  void* out;  // (n, q_heads, head_dim), contiguous; in the compute type where `partial`
  void* lse;  // (q_heads, n), contiguous
  int64_t first, n;
  bool partial;
};

struct AttentionGradient {
  Strided dout, out;
  const void *dlse, *lse;  // (q_heads, n_queries), contiguous
  void *dq, *dk, *dv;      // contiguous
  void* partial;           // slices' sums of dk, then of dv
  int64_t partial_keys;    // of all rows and slices together, for one key/value head
};

// The tile of queries that the same thread is likely to take soon, if there is one.
struct NextTile {
  const AttentionRow* row = nullptr;
  int64_t kv_head = 0, tile = 0;
};

struct AttentionKernels {
  int64_t key_pad;  // what packed keys of a row are padded to a multiple of
  // Bytes of packed keys and values for all key/value heads, and of one thread's scratch.
  int64_t (*packed_bytes)(const AttentionInput&, bool backward);
  int64_t (*scratch_bytes)(const AttentionInput&, bool backward);
  int64_t (*partial_bytes)(const AttentionInput&, const AttentionGradient&);

  // Keys from `first`, a multiple of kPackedKeys, to `last` or the end of the row.
  void (*pack)(const AttentionInput&, const AttentionRow&, int64_t kv_head, int64_t first, int64_t last,
               bool backward, void* packed);
  // Attends to the keys of `n_rows` rows, one after the other, all of the same queries, and asks for the next
  // tile's rows of q and of the output meanwhile.
  void (*tile)(const AttentionInput&, const AttentionRow* rows, int64_t n_rows, int64_t kv_head, int64_t tile,
               const NextTile&, const void* packed, void* scratch, const AttentionOutput&);
  void (*few)(const AttentionInput&, const AttentionRow&, int64_t kv_head, void* scratch, const AttentionOutput&);
  void (*slice)(const AttentionInput&, const AttentionRow&, int64_t kv_head, int64_t slice, const void* packed,
                void* scratch, const AttentionGradient&);
  void (*sum_slices)(const AttentionInput&, const AttentionRow&, int64_t kv_head, int64_t first, int64_t last,
                     const AttentionGradient&);
};

}  // namespace icae_fast
