// shared_prefix_attention on the CPU; ops/common/shared_attention.h plans the work.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "ops/common/shared_attention.h"

namespace icae_fast {
namespace {

constexpr const char* kOp = "shared_prefix_attention";

// Few queries do not occupy all threads unless their keys are split as well.
bool is_decoding(int64_t queries, int64_t rows) { return queries <= 2 * rows; }

void check_keys(const at::Tensor& k, const at::Tensor& v, const at::Tensor& q, const char* name) {
  TORCH_CHECK(k.dim() == 3 && k.sizes() == v.sizes() && k.size(2) == q.size(2), kOp, ": ", name, " are ", k.sizes(),
              " and ", v.sizes(), "; both are (tokens, kv_heads, ", q.size(2), ")");
  check_same_type(k, q, kOp, name);
  check_same_type(v, q, kOp, name);
}

std::vector<TailRow> tail_rows(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cu_seqlens_q,
                               const at::Tensor& starts, const at::Tensor& lengths) {
  const auto cu = int_values(kOp, cu_seqlens_q, "cu_seqlens_q"), start = int_values(kOp, starts, "tail_starts"),
             length = int_values(kOp, lengths, "tail_lengths");
  TORCH_CHECK(!cu.empty() && cu.front() == 0 && cu.back() == q.size(0), kOp, ": cu_seqlens_q goes from 0 to the ",
              q.size(0), " queries");
  TORCH_CHECK(start.size() + 1 == cu.size() && length.size() + 1 == cu.size(), kOp,
              ": tail_starts and tail_lengths ", "have ", start.size(), " and ", length.size(), " values for ",
              cu.size() - 1, " rows");
  std::vector<TailRow> rows;
  for (size_t r = 0; r < start.size(); ++r) {
    const int64_t queries = cu[r + 1] - cu[r];
    TORCH_CHECK(queries >= 0 && length[r] >= queries && is_within(start[r], length[r], k.size(0)), kOp, ": row ", r,
                " has ", queries, " queries and a tail of ", length[r], " keys from ", start[r], ", of ", k.size(0),
                "; a tail holds at least the queries' own keys");
    rows.push_back({cu[r], queries, start[r], length[r], 0});
  }
  return rows;
}

at::Tensor shared_prefix_attention_cpu(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
                                       const at::Tensor& cu_seqlens_q, const at::Tensor& tail_starts,
                                       const at::Tensor& tail_lengths, at::TensorList prefix_keys,
                                       at::TensorList prefix_values, at::IntArrayRef prefix_rows, double scale,
                                       int64_t window) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto dtype = dtype_of(q_in, kOp, "q");
  const auto& unit = kernels();
  TORCH_CHECK(q_in.dim() == 3 && q_in.size(2) > 0, kOp, ": q is (tokens, heads, head_dim), not ", q_in.sizes());
  TORCH_CHECK(window >= 0, kOp, ": window is ", window, "; it is a number of keys, or 0 for all");
  TORCH_CHECK(prefix_keys.size() == prefix_values.size(), kOp, ": there are ", prefix_keys.size(),
              " prefix_keys and ", prefix_values.size(), " prefix_values");
  check_keys(k_in, v_in, q_in, "k and v");
  const int64_t kv_heads = k_in.size(1);
  check_sizes(kOp, q_in.size(1), kv_heads, q_in.size(2));
  TORCH_CHECK(q_in.size(1) % kv_heads == 0, kOp, ": ", q_in.size(1), " query heads are no multiple of ", kv_heads,
              " key/value heads");
  const auto q = with_unit_stride(q_in), k = with_unit_stride(k_in), v = with_unit_stride(v_in);
  std::vector<at::Tensor> kept;  // strided() points into these
  SharedTensors tensors{strided(k), strided(v), {}, {}, window};
  std::vector<int64_t> lengths;
  for (size_t s = 0; s < prefix_keys.size(); ++s) {
    check_keys(prefix_keys[s], prefix_values[s], q, "a prefix's keys and values");
    TORCH_CHECK(prefix_keys[s].size(1) == kv_heads, kOp, ": prefix ", s, " has ", prefix_keys[s].size(1),
                " key/value heads, and the tails ", kv_heads);
    kept.push_back(with_unit_stride(prefix_keys[s]));
    tensors.keys.push_back(strided(kept.back()));
    kept.push_back(with_unit_stride(prefix_values[s]));
    tensors.values.push_back(strided(kept.back()));
    lengths.push_back(prefix_keys[s].size(0));
  }
  auto tails = tail_rows(q, k, cu_seqlens_q, tail_starts, tail_lengths);
  auto segments = place_segments(kOp, lengths, prefix_rows, tails);
  auto out = at::empty(q.sizes(), q.options());
  const bool split = is_decoding(q.size(0), static_cast<int64_t>(tails.size()));
  SharedAttention plan(unit.attention[static_cast<int>(dtype)], dtype, q.size(1), kv_heads, q.size(2), scale,
                       std::move(segments), tails, split);
  for_each_task(plan.pack_tasks(), [&](int64_t i, int64_t) { plan.pack(i, tensors); });
  const int64_t bytes = plan.scratch_bytes();
  const auto scratch = at::empty({max_workers(plan.tasks()) * bytes}, at::kByte);
  char* const base = static_cast<char*>(scratch.mutable_data_ptr());
  const Strided queries = strided(q);
  for_each_task(plan.tasks(),
                [&](int64_t i, int64_t worker) { plan.attend(i, queries, tensors, base + worker * bytes); });
  const int64_t head_bytes = q.size(2) * q.element_size();
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  for_rows(static_cast<int64_t>(tails.size()), q.size(1) * q.size(2), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t i = tails[r].q_begin; i < tails[r].q_begin + tails[r].n_queries; ++i) {
        plan.merge(r, i, unit.decode[static_cast<int>(dtype)].merge, to + i * q.size(1) * head_bytes, head_bytes);
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace icae_fast

TORCH_LIBRARY_IMPL(icae_fast, CPU, m) { m.impl("shared_prefix_attention", icae_fast::shared_prefix_attention_cpu); }
