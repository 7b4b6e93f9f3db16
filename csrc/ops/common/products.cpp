#include "ops/common/products.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include "common/checks.h"
#include "ops/common/gemm.h"

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
  if (!uses_gemm(x)) return multiply_by_aten(out, x, weight, bias);
  const auto unaliased = unaliased_rows(x);
  run_gemms({gemm_of(unaliased, weight, bias, out)});
}

}  // namespace icae_fast
