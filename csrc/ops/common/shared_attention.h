// Attention of rows that share keys: each shared segment is read once for all its rows, each row's own tail
// separately, and the partial results are merged by log-sum-exp. `shared_prefix_attention` and `decode_step` use
// it. The plan holds the tasks; the caller decides when and on which threads they run.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "abi/attention.h"
#include "abi/numbers.h"

namespace icae_fast {

// Keys that rows [row_begin, row_end) share. They begin at position `start`.
struct PrefixSegment {
  int64_t length, row_begin, row_end, start;
};

// A row's own keys, which begin at position `start`. The queries are the last of these positions.
struct TailRow {
  int64_t q_begin, n_queries, k_begin, n_keys, start;
};

// Place segments of the given lengths. rows[2 s] and rows[2 s + 1] are the first row that reads segment s and the
// row after the last; rows read segments in this order. Also sets the start positions of the tails. Raises if rows
// that share a segment have read different numbers of keys before it.
std::vector<PrefixSegment> place_segments(const char* op, const std::vector<int64_t>& lengths, at::IntArrayRef rows,
                                          std::vector<TailRow>& tails);

// One layer's keys and values.
struct SharedTensors {
  Strided tail_k, tail_v;
  std::vector<Strided> keys, values;  // per segment
  int64_t window;
};

class SharedAttention {
 public:
  // `split`: for few queries, cut shared keys into pieces that threads work on separately.
  SharedAttention(const AttentionKernels& kernels, Dtype dtype, int64_t q_heads, int64_t kv_heads, int64_t head_dim,
                  double scale, std::vector<PrefixSegment> segments, std::vector<TailRow> tails, bool split);
  SharedAttention(const SharedAttention&) = delete;  // rows point into it
  SharedAttention& operator=(const SharedAttention&) = delete;

  // Run every pack task, then every attention task, then the merges; each group in any order. Scratch is per
  // thread.
  int64_t pack_tasks() const { return static_cast<int64_t>(packs_.size()); }
  void pack(int64_t task, const SharedTensors& tensors);
  int64_t tasks() const { return static_cast<int64_t>(tasks_.size()); }
  void attend(int64_t task, const Strided& q, const SharedTensors& tensors, void* scratch) const;
  // The row whose own keys a task reads, or -1, and the task's key/value head.
  int64_t tail_of(int64_t task) const { return runs_[tasks_[task].run].tail; }
  int64_t kv_head_of(int64_t task) const { return tasks_[task].kv_head; }
  // Prefetch one key and its value that a task will read in place. Returns false if the task has no such key.
  bool prefetch(int64_t task, int64_t key, const SharedTensors& tensors) const;
  // Merge the heads of a query from all its parts. `to` is (q_heads, head_dim).
  template <class Merge>
  void merge(int64_t row, int64_t query, Merge merge, char* to, int64_t head_bytes) const {
    std::vector<const void*> outs(parts_[row].size()), lses(parts_[row].size());
    for (int64_t h = 0; h < base_.q_heads; ++h, to += head_bytes) {
      for (size_t i = 0; i < outs.size(); ++i) {
        const Run& run = runs_[parts_[row][i]];
        const int64_t q = query - run.q_begin;
        outs[i] = run.out + (q * base_.q_heads + h) * base_.head_dim * compute_bytes_;
        lses[i] = run.lse + (h * run.n_queries + q) * compute_bytes_;
      }
      merge(outs.data(), lses.data(), static_cast<int64_t>(outs.size()), base_.head_dim, to);
    }
  }
  int64_t scratch_bytes() const { return kernels_.scratch_bytes(base_, false); }

 private:
  static constexpr int64_t kTail = -1;

  // Keys of one segment or of a tail, or a piece of either.
  struct Keys {
    int64_t segment;  // or kTail
    AttentionRow row;
  };
  // Queries that read the same keys, and their results.
  struct Run {
    int64_t q_begin, n_queries;
    std::vector<Keys> keys;
    bool few;
    int64_t tail;  // the row if the keys are its own, else -1
    char *out, *lse;
  };
  struct Task {
    int64_t run, kv_head, tile;
  };
  struct Pack {
    int64_t run, keys, kv_head;
  };

  void add_run(int64_t row_begin, int64_t row_end, const std::vector<Keys>& keys);
  AttentionInput input(const Strided& q, const SharedTensors& tensors, int64_t segment) const;
  void reserve();

  const AttentionKernels& kernels_;
  AttentionInput base_{};
  int64_t element_bytes_, compute_bytes_;
  std::vector<PrefixSegment> segments_;
  std::vector<TailRow> tails_;
  std::vector<int32_t> positions_;  // of every query
  std::vector<Run> runs_;
  std::vector<std::vector<int64_t>> parts_;  // the runs of each row
  std::vector<Task> tasks_;
  std::vector<Pack> packs_;
  at::Tensor partial_, packed_;
};

}  // namespace icae_fast
