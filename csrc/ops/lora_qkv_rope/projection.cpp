#include "ops/lora_qkv_rope/projection.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm.h>

#include "common/checks.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "ops/common/products.h"

namespace icae_fast {
namespace {

constexpr const char* kOp = "lora_qkv_rope";

at::Tensor value_or_none(const OptionalTensor& t) { return t.has_value() ? *t : at::Tensor(); }

void check_matrix(const at::Tensor& t, int64_t rows, int64_t columns, const at::Tensor& like, const char* name) {
  TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, kOp, ": ", name, " is ", t.sizes(),
              ", not (", rows, ", ", columns, ")");
  check_same_type(t, like, kOp, name);
}

// cos or sin in the compute type, contiguous.
at::Tensor table(const at::Tensor& t, const at::Tensor& x, int64_t head_dim, const char* name) {
  TORCH_CHECK(t.dim() == 2 && t.size(0) == x.size(0) && t.size(1) == head_dim / 2, kOp, ": ", name, " is ",
              t.sizes(), ", not (", x.size(0), ", ", head_dim / 2, ") as x and the heads require");
  return t.to(compute_type(x)).contiguous();
}

at::Tensor checked_rows(const at::Tensor& rows, int64_t n_tokens) {
  TORCH_CHECK(rows.dim() == 1 && rows.scalar_type() == at::kLong, kOp, ": q_rows is 1-d int64, not ", rows.sizes(),
              " ", rows.scalar_type());
  const auto dense = rows.contiguous();
  const int64_t* row = dense.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < dense.numel(); ++i) {
    TORCH_CHECK_INDEX(row[i] >= 0 && row[i] < n_tokens, kOp, ": q_rows holds ", row[i], ", but x has ", n_tokens,
                      " rows");
  }
  return dense;
}

uint32_t mix(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x7FEB352Du;
  h = (h ^ (h >> 15)) * 0x846CA68Bu;
  return h ^ (h >> 16);
}

}  // namespace

Projection::Projection(const at::Tensor& x_in, const at::Tensor& weight_in, const OptionalTensor& bias_in,
                       const OptionalTensor& lora_a_in, const OptionalTensor& lora_b_in, const at::Tensor& cos_in,
                       const at::Tensor& sin_in, const OptionalTensor& qk_norm, const OptionalTensor& q_rows,
                       const OptionalTensor& dropout_seed, int64_t num_q_heads, int64_t num_kv_heads,
                       double lora_scale, double norm_eps, double dropout_p)
    : dtype(dtype_of(x_in, kOp, "x")),
      q_heads(num_q_heads),
      kv_heads(num_kv_heads),
      rank(0),
      scale(lora_scale),
      eps(norm_eps),
      p(dropout_p),
      x(with_unit_stride(x_in)),
      weight(with_unit_stride(weight_in)),
      bias(value_or_none(bias_in)),
      lora_a(value_or_none(lora_a_in)),
      lora_b(value_or_none(lora_b_in)),
      seed(value_or_none(dropout_seed)) {
  TORCH_CHECK(x.dim() == 2, kOp, ": x is (tokens, d), not ", x.sizes());
  check_sizes(kOp, q_heads, kv_heads, 1);
  const int64_t heads = q_heads + 2 * kv_heads;
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) % (2 * heads) == 0 && weight.size(0) > 0, kOp, ": weight is ",
              weight.sizes(), "; its rows must be an even head_dim for each of ", heads, " heads");
  n_tokens = x.size(0);
  head_dim = weight.size(0) / heads;
  check_matrix(weight, heads * head_dim, x.size(1), x, "weight");
  if (bias.defined()) {
    TORCH_CHECK(bias.dim() == 1 && bias.size(0) == weight.size(0), kOp, ": bias is ", bias.sizes(), ", not (",
                weight.size(0), ")");
    check_same_type(bias, x, kOp, "bias");
    bias = bias.contiguous();
  }
  TORCH_CHECK(lora_a.defined() == lora_b.defined(), kOp, ": lora_a and lora_b are given together or not at all");
  if (has_lora()) {
    TORCH_CHECK(lora_b.dim() == 2, kOp, ": lora_b is ", lora_b.sizes(), ", not 2-d");
    rank = lora_b.size(1);
    check_matrix(lora_a, 2 * rank, x.size(1), x, "lora_a");
    check_matrix(lora_b, q_size() + kv_size(), rank, x, "lora_b");
    lora_a = with_unit_stride(lora_a);
    lora_b = with_unit_stride(lora_b);
  }
  cos = table(cos_in, x, head_dim, "cos");
  sin = table(sin_in, x, head_dim, "sin");
  if (qk_norm.has_value()) {
    norm = qk_norm->contiguous();
    check_matrix(norm, 2, head_dim, x, "qk_norm");
  }
  if (q_rows.has_value()) rows = checked_rows(*q_rows, n_tokens);
  n_queries = rows.defined() ? rows.size(0) : n_tokens;
  TORCH_CHECK(p >= 0 && p < 1, kOp, ": dropout_p is ", p, ", not in [0, 1)");
  TORCH_CHECK(!seed.defined() || (seed.numel() == 1 && seed.scalar_type() == at::kLong), kOp,
              ": dropout_seed is one int64");
}

