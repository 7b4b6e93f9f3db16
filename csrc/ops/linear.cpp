// linear on the CPU: this package's GEMM in bf16 with AVX-512, else ATen's. Also the products that other ops share.
#include "linear.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "../common/checks.h"
#include "gemm.h"

namespace icae_fast {

void check_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const char* op) {
  dtype_of(x, op, "x");
  TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && weight.size(1) == x.size(1), op, ": x is ", x.sizes(),
              " and weight ", weight.sizes(), "; they must be (T, d) and (n, d)");
  check_same_type(weight, x, op, "weight");
  if (!bias.defined()) return;
  TORCH_CHECK(bias.dim() == 1 && bias.size(0) == weight.size(0), op, ": bias is ", bias.sizes(), ", not (",
              weight.size(0), ")");
  check_same_type(bias, x, op, "bias");
}

void multiply_by_aten(at::Tensor& out, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  if (bias.defined()) {
    at::addmm_out(out, bias, x, weight.t());
  } else {
    at::mm_out(out, x, weight.t());
  }
}

void multiply(at::Tensor& out, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  if (!takes_gemm(x)) return multiply_by_aten(out, x, weight, bias);
  const auto apart = rows_apart(x);
  run_gemms({gemm_of(apart, weight, bias, out)});
}

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
