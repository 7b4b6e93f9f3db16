#include "ops/common/shared_attention.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <utility>

#include "common/checks.h"

namespace icae_fast {
namespace {

// Keys of one piece of a segment. With fewer, merging costs more than sharing the work gains.
constexpr int64_t kSplitKeys = 128;

}  // namespace

std::vector<PrefixSegment> place_segments(const char* op, const std::vector<int64_t>& lengths, at::IntArrayRef rows,
                                          std::vector<TailRow>& tails) {
  TORCH_CHECK(rows.size() == 2 * lengths.size(), op, ": prefix_rows has ", rows.size(), " values for ",
              lengths.size(), " segments; it has two for each");
  std::vector<PrefixSegment> segments;
  for (size_t s = 0; s < lengths.size(); ++s) {
    const int64_t begin = rows[2 * s], end = rows[2 * s + 1];
    TORCH_CHECK(begin >= 0 && begin < end && end <= static_cast<int64_t>(tails.size()), op, ": segment ", s,
                " is read by the rows from ", begin, " up to ", end, ", of ", tails.size());
    const int64_t start = tails[begin].start;
    for (int64_t r = begin; r < end; ++r) {
      TORCH_CHECK(tails[r].start == start, op, ": segment ", s, " begins at position ", start, " for row ", begin,
                  " and at ", tails[r].start, " for row ", r);
      tails[r].start += lengths[s];
      TORCH_CHECK(tails[r].start <= kMostPositions - tails[r].n_keys, op, ": row ", r, " reads ", tails[r].start,
                  " keys of segments and ", tails[r].n_keys, " of its own, more than the ", kMostPositions,
                  " positions that are supported");
    }
    segments.push_back({lengths[s], begin, end, start});
  }
  return segments;
}

SharedAttention::SharedAttention(const AttentionKernels& kernels, Dtype dtype, int64_t q_heads, int64_t kv_heads,
                                 int64_t head_dim, double scale, std::vector<PrefixSegment> segments,
                                 std::vector<TailRow> tails, bool split)
    : kernels_(kernels),
      element_bytes_(dtype == Dtype::Double  ? 8
                     : dtype == Dtype::Float ? 4
                                             : 2),
      compute_bytes_(dtype == Dtype::Double ? 8 : 4),
      segments_(std::move(segments)),
      tails_(std::move(tails)),
      parts_(tails_.size()) {
  base_.q_heads = q_heads;
  base_.kv_heads = kv_heads;
  base_.head_dim = head_dim;
  base_.scale = scale;
  for (const auto& tail : tails_) {
    base_.n_queries += tail.n_queries;
    const int64_t first = tail.start + tail.n_keys - tail.n_queries;
    for (int64_t i = 0; i < tail.n_queries; ++i) positions_.push_back(static_cast<int32_t>(first + i));
  }
  const int64_t n = static_cast<int64_t>(segments_.size()), rows = static_cast<int64_t>(tails_.size());
  for (int64_t s = 0; s < n;) {
    const auto& first = segments_[s];
    std::vector<Keys> keys;
    // Consecutive segments with the same rows go through one softmax, which needs no merging.
    for (; s < n && segments_[s].row_begin == first.row_begin && segments_[s].row_end == first.row_end; ++s) {
      const int64_t piece = split ? kSplitKeys : at_least(1, segments_[s].length);
      for (int64_t k = 0; k < segments_[s].length; k += piece) {
        AttentionRow row{};
        row.k_begin = k;
        row.n_keys = at_most(piece, segments_[s].length - k);
        row.key_position = segments_[s].start + k;
        keys.push_back({s, row});
        if (split) add_run(first.row_begin, first.row_end, std::exchange(keys, {}));
      }
    }
    if (!keys.empty()) add_run(first.row_begin, first.row_end, keys);
  }
  for (int64_t r = 0; r < rows; ++r) {
    AttentionRow row{};
    row.k_begin = tails_[r].k_begin;
    row.n_keys = tails_[r].n_keys;
    row.key_position = tails_[r].start;
    add_run(r, r + 1, {{kTail, row}});
  }
  reserve();
}

void SharedAttention::add_run(int64_t row_begin, int64_t row_end, const std::vector<Keys>& keys) {
  const int64_t q_begin = tails_[row_begin].q_begin,
                n_queries = tails_[row_end - 1].q_begin + tails_[row_end - 1].n_queries - q_begin;
  if (n_queries == 0) return;
  const bool few = n_queries * base_.group() <= kFewLanes;
  // Few lanes read keys in place, one segment at a time.
  if (few && keys.size() > 1) {
    for (const auto& k : keys) add_run(row_begin, row_end, {k});
    return;
  }
  const int64_t index = static_cast<int64_t>(runs_.size());
  runs_.push_back({q_begin, n_queries, keys, few, keys[0].segment == kTail ? row_begin : -1, nullptr, nullptr});
  for (int64_t r = row_begin; r < row_end; ++r) parts_[r].push_back(index);
  int64_t tiles = 1;
  for (size_t k = 0; k < keys.size(); ++k) {
    AttentionRow& row = runs_.back().keys[k].row;
    row.q_begin = q_begin;
    row.n_queries = n_queries;
    row.positions = positions_.data() + q_begin;
    row.key_pad = kernels_.key_pad;
    if (few) continue;
    row.packed_begin = base_.packed_keys;
    base_.packed_keys += row.padded_keys();
    tiles = row.n_tiles(base_);
    for (int64_t h = 0; h < base_.kv_heads; ++h) packs_.push_back({index, static_cast<int64_t>(k), h});
  }
  // The last tile of a tail reads the most keys, so it runs first.
  for (int64_t h = 0; h < base_.kv_heads; ++h) {
    for (int64_t tile = tiles - 1; tile >= 0; --tile) tasks_.push_back({index, h, tile});
  }
}

void SharedAttention::reserve() {
  int64_t queries = 0;
  for (const auto& run : runs_) queries += run.n_queries;
  const int64_t lse_bytes = base_.q_heads * compute_bytes_, out_bytes = lse_bytes * base_.head_dim;
  partial_ = at::empty({queries * (out_bytes + lse_bytes)}, at::kByte);
  packed_ = at::empty({kernels_.packed_bytes(base_, false)}, at::kByte);
  char* out = static_cast<char*>(partial_.mutable_data_ptr());
  char* lse = out + queries * out_bytes;
  for (auto& run : runs_) {
    run.out = out;
    run.lse = lse;
    out += run.n_queries * out_bytes;
    lse += run.n_queries * lse_bytes;
  }
}

AttentionInput SharedAttention::input(const Strided& q, const SharedTensors& tensors, int64_t segment) const {
  AttentionInput in = base_;
  in.q = q;
  in.k = segment == kTail ? tensors.tail_k : tensors.keys[segment];
  in.v = segment == kTail ? tensors.tail_v : tensors.values[segment];
  in.window = tensors.window;
  return in;
}

void SharedAttention::pack(int64_t task, const SharedTensors& tensors) {
  const auto& keys = runs_[packs_[task].run].keys[packs_[task].keys];
  kernels_.pack(input({}, tensors, keys.segment), keys.row, packs_[task].kv_head, 0, keys.row.padded_keys(), false,
                packed_.mutable_data_ptr());
}

bool SharedAttention::prefetch(int64_t task, int64_t key, const SharedTensors& tensors) const {
  if (task >= tasks()) return false;
  const auto& run = runs_[tasks_[task].run];
  const auto& row = run.keys[0].row;
  if (!run.few || key >= row.n_keys) return false;
  const auto in = input({}, tensors, run.keys[0].segment);
  const int64_t bytes = in.head_dim * element_bytes_;
  for (const Strided& x : {in.k, in.v}) {
    const int64_t element = (row.k_begin + key) * x.row + tasks_[task].kv_head * x.head;
    const char* const from = static_cast<const char*>(x.data) + element * element_bytes_;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
  }
  return true;
}

void SharedAttention::attend(int64_t task, const Strided& q, const SharedTensors& tensors, void* scratch) const {
  const auto& run = runs_[tasks_[task].run];
  const AttentionOutput to{run.out, run.lse, run.q_begin, run.n_queries, true};
  const auto in = input(q, tensors, run.keys[0].segment);
  if (run.few) return kernels_.few(in, run.keys[0].row, tasks_[task].kv_head, scratch, to);
  std::vector<AttentionRow> rows;
  for (const auto& k : run.keys) rows.push_back(k.row);
  kernels_.tile(in, rows.data(), static_cast<int64_t>(rows.size()), tasks_[task].kv_head, tasks_[task].tile,
                NextTile{}, packed_.const_data_ptr(), scratch, to);
}

}  // namespace icae_fast
