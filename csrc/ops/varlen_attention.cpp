// varlen_attention on the CPU; the kernels are kernels/attention_forward.h and attention_few.h.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>
#include <span>
#include <tuple>

#include "../common/checks.h"
#include "../common/parallel.h"
#include "attention_plan.h"

namespace icae_fast {
namespace {

// Packed keys and values of so many bytes for each thread are used up before others are packed, so that they stay
// in the second-level caches, and take no more memory with more rows: 1 to 2 % less time at 8 x 640 and 64 x 256
// tokens than with all rows packed at once (AVX-512, two threads).
constexpr int64_t kPackedBytes = 512 << 10;

// Rows whose keys are read where they lie: decoding, and rows with next to no queries.
bool is_few(const AttentionPlan& plan, const AttentionRow& row) {
  return row.n_queries * plan.input.group() <= kFewLanes;
}

using Rows = std::span<const AttentionRow>;

void pack_rows(const AttentionPlan& plan, Rows rows, void* packed) {
  const auto tasks = tasks_by_keys(plan, rows, [&](const AttentionRow& row) { return !is_few(plan, row); });
  for_each_task(tasks.size(), [&](int64_t i, int64_t) {
    const auto& [row, kv_head, key] = tasks[i];
    plan.kernels->pack(plan.input, *row, kv_head, key, key + kPackedKeys, false, packed);
  });
}

void attend(const AttentionPlan& plan, Rows rows, const void* packed, const AttentionOutput& to) {
  const auto& in = plan.input;
  const auto& kernels = *plan.kernels;
  std::vector<AttentionTask> tasks;
  for (const auto& row : rows) {
    for (int64_t h = 0; h < in.kv_heads; ++h) {
      // The last tile of a row reads most keys, so it goes first.
      const int64_t parts = is_few(plan, row) ? (row.n_queries > 0) : row.n_tiles(in);
      for (int64_t part = parts - 1; part >= 0; --part) tasks.push_back({&row, h, part});
    }
  }
  const int64_t bytes = kernels.scratch_bytes(in, false);
  const int64_t workers = max_workers(tasks.size());
  const auto scratch = at::empty({workers * bytes}, at::kByte);
  char* const base = static_cast<char*>(scratch.mutable_data_ptr());
  for_each_task(tasks.size(), [&](int64_t i, int64_t worker) {
    const auto& [row, kv_head, part] = tasks[i];
    if (is_few(plan, *row)) {
      kernels.few(in, *row, kv_head, base + worker * bytes, to);
    } else {
      NextTile soon;
      if (const size_t next = i + workers; next < tasks.size() && !is_few(plan, *tasks[next].row)) {
        soon = {tasks[next].row, tasks[next].kv_head, tasks[next].part};
      }
      kernels.tile(in, row, 1, kv_head, part, soon, packed, base + worker * bytes, to);
    }
  });
}

std::tuple<at::Tensor, at::Tensor> varlen_attention_cpu(const at::Tensor& q, const at::Tensor& k,
                                                        const at::Tensor& v, const at::Tensor& cu_seqlens_q,
                                                        const at::Tensor& cu_seqlens_k,
                                                        const std::optional<at::Tensor>& seqused_k,
                                                        int64_t /*max_seqlen_q*/, int64_t /*max_seqlen_k*/,
                                                        double scale, int64_t window) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  AttentionPlan plan(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, scale, window);
  auto out = at::empty(q.sizes(), q.options());
  auto lse = at::empty({q.size(1), q.size(0)}, q.options().dtype(compute_type(q)));
  if (plan.queries_in_rows < q.size(0)) {
    out.slice(0, plan.queries_in_rows).zero_();
    lse.slice(1, plan.queries_in_rows).fill_(-std::numeric_limits<double>::infinity());
  }
  at::Tensor packed;
  const AttentionOutput to{out.mutable_data_ptr(), lse.mutable_data_ptr(), 0, q.size(0), false};
  for (size_t first = 0, end; first < plan.rows.size(); first = end) {
    end = plan.reserve_packed([&](const AttentionRow& row) { return !is_few(plan, row); }, first,
                              kPackedBytes * at::get_num_threads());
    const int64_t bytes = plan.kernels->packed_bytes(plan.input, false);
    if (!packed.defined() || packed.numel() < bytes) packed = at::empty({bytes}, at::kByte);
    const Rows rows(plan.rows.begin() + first, plan.rows.begin() + end);
    pack_rows(plan, rows, packed.mutable_data_ptr());
    attend(plan, rows, packed.const_data_ptr(), to);
  }
  return {out, lse};
}

}  // namespace
}  // namespace icae_fast

TORCH_LIBRARY_IMPL(icae_fast, CPU, m) { m.impl("varlen_attention", icae_fast::varlen_attention_cpu); }
