// varlen_attention on the CPU; kernels in kernels/attention/forward.h and few.h.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <span>
#include <tuple>
#include <utility>

#include "common/checks.h"
#include "common/parallel.h"
#include "ops/varlen_attention/attention_plan.h"

namespace icae_fast {
namespace {

// Packed keys and values per thread, in bytes. They are used before more are packed, so they stay in the
// second-level caches, and memory does not grow with the number of rows: 1 to 2 % faster at 8 x 640 and 64 x 256
// tokens than packing all rows at once (AVX-512, two threads).
constexpr int64_t kPackedBytes = 512 << 10;

// Rows whose keys are read in place: decoding, and rows with very few queries.
bool is_few(const AttentionPlan& plan, const AttentionRow& row) {
  return row.n_queries * plan.input.group() <= kFewLanes;
}

using Rows = std::span<const AttentionRow>;

// The same call for one key/value head of one row with up to `padded_keys` packed keys.
AttentionInput one_head_of(const AttentionInput& in, int64_t padded_keys) {
  AttentionInput one = in;
  one.packed_keys = padded_keys;
  one.one_head_packed = true;
  return one;
}

// Move rows to the end whose heads become one task each, which also packs its keys: they come from the core's own
// cache, and no thread waits for them. Enough work stays in the rows before to keep the other threads busy while
// one finishes the last such task. Returns the number of rows before.
size_t put_whole_rows_last(AttentionPlan& plan) {
  const auto work = [](const AttentionRow& row) { return row.n_queries * (2 * row.n_keys - row.n_queries); };
  const auto fits = [&](const AttentionRow& row) {
    return !is_few(plan, row) &&
           plan.kernels->packed_bytes(one_head_of(plan.input, row.padded_keys()), false) <= kPackedBytes;
  };
  auto& rows = plan.rows;
  const auto whole = std::stable_partition(rows.begin(), rows.end(), [&](const auto& row) { return !fits(row); });
  std::stable_sort(whole, rows.end(), [&](const auto& a, const auto& b) { return work(a) < work(b); });
  int64_t before = 0;
  for (auto row = rows.begin(); row != whole; ++row) before += work(*row) * plan.input.kv_heads;
  auto first = whole;
  for (; first != rows.end() && before < (at::get_num_threads() - 1) * work(*first); ++first) {
    before += work(*first) * plan.input.kv_heads;
  }
  return first - rows.begin();
}

void pack_rows(const AttentionPlan& plan, Rows rows, void* packed) {
  const auto tasks = tasks_by_keys(plan, rows, [&](const AttentionRow& row) { return !is_few(plan, row); });
  for_each_task(tasks.size(), [&](int64_t i, int64_t) {
    const auto& [row, kv_head, key] = tasks[i];
    plan.kernels->pack(plan.input, *row, kv_head, key, key + kPackedKeys, false, packed);
  });
}

// The last tile of a row reads the most keys, so it runs first. Each tile prefetches the rows of the next one.
void attend_whole(const AttentionPlan& plan, const AttentionTask& task, char* scratch, char* packed,
                  const AttentionOutput& to) {
  AttentionRow row = *task.row;
  row.packed_begin = 0;
  const AttentionInput in = one_head_of(plan.input, row.padded_keys());
  plan.kernels->pack(in, row, task.kv_head, 0, row.padded_keys(), false, packed);
  for (int64_t tile = row.n_tiles(in) - 1; tile >= 0; --tile) {
    const NextTile soon = tile > 0 ? NextTile{&row, task.kv_head, tile - 1} : NextTile{};
    plan.kernels->tile(in, &row, 1, task.kv_head, tile, soon, packed, scratch, to);
  }
}

// Attend to the `whole` rows, then to `rows`, whose keys are packed.
void attend(const AttentionPlan& plan, Rows whole, Rows rows, const void* packed, const AttentionOutput& to) {
  const auto& in = plan.input;
  const auto& kernels = *plan.kernels;
  std::vector<AttentionTask> tasks;
  int64_t most_keys = 0;
  for (auto row = whole.rbegin(); row != whole.rend(); ++row) {  // the longest first
    most_keys = at_least(most_keys, row->padded_keys());
    for (int64_t h = 0; h < in.kv_heads; ++h) tasks.push_back({&*row, h, 0});
  }
  const int64_t whole_tasks = tasks.size();
  for (const auto& row : rows) {
    for (int64_t h = 0; h < in.kv_heads; ++h) {
      const int64_t parts = is_few(plan, row) ? (row.n_queries > 0) : row.n_tiles(in);
      for (int64_t part = parts - 1; part >= 0; --part) tasks.push_back({&row, h, part});
    }
  }
  const int64_t scratch_bytes = round_up(kernels.scratch_bytes(in, false), 64);
  const int64_t bytes = scratch_bytes + round_up(kernels.packed_bytes(one_head_of(in, most_keys), false), 64);
  const int64_t workers = max_workers(tasks.size());
  const auto scratch = at::empty({workers * bytes}, at::kByte);
  char* const base = static_cast<char*>(scratch.mutable_data_ptr());
  for_each_task(tasks.size(), [&](int64_t i, int64_t worker) {
    const auto& [row, kv_head, part] = tasks[i];
    char* const own = base + worker * bytes;
    if (i < whole_tasks) {
      attend_whole(plan, tasks[i], own, own + scratch_bytes, to);
    } else if (is_few(plan, *row)) {
      kernels.few(in, *row, kv_head, own, to);
    } else {
      NextTile soon;
      if (const size_t next = i + workers; next < tasks.size() && !is_few(plan, *tasks[next].row)) {
        soon = {tasks[next].row, tasks[next].kv_head, tasks[next].part};
      }
      kernels.tile(in, row, 1, kv_head, part, soon, packed, own, to);
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
  const size_t before = put_whole_rows_last(plan);
  Rows whole = Rows(plan.rows).subspan(before);
  const auto packs = [&](const AttentionRow& row) { return !is_few(plan, row); };
  for (size_t first = 0, end; first < before || !whole.empty(); first = end) {
    end = plan.reserve_packed(packs, first, kPackedBytes * at::get_num_threads(), before);
    const int64_t bytes = plan.kernels->packed_bytes(plan.input, false);
    if (!packed.defined() || packed.numel() < bytes) packed = at::empty({bytes}, at::kByte);
    const Rows rows = Rows(plan.rows).subspan(first, end - first);
    pack_rows(plan, rows, packed.mutable_data_ptr());
    attend(plan, end == before ? std::exchange(whole, {}) : Rows(), rows, packed.const_data_ptr(), to);
  }
  return {out, lse};
}

}  // namespace
}  // namespace icae_fast

TORCH_LIBRARY_IMPL(icae_fast, CPU, m) { m.impl("varlen_attention", icae_fast::varlen_attention_cpu); }