const HeadsKernels& Projection::kernels() const { return icae_fast::kernels().heads[static_cast<int>(dtype)]; }

at::Tensor Projection::query_input() const { return rows.defined() ? at::index_select(x, 0, rows) : x; }

DropoutMask Projection::mask(int64_t which) const {
  const auto value = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  const auto low = static_cast<uint32_t>(value), high = static_cast<uint32_t>(value >> 32);
  const bool picked = which == 0 && rows.defined();
  return {mix(low ^ mix(high + static_cast<uint32_t>(which))), static_cast<uint32_t>(p * 4294967296.0),
          picked ? rows.const_data_ptr<int64_t>() : nullptr};
}

Projection::AdapterInputs Projection::adapter_inputs() const {
  if (!drops()) return {query_input(), x};
  AdapterInputs inputs{at::empty({n_queries, x.size(1)}, x.options()),
                       at::empty({n_tokens, x.size(1)}, x.options())};
  for (const int64_t which : {0, 1}) {
    auto& to = which == 0 ? inputs.q : inputs.v;
    const auto m = mask(which);
    const void* from = x.const_data_ptr();
    void* dst = to.mutable_data_ptr();
    for_rows(to.size(0), to.size(1), [&](int64_t begin, int64_t end) {
      kernels().apply_dropout(m, from, x.stride(0), dst, to.stride(0), to.size(1), begin, end);
    });
  }
  return inputs;
}

Projection::Down Projection::down() const {
  const auto inputs = adapter_inputs();
  if (one_input()) {  // one product for both: 2.0 ms, against 2 x 1.1 at T 2560, d 576, r 128
    auto both = at::empty({n_tokens, 2 * rank}, x.options());
    multiply(both, x, lora_a, {});
    return {both.narrow(1, 0, rank), both.narrow(1, rank, rank), x, x};
  }
  return {at::mm(inputs.q, a_q().t()), at::mm(inputs.v, a_v().t()), inputs.q, inputs.v};
}

HeadsPass Projection::heads_pass(int64_t which) const {
  HeadsPass pass{};
  pass.heads = which == 0 ? q_heads : kv_heads;
  pass.head_dim = head_dim;
  pass.cos = cos.const_data_ptr();
  pass.sin = sin.const_data_ptr();
  pass.table_rows = which == 0 && rows.defined() ? rows.const_data_ptr<int64_t>() : nullptr;
  pass.norm = norm.defined() ? norm.select(0, which).const_data_ptr() : nullptr;
  pass.eps = eps;
  return pass;
}

}  // namespace icae_fast
