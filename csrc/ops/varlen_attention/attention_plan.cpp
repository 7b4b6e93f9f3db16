#include "ops/varlen_attention/attention_plan.h"

#include "common/checks.h"
#include "common/isa.h"

namespace icae_fast {
namespace {

constexpr const char* kOp = "varlen_attention";

void check_shapes(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, kOp, ": q, k and v are (tokens, heads, head_dim), not ",
              q.sizes(), ", ", k.sizes(), " and ", v.sizes());
  TORCH_CHECK(k.sizes() == v.sizes(), kOp, ": k is ", k.sizes(), " and v ", v.sizes(), "; they must agree");
  TORCH_CHECK(q.size(2) == k.size(2) && q.size(2) > 0, kOp, ": q has head_dim ", q.size(2), " and k ", k.size(2),
              "; they must agree and be positive");
  check_sizes(kOp, q.size(1), k.size(1), q.size(2));
  TORCH_CHECK(q.size(1) % k.size(1) == 0, kOp, ": ", q.size(1), " query heads are no multiple of ", k.size(1),
              " key/value heads");
  check_same_type(k, q, kOp, "k");
  check_same_type(v, q, kOp, "v");
}

void check_cumulative(const std::vector<int64_t>& cu, int64_t tokens, const char* name) {
  TORCH_CHECK(!cu.empty() && cu.front() == 0, kOp, ": ", name, " begins with 0 and has one value more than rows");
  for (size_t i = 1; i < cu.size(); ++i) {
    TORCH_CHECK(cu[i] >= cu[i - 1], kOp, ": ", name, " falls from ", cu[i - 1], " to ", cu[i], " at row ", i - 1);
  }
  TORCH_CHECK(cu.back() <= tokens, kOp, ": ", name, " ends at ", cu.back(), ", past the ", tokens, " tokens given");
}

}  // namespace

AttentionPlan::AttentionPlan(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
                             const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                             const std::optional<at::Tensor>& seqused_k, double scale, int64_t window) {
  dtype = dtype_of(q_in, kOp, "q");
  kernels = &icae_fast::kernels().attention[static_cast<int>(dtype)];
  check_shapes(q_in, k_in, v_in);
  TORCH_CHECK(window >= 0, kOp, ": window is ", window, "; it is a number of keys, or 0 for all");
  const auto cu_q = int_values(kOp, cu_seqlens_q, "cu_seqlens_q"),
             cu_k = int_values(kOp, cu_seqlens_k, "cu_seqlens_k");
  check_cumulative(cu_q, q_in.size(0), "cu_seqlens_q");
  check_cumulative(cu_k, k_in.size(0), "cu_seqlens_k");
  TORCH_CHECK(cu_q.size() == cu_k.size(), kOp, ": cu_seqlens_q is for ", cu_q.size() - 1,
              " rows and cu_seqlens_k for ", cu_k.size() - 1);
  std::vector<int64_t> used;
  if (seqused_k.has_value()) {
    used = int_values(kOp, *seqused_k, "seqused_k");
    TORCH_CHECK(used.size() + 1 == cu_k.size(), kOp, ": seqused_k has ", used.size(), " values for ",
                cu_k.size() - 1, " rows");
  }

  q = with_unit_stride(q_in);
  k = with_unit_stride(k_in);
  v = with_unit_stride(v_in);
  input = {strided(q), strided(k), strided(v), q.size(1), k.size(1), q.size(2), q.size(0), scale, window, 0};
  rows.reserve(cu_q.size() - 1);
  for (size_t i = 0; i + 1 < cu_q.size(); ++i) {
    const int64_t length = cu_k[i + 1] - cu_k[i], n_keys = used.empty() ? length : used[i];
    TORCH_CHECK(n_keys >= 0 && n_keys <= length, kOp, ": seqused_k is ", n_keys, " for row ", i, ", which has ",
                length, " keys");
    rows.push_back({cu_q[i], cu_q[i + 1] - cu_q[i], cu_k[i], n_keys, 0, 0, 0, kernels->key_pad});
    keys_in_use += n_keys;
  }
  queries_in_rows = cu_q.back();
}

}  // namespace icae_fast
