// varlen_attention_backward on the CPU; kernel in kernels/attention/backward.h.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <queue>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "ops/varlen_attention/attention_plan.h"

namespace icae_fast {
namespace {

constexpr const char* kOp = "varlen_attention_backward";

// Queries times keys of a row and key/value head under the causal mask.
double work_of(const AttentionRow& row) {
  const double queries = double(row.n_queries);
  return queries * double(row.n_keys) - (queries < double(row.n_keys) ? queries * queries / 2 : 0);
}

// Cost of a slice: its share of the row's work, plus writing its sums of dk and dv and adding them to the others',
// which takes as long as kSumCost queries.
double work_of_slice(const AttentionRow& row) {
  constexpr double kSumCost = 2;
  return work_of(row) / double(row.n_slices) + kSumCost * double(row.n_keys);
}

// Cut rows into slices of at most `share` of the work. Each slice needs memory for the row's dk and dv in fp32,
// hence the upper limit.
void cut(AttentionPlan& plan, double share) {
  constexpr int64_t kMostSlices = 32;
  for (auto& row : plan.rows) {
    const int64_t limit = at_most(kMostSlices, row.n_tiles(plan.input));
    row.n_slices = at_most(static_cast<int64_t>(work_of(row) / std::max(1.0, share)) + 1, limit);
  }
}

// Time of all slices on `threads` threads, each of which takes the next slice when it has finished one. Other
// processes delay threads, by more the larger the last slice is.
double time_of(const AttentionPlan& plan, int64_t threads) {
  constexpr double kHeldUp = 0.05;
  std::priority_queue<double, std::vector<double>, std::greater<double>> ends;
  for (int64_t i = 0; i < threads; ++i) ends.push(0);
  double last = 0, largest = 0;
  for (const auto& row : plan.rows) {
    const double work = work_of_slice(row);
    if (row.n_slices > 0) largest = std::max(largest, work);
    for (int64_t i = 0; i < row.n_slices * plan.input.kv_heads; ++i) {
      const double end = ends.top() + work;
      ends.pop();
      ends.push(end);
      last = std::max(last, end);
    }
  }
  return last + kHeldUp * largest;
}

// Choose the slices so that threads end together: three slices for each of three heads kept two threads busy 90 %
// of the time.
int64_t plan_slices(AttentionPlan& plan) {
  constexpr int64_t kMostTasksPerThread = 8;
  const int64_t threads = at::get_num_threads();
  double work = 0;
  for (const auto& row : plan.rows) work += work_of(row) * double(plan.input.kv_heads);
  const auto share = [&](int64_t tasks) { return work / double(tasks * threads); };
  int64_t best = 1;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t tasks = 1; tasks <= kMostTasksPerThread; ++tasks) {
    cut(plan, share(tasks));
    const double time = time_of(plan, threads);
    if (time < least) {
      least = time;
      best = tasks;
    }
  }
  cut(plan, share(best));
  int64_t keys = 0;
  for (auto& row : plan.rows) {
    row.partial_begin = keys;
    keys += row.n_slices * row.padded_keys();
  }
  return keys;
}

void differentiate(const AttentionPlan& plan, const AttentionKernels& kernels, AttentionGradient& g) {
  const auto& in = plan.input;
  const auto parts = tasks_by_keys(plan, plan.rows, [](const AttentionRow&) { return true; });
  std::vector<AttentionTask> slices;
  for (const auto& row : plan.rows) {
    for (int64_t h = 0; h < in.kv_heads; ++h) {
      for (int64_t slice = 0; slice < row.n_slices; ++slice) slices.push_back({&row, h, slice});
    }
  }
  const int64_t bytes = kernels.scratch_bytes(in, true);
  const auto packed = at::empty({kernels.packed_bytes(in, true)}, at::kByte);
  const auto scratch = at::empty({max_workers(slices.size()) * bytes}, at::kByte);
  const auto partial = at::empty({kernels.partial_bytes(in, g)}, at::kByte);
  char* const base = static_cast<char*>(scratch.mutable_data_ptr());
  void* const keys = packed.mutable_data_ptr();
  g.partial = partial.mutable_data_ptr();
  for_each_task(parts.size(), [&](int64_t i, int64_t) {
    const auto& [row, kv_head, key] = parts[i];
    if (row->n_slices > 0) kernels.pack(in, *row, kv_head, key, key + kPackedKeys, true, keys);
  });
  for_each_task(slices.size(), [&](int64_t i, int64_t worker) {
    const auto& task = slices[i];
    kernels.slice(in, *task.row, task.kv_head, task.part, keys, base + worker * bytes, g);
  });
  for_each_task(parts.size(), [&](int64_t i, int64_t) {
    const auto& [row, kv_head, key] = parts[i];
    kernels.sum_slices(in, *row, kv_head, key, key + kPackedKeys, g);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> varlen_attention_backward_cpu(
    const at::Tensor& dout_in, const at::Tensor& dlse_in, const at::Tensor& q, const at::Tensor& k,
    const at::Tensor& v, const at::Tensor& out_in, const at::Tensor& lse_in, const at::Tensor& cu_seqlens_q,
    const at::Tensor& cu_seqlens_k, const std::optional<at::Tensor>& seqused_k, int64_t /*max_seqlen_q*/,
    int64_t /*max_seqlen_k*/, double scale, int64_t window) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  AttentionPlan plan(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, scale, window);
  const auto& kernels = *plan.kernels;
  TORCH_CHECK(dout_in.sizes() == q.sizes() && out_in.sizes() == q.sizes(), kOp, ": dout is ", dout_in.sizes(),
              " and out ", out_in.sizes(), ", not ", q.sizes(), " as q is");
  const std::vector<int64_t> of_lse{q.size(1), q.size(0)};
  TORCH_CHECK(dlse_in.sizes() == of_lse && lse_in.sizes() == of_lse, kOp, ": dlse is ", dlse_in.sizes(),
              " and lse ", lse_in.sizes(), ", not ", at::IntArrayRef(of_lse), " (query heads, queries)");
  check_same_type(dout_in, q, kOp, "dout");
  check_same_type(out_in, q, kOp, "out");
  const auto dout = with_unit_stride(dout_in), out = with_unit_stride(out_in);
  const auto dlse = dlse_in.to(compute_type(q)).contiguous(), lse = lse_in.to(compute_type(q)).contiguous();
  auto dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), q.options());
  auto dv = at::empty(k.sizes(), q.options());
  if (plan.queries_in_rows < q.size(0)) dq.slice(0, plan.queries_in_rows).zero_();
  if (plan.keys_in_use < k.size(0)) {
    dk.zero_();
    dv.zero_();
  }
  plan.reserve_packed([](const AttentionRow& row) { return row.n_queries > 0; });
  AttentionGradient g{strided(dout),         strided(out),          dlse.const_data_ptr(), lse.const_data_ptr(),
                      dq.mutable_data_ptr(), dk.mutable_data_ptr(), dv.mutable_data_ptr(), nullptr,
                      plan_slices(plan)};
  differentiate(plan, kernels, g);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace icae_fast

TORCH_LIBRARY_IMPL(icae_fast, CPU, m) {
  m.impl("varlen_attention_backward", icae_fast::varlen_attention_backward_cpu);
}
