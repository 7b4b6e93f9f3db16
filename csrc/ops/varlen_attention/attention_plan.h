// Arguments of varlen_attention, checked and turned into the rows and strides that kernels take.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include "abi/attention.h"
#include "abi/numbers.h"

namespace icae_fast {

struct AttentionPlan {
  at::Tensor q, k, v;  // what `input` points into
  AttentionInput input;
  std::vector<AttentionRow> rows;
  int64_t queries_in_rows = 0, keys_in_use = 0;
  Dtype dtype;
  const AttentionKernels* kernels;  // chosen once: the rows are laid out for it

  // Raises if shapes, types or cu_seqlens would let the kernels read out of bounds.
  AttentionPlan(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cu_seqlens_q,
                const at::Tensor& cu_seqlens_k, const std::optional<at::Tensor>& seqused_k, double scale,
                int64_t window);

  // Reserve packed keys for those rows from `first` up to `end` that `packs` selects: as many rows as `bytes` hold,
  // but at least one. Returns the row after the last one reserved.
  template <class F>
  size_t reserve_packed(const F& packs, size_t first, int64_t bytes, size_t end) {
    input.packed_keys = 0;
    for (size_t i = first; i < end; ++i) {
      auto& row = rows[i];
      const int64_t begin = row.packed_begin = input.packed_keys;
      if (!packs(row)) continue;
      input.packed_keys += row.padded_keys();
      if (begin > 0 && kernels->packed_bytes(input, false) > bytes) {
        input.packed_keys = begin;
        return i;
      }
    }
    return end;
  }
  template <class F>
  void reserve_packed(const F& packs) {
    reserve_packed(packs, 0, std::numeric_limits<int64_t>::max(), rows.size());
  }
};

// One task for one key/value head of a row.
struct AttentionTask {
  const AttentionRow* row;
  int64_t kv_head, part;
};

// Tasks of kPackedKeys keys each, for the rows that `takes` selects. One task per head would be too coarse: three
// heads would leave one of two threads waiting.
template <class F>
std::vector<AttentionTask> tasks_by_keys(const AttentionPlan& plan, std::span<const AttentionRow> rows,
                                         const F& takes) {
  std::vector<AttentionTask> tasks;
  for (const auto& row : rows) {
    if (!takes(row)) continue;
    for (int64_t h = 0; h < plan.input.kv_heads; ++h) {
      for (int64_t key = 0; key < row.padded_keys(); key += kPackedKeys) tasks.push_back({&row, h, key});
    }
  }
  return tasks;
}

}  // namespace icae_fast
