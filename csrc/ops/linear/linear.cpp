// linear on the CPU: the package's GEMM in bf16 with AVX-512, else ATen's.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "ops/common/products.h"

namespace icae_fast {

namespace {

at::Tensor linear_cpu(const at::Tensor& x_in, const at::Tensor& weight_in,
                      const std::optional<at::Tensor>& bias_in) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto bias = bias_in.has_value() ? bias_in->contiguous() : at::Tensor();
  check_linear(x_in, weight_in, bias, "linear");
  const auto x = with_unit_stride(x_in);
  const auto weight = weight_in.stride(0) == 1 ? weight_in : with_unit_stride(weight_in);
  auto y = at::empty({x.size(0), weight.size(0)}, x.options());
  multiply(y, x, weight, bias);
  return y;
}

}  // namespace
}  // namespace icae_fast

TORCH_LIBRARY_IMPL(icae_fast, CPU, m) { m.impl("linear", icae_fast::linear_cpu); }
