// lora_qkv_rope on the CPU.
//
// In bf16 with AVX-512 it runs the package's GEMM twice (kernels/gemm/gemm.h): once for s x A^T of q and v, and
// once for x W^T + (s x A^T) B^T, summed in the same registers. Its epilogue applies RoPE to q and k before they
// are rounded and stored, once.
//
// Otherwise, and for a few rows, ATen computes the products straight into q, k and v. The adapters are added in
// place by products that sum in fp32, and one pass applies norm and RoPE in place. Measured at T 2560, d 576, 9 + 3
// heads of 64, r 128, bf16, two threads: three products into q, k and v take 7.7 ms, as long as one packed product,
// whose result would have to be copied apart. Adding the adapters in place takes 1.6 ms, against 1.5 ms into fresh
// memory, which would need one more pass to add them.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "common/checks.h"
#include "common/parallel.h"
#include "ops/common/gemm.h"
#include "ops/common/products.h"
#include "ops/lora_qkv_rope/projection.h"

namespace icae_fast {
namespace {

void norm_and_rotate(const Projection& p, at::Tensor& y, int64_t which) {
  HeadsPass pass = p.heads_pass(which);
  pass.y = y.mutable_data_ptr();
  pass.y_stride = y.stride(0);
  for_rows(y.size(0), y.size(1), [&](int64_t begin, int64_t end) { p.kernels().forward(pass, begin, end); });
}

struct Output {
  at::Tensor q, k, v;
};

void project_by_aten(const Projection& p, Output& out) {
  multiply_by_aten(out.q, p.query_input(), p.weight_q(), p.bias_q());
  multiply_by_aten(out.k, p.x, p.weight_k(), p.bias_k());
  multiply_by_aten(out.v, p.x, p.weight_v(), p.bias_v());
  if (p.has_lora()) {
    const auto down = p.down();
    out.q.addmm_(down.q, p.b_q().t(), 1, p.lora_scale());
    out.v.addmm_(down.v, p.b_v().t(), 1, p.lora_scale());
  }
  norm_and_rotate(p, out.q, 0);
  norm_and_rotate(p, out.k, 1);
}

// s x A^T of q and v. The factor is applied before rounding, so a scale that is not a power of two costs no
// accuracy.
std::pair<at::Tensor, at::Tensor> scaled_down(const Projection& p, const at::Tensor& x) {
  const at::Tensor none;
  const auto factor = static_cast<float>(p.lora_scale());
  if (p.one_input()) {
    auto both = at::empty({p.n_tokens, 2 * p.rank + kRowGap}, x.options()).narrow(1, 0, 2 * p.rank);
    Gemm g = gemm_of(x, p.lora_a, none, both);
    g.factor = factor;
    run_gemms({g});
    return {both.narrow(1, 0, p.rank), both.narrow(1, p.rank, p.rank)};
  }
  const auto inputs = p.adapter_inputs();
  const auto input_q = unaliased_rows(inputs.q), input_v = p.drops() ? unaliased_rows(inputs.v) : x;
  auto q = at::empty({p.n_queries, p.rank + kRowGap}, x.options()).narrow(1, 0, p.rank);
  auto v = at::empty({p.n_tokens, p.rank + kRowGap}, x.options()).narrow(1, 0, p.rank);
  Gemm gq = gemm_of(input_q, p.a_q(), none, q), gv = gemm_of(input_v, p.a_v(), none, v);
  gq.factor = gv.factor = factor;
  run_gemms({gq, gv});
  return {q, v};
}

void project_fused(const Projection& p, Output& out) {
  const auto x = unaliased_rows(p.x), input_q = p.rows.defined() ? unaliased_rows(p.query_input()) : x;
  Gemm q = gemm_of(input_q, p.weight_q(), p.bias_q(), out.q), k = gemm_of(x, p.weight_k(), p.bias_k(), out.k);
  Gemm v = gemm_of(x, p.weight_v(), p.bias_v(), out.v);
  at::Tensor down_q, down_v;
  if (p.has_lora()) {
    std::tie(down_q, down_v) = scaled_down(p, x);
    add_term(q, down_q, p.b_q());
    add_term(v, down_v, p.b_v());
  }
  if (!p.norm.defined()) {
    for (Gemm* g : {&q, &k}) {
      g->epilogue = GemmEpilogue::kRope;
      g->head_dim = p.head_dim;
      g->cos = p.cos.const_data_ptr<float>();
      g->sin = p.sin.const_data_ptr<float>();
    }
    q.table_rows = p.rows.defined() ? p.rows.const_data_ptr<int64_t>() : nullptr;
  }
  run_gemms({q, k, v});
  if (p.norm.defined()) {  // a head's norm needs all its panels
    norm_and_rotate(p, out.q, 0);
    norm_and_rotate(p, out.k, 1);
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lora_qkv_rope_cpu(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& lora_a,
    const OptionalTensor& lora_b, const at::Tensor& cos, const at::Tensor& sin, const OptionalTensor& qk_norm,
    const OptionalTensor& q_rows, const OptionalTensor& dropout_seed, int64_t num_q_heads, int64_t num_kv_heads,
    double lora_scale, double norm_eps, double dropout_p) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Projection p(x, weight, bias, lora_a, lora_b, cos, sin, qk_norm, q_rows, dropout_seed, num_q_heads,
                     num_kv_heads, lora_scale, norm_eps, dropout_p);
  Output out{at::empty({p.n_queries, p.q_size()}, x.options()), at::empty({p.n_tokens, p.kv_size()}, x.options()),
             at::empty({p.n_tokens, p.kv_size()}, x.options())};
  uses_gemm(p.x) ? project_fused(p, out) : project_by_aten(p, out);
  const auto heads = [&p](const at::Tensor& y, int64_t n) { return y.view({y.size(0), n, p.head_dim}); };
  return {heads(out.q, p.q_heads), heads(out.k, p.kv_heads), heads(out.v, p.kv_heads)};
}

}  // namespace
}  // namespace icae_fast

TORCH_LIBRARY_IMPL(icae_fast, CPU, m) { m.impl("lora_qkv_rope", icae_fast::lora_qkv_rope_cpu); }
