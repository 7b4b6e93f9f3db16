// rms_norm and rms_norm_backward on the CPU; kernels in kernels/rows/rms_norm.h.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "common/checks.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace icae_fast {
namespace {

constexpr const char* kOp = "rms_norm";

void check_like(const at::Tensor& t, const at::Tensor& x, const char* name) {
  TORCH_CHECK(t.sizes() == x.sizes(), kOp, ": ", name, " is ", t.sizes(), ", not ", x.sizes(), " as x is");
  check_same_type(t, x, kOp, name);
}

void check(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(x.dim() == 2, kOp, ": x is (tokens, d), not ", x.sizes());
  TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(1), kOp, ": weight is ", weight.sizes(), ", not (",
              x.size(1), ")");
  check_same_type(weight, x, kOp, "weight");
}

std::tuple<at::Tensor, at::Tensor> rms_norm_cpu(const at::Tensor& x_in,
                                                const std::optional<at::Tensor>& residual_in,
                                                const at::Tensor& weight_in, double eps) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto& kernel = kernels().rows[static_cast<int>(dtype_of(x_in, kOp, "x"))];
  check(x_in, weight_in);
  const auto x = x_in.contiguous(), weight = weight_in.contiguous();
  const auto residual = residual_in.has_value() ? residual_in->contiguous() : at::Tensor();
  if (residual.defined()) check_like(residual, x, "residual");
  auto y = at::empty(x.sizes(), x.options());
  auto sum = residual.defined() ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  NormPass pass{};
  pass.x = x.const_data_ptr();
  pass.residual = residual.defined() ? residual.const_data_ptr() : nullptr;
  pass.weight = weight.const_data_ptr();
  pass.sum = sum.mutable_data_ptr();
  pass.y = y.mutable_data_ptr();
  pass.size = x.size(1);
  pass.eps = eps;
  for_rows(x.size(0), x.size(1), [&](int64_t begin, int64_t end) { kernel.norm(pass, begin, end); });
  return {y, sum};
}

at::Tensor rms_norm_backward_cpu(const at::Tensor& dy_in, const std::optional<at::Tensor>& dsum_in,
                                 const at::Tensor& sum_in, const at::Tensor& weight_in, double eps) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto& kernel = kernels().rows[static_cast<int>(dtype_of(sum_in, kOp, "sum"))];
  check(sum_in, weight_in);
  const auto x = sum_in.contiguous(), weight = weight_in.contiguous(), dy = dy_in.contiguous();
  const auto dsum = dsum_in.has_value() ? dsum_in->contiguous() : at::Tensor();
  check_like(dy, x, "dy");
  if (dsum.defined()) check_like(dsum, x, "dsum");
  auto dx = at::empty(x.sizes(), x.options());
  NormPass pass{};
  pass.x = x.const_data_ptr();
  pass.weight = weight.const_data_ptr();
  pass.dy = dy.const_data_ptr();
  pass.dsum = dsum.defined() ? dsum.const_data_ptr() : nullptr;
  pass.dx = dx.mutable_data_ptr();
  pass.size = x.size(1);
  pass.eps = eps;
  for_rows(x.size(0), 2 * x.size(1), [&](int64_t begin, int64_t end) { kernel.norm_backward(pass, begin, end); });
  return dx;
}

}  // namespace
}  // namespace icae_fast

TORCH_LIBRARY_IMPL(icae_fast, CPU, m) {
  m.impl("rms_norm", icae_fast::rms_norm_cpu);
  m.impl("rms_norm_backward", icae_fast::rms_norm_backward_cpu);
}
