// lora_qkv_rope_backward on the CPU. The gradients of q, k and v are taken back through RoPE and norm into one
// matrix G (T, Hq D + 2 Hkv D), or into one for q and one for k and v if only some rows have a query. The rest is
// products. x A^T, and with a q/k norm the values before it, are recomputed.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_add.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "ops/common/gemm.h"
#include "ops/common/products.h"
#include "ops/lora_qkv_rope/projection.h"

namespace icae_fast {
namespace {

constexpr const char* kOp = "lora_qkv_rope_backward";

// Gradients of the projections. Those of k and v are adjacent; if all rows have a query, that of q is too.
struct ProjectionGradients {
  at::Tensor all, kv, q, k, v;

  explicit ProjectionGradients(const Projection& p) {
    const int64_t kv_columns = 2 * p.kv_size();
    if (p.rows.defined()) {
      q = at::empty({p.n_queries, p.q_size()}, p.x.options());
      kv = at::empty({p.n_tokens, kv_columns}, p.x.options());
    } else {
      all = at::empty({p.n_tokens, p.q_size() + kv_columns}, p.x.options());
      q = all.narrow(1, 0, p.q_size());
      kv = all.narrow(1, p.q_size(), kv_columns);
    }
    k = kv.narrow(1, 0, p.kv_size());
    v = kv.narrow(1, p.kv_size(), p.kv_size());
  }
};

// Values of q (which = 0) or k (1) before the norm.
at::Tensor before_norm(const Projection& p, const Projection::Down& down, int64_t which) {
  auto y = at::empty({which == 0 ? p.n_queries : p.n_tokens, which == 0 ? p.q_size() : p.kv_size()}, p.x.options());
  if (which == 1) {
    multiply_by_aten(y, p.x, p.weight_k(), p.bias_k());
    return y;
  }
  multiply_by_aten(y, p.query_input(), p.weight_q(), p.bias_q());
  if (p.has_lora()) y.addmm_(down.q, p.b_q().t(), 1, p.lora_scale());
  return y;
}

void rotate_back(const Projection& p, const Projection::Down& down, const at::Tensor& grad_in, at::Tensor& to,
                 int64_t which) {
  const auto grad = with_unit_stride(grad_in);
  HeadsPass pass = p.heads_pass(which);
  at::Tensor before;
  if (pass.norm != nullptr) {
    before = before_norm(p, down, which);
    pass.before = before.const_data_ptr();
    pass.before_stride = before.stride(0);
  }
  pass.y = to.mutable_data_ptr();
  pass.y_stride = to.stride(0);
  pass.grad = grad.const_data_ptr();
  pass.grad_stride = grad.stride(0);
  pass.grad_head_stride = grad.stride(1);
  for_rows(to.size(0), to.size(1), [&](int64_t begin, int64_t end) { p.kernels().backward(pass, begin, end); });
}

// to += (a b) * mask; without dropout to += a b, in place.
void add_through_adapter(const Projection& p, at::Tensor& to, const at::Tensor& a, const at::Tensor& b,
                         int64_t which) {
  if (!p.drops()) {
    to.addmm_(a, b);
    return;
  }
  const auto grad = at::mm(a, b);
  const auto m = p.mask(which);
  const void* from = grad.const_data_ptr();
  void* dst = to.mutable_data_ptr();
  for_rows(to.size(0), to.size(1), [&](int64_t begin, int64_t end) {
    p.kernels().add_dropout(m, from, grad.stride(0), dst, to.stride(0), to.size(1), begin, end);
  });
}

struct AdapterGradients {
  at::Tensor a, b, down;  // gradients of lora_a, of lora_b, and (T, 2r) or undefined, of x A^T
  at::Tensor down_q, down_v;

  AdapterGradients(const Projection& p) : a(at::empty_like(p.lora_a)), b(at::empty_like(p.lora_b)) {
    if (p.rows.defined()) {
      down_q = at::empty({p.n_queries, p.rank}, p.x.options());
      down_v = at::empty({p.n_tokens, p.rank}, p.x.options());
    } else {
      down = at::empty({p.n_tokens, 2 * p.rank}, p.x.options());
      down_q = down.narrow(1, 0, p.rank);
      down_v = down.narrow(1, p.rank, p.rank);
    }
  }
};

// Sums over tokens use the package's GEMM while a panel of this many pairs fits a core's cache.
constexpr int64_t kMostSummed = 4096;

// Products that run in one parallel region, or one after the other by ATen.
class ProductBatch {
 public:
  explicit ProductBatch(const Projection& p) : fused_(uses_gemm(p.x)) {}

  // out = factor x w^T
  void add(at::Tensor out, const at::Tensor& x, const at::Tensor& w, double factor = 1) {
    if (!fused_ || x.size(1) > kMostSummed) {
      out.addmm_(x, w.t(), 0, factor);
      return;
    }
    inputs_.push_back(x.stride(1) == 1 ? unaliased_rows(x) : x);
    gemms_.push_back(gemm_of(inputs_.back(), w, {}, out));
    gemms_.back().factor = static_cast<float>(factor);
  }
  void run() { run_gemms(gemms_); }

 private:
  bool fused_;
  std::vector<Gemm> gemms_;
  std::vector<at::Tensor> inputs_;  // keeps the GEMMs' inputs alive
};

AdapterGradients adapter_gradients(const Projection& p, const Projection::Down& down,
                                   const ProjectionGradients& grads) {
  AdapterGradients g(p);
  const double scale = p.lora_scale();
  ProductBatch first(p), second(p);
  first.add(g.down_q, grads.q, p.b_q().t(), scale);
  first.add(g.down_v, grads.v, p.b_v().t(), scale);
  first.add(g.b.narrow(0, 0, p.q_size()), grads.q.t(), down.q.t(), scale);
  first.add(g.b.narrow(0, p.q_size(), p.kv_size()), grads.v.t(), down.v.t(), scale);
  first.run();
  if (p.one_input()) {
    second.add(g.a, g.down.t(), p.x.t());
  } else {
    second.add(g.a.narrow(0, 0, p.rank), g.down_q.t(), down.input_q.t());
    second.add(g.a.narrow(0, p.rank, p.rank), g.down_v.t(), down.input_v.t());
  }
  second.run();
  return g;
}

// Gradient of x when no two-term GEMM computes it.
at::Tensor input_gradient_by_aten(const Projection& p, const ProjectionGradients& grads,
                                  const AdapterGradients* adapter) {
  if (p.rows.defined()) {
    auto dxq = at::mm(grads.q, p.weight_q());
    auto dx = at::mm(grads.kv, p.weight.narrow(0, p.q_size(), 2 * p.kv_size()));
    if (adapter) {
      add_through_adapter(p, dxq, adapter->down_q, p.a_q(), 0);
      add_through_adapter(p, dx, adapter->down_v, p.a_v(), 1);
    }
    return dx.index_add_(0, p.rows, dxq);
  }
  auto dx = at::mm(grads.all, p.weight);
  if (adapter && p.one_input()) {
    dx.addmm_(adapter->down, p.lora_a);
  } else if (adapter) {
    add_through_adapter(p, dx, adapter->down_q, p.a_q(), 0);
    add_through_adapter(p, dx, adapter->down_v, p.a_v(), 1);
  }
  return dx;
}

at::Tensor input_gradient(const Projection& p, const ProjectionGradients& grads, const AdapterGradients* adapter) {
  if (!uses_gemm(p.x) || p.drops()) return input_gradient_by_aten(p, grads, adapter);
  auto dx = at::empty_like(p.x, at::MemoryFormat::Contiguous);
  if (!p.rows.defined()) {
    const auto all = unaliased_rows(grads.all);
    Gemm g = gemm_of(all, p.weight.t(), {}, dx);
    if (adapter) add_term(g, adapter->down, p.lora_a.t());
    run_gemms({g});
    return dx;
  }
  auto dxq = at::empty({p.n_queries, p.x.size(1)}, p.x.options());
  const auto grad_q = unaliased_rows(grads.q), grad_kv = unaliased_rows(grads.kv);
  Gemm gq = gemm_of(grad_q, p.weight_q().t(), {}, dxq);
  Gemm gkv = gemm_of(grad_kv, p.weight.narrow(0, p.q_size(), 2 * p.kv_size()).t(), {}, dx);
  if (adapter) {
    add_term(gq, adapter->down_q, p.a_q().t());
    add_term(gkv, adapter->down_v, p.a_v().t());
  }
  run_gemms({gq, gkv});
  return dx.index_add_(0, p.rows, dxq);
}

void check_gradient(const at::Tensor& t, const Projection& p, int64_t tokens, int64_t heads, const char* name) {
  TORCH_CHECK(t.dim() == 3 && t.size(0) == tokens && t.size(1) == heads && t.size(2) == p.head_dim, kOp, ": ", name,
              " is ", t.sizes(), ", not (", tokens, ", ", heads, ", ", p.head_dim, ")");
  check_same_type(t, p.x, kOp, name);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lora_qkv_rope_backward_cpu(
    const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv, const at::Tensor& x, const at::Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& lora_a, const OptionalTensor& lora_b, const at::Tensor& cos,
    const at::Tensor& sin, const OptionalTensor& qk_norm, const OptionalTensor& q_rows,
    const OptionalTensor& dropout_seed, int64_t num_q_heads, int64_t num_kv_heads, double lora_scale,
    double norm_eps, double dropout_p) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Projection p(x, weight, bias, lora_a, lora_b, cos, sin, qk_norm, q_rows, dropout_seed, num_q_heads,
                     num_kv_heads, lora_scale, norm_eps, dropout_p);
  check_gradient(dq, p, p.n_queries, p.q_heads, "dq");
  check_gradient(dk, p, p.n_tokens, p.kv_heads, "dk");
  check_gradient(dv, p, p.n_tokens, p.kv_heads, "dv");
  Projection::Down down;
  if (p.has_lora()) down = p.down();
  ProjectionGradients grads(p);
  rotate_back(p, down, dq, grads.q, 0);
  rotate_back(p, down, dk, grads.k, 1);
  grads.v.unflatten(1, {p.kv_heads, p.head_dim}).copy_(dv);
  if (!p.has_lora()) {
    return {input_gradient(p, grads, nullptr), at::empty({0}, x.options()), at::empty({0}, x.options())};
  }
  const auto adapter = adapter_gradients(p, down, grads);
  return {input_gradient(p, grads, &adapter), adapter.a, adapter.b};
}

}  // namespace
}  // namespace icae_fast

TORCH_LIBRARY_IMPL(icae_fast, CPU, m) { m.impl("lora_qkv_rope_backward", icae_fast::lora_qkv_rope_backward_cpu); }
