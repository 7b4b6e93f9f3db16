// swiglu and swiglu_backward on the CPU. In bf16 with AVX-512 the activation is the epilogue of the packed gate-up
// GEMM, and gate and up are stored only if a backward needs them.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "common/checks.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "ops/common/gemm.h"
#include "ops/common/products.h"

namespace icae_fast {
namespace {

const RowsKernels& kernels_for(const at::Tensor& x) {
  return kernels().rows[static_cast<int>(dtype_of(x, "swiglu", "x"))];
}

at::Tensor checked_bias(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const auto dense = bias.has_value() ? bias->contiguous() : at::Tensor();
  check_linear(x, weight, dense, "swiglu");
  TORCH_CHECK(weight.size(0) % 2 == 0, "swiglu: weight has ", weight.size(0),
              " rows, but those of gate and of up are as many");
  return dense;
}

void activate(const at::Tensor& gate_up, at::Tensor& y) {
  SwigluPass pass{};
  pass.gate_up = gate_up.const_data_ptr();
  pass.y = y.mutable_data_ptr();
  pass.size = y.size(1);
  const auto& kernel = kernels_for(y);
  for_rows(y.size(0), 2 * y.size(1), [&](int64_t begin, int64_t end) { kernel.swiglu(pass, begin, end); });
}

std::tuple<at::Tensor, at::Tensor> swiglu_cpu(const at::Tensor& x_in, const at::Tensor& weight_in,
                                              const std::optional<at::Tensor>& bias_in, bool keep) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto bias = checked_bias(x_in, weight_in, bias_in);
  const auto x = with_unit_stride(x_in), weight = with_unit_stride(weight_in);
  const int64_t rows = x.size(0), columns = weight.size(0);
  const bool fused = uses_gemm(x);
  auto y = at::empty({rows, columns / 2}, x.options());
  auto gate_up = keep || !fused ? at::empty({rows, columns}, x.options()) : at::empty({0}, x.options());
  if (fused) {
    const auto unaliased = unaliased_rows(x);
    Gemm g = gemm_of(unaliased, weight, bias, y);
    g.epilogue = GemmEpilogue::kSwiglu;
    g.kept = keep ? gate_up.mutable_data_ptr() : nullptr;
    run_gemms({g});
  } else {
    multiply_by_aten(gate_up, x, weight, bias);
    activate(gate_up, y);
  }
  return {y, keep ? gate_up : at::empty({0}, x.options())};
}

at::Tensor swiglu_backward_cpu(const at::Tensor& dy_in, const at::Tensor& x_in, const at::Tensor& weight_in,
                               const std::optional<at::Tensor>& bias_in, const at::Tensor& kept) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto bias = checked_bias(x_in, weight_in, bias_in);
  const auto x = with_unit_stride(x_in), weight = with_unit_stride(weight_in), dy = dy_in.contiguous();
  const int64_t rows = x.size(0), columns = weight.size(0);
  TORCH_CHECK(dy.dim() == 2 && dy.size(0) == rows && 2 * dy.size(1) == columns, "swiglu_backward: dy is ",
              dy.sizes(), ", not (", rows, ", ", columns / 2, ")");
  check_same_type(dy, x, "swiglu_backward", "dy");
  auto gate_up = kept.contiguous();
  if (rows > 0 && gate_up.numel() == 0) {
    gate_up = at::empty({rows, columns}, x.options());
    multiply(gate_up, x, weight, bias);
  }
  TORCH_CHECK(gate_up.numel() == rows * columns, "swiglu_backward: gate_up is ", kept.sizes(), ", not (", rows,
              ", ", columns, ") or empty");
  check_same_type(gate_up, x, "swiglu_backward", "gate_up");
  const auto gradient = at::empty({rows, columns}, x.options());
  SwigluPass pass{};
  pass.gate_up = gate_up.const_data_ptr();
  pass.dy = dy.const_data_ptr();
  pass.dgate_up = gradient.mutable_data_ptr();
  pass.size = columns / 2;
  const auto& kernel = kernels_for(x);
  for_rows(rows, 2 * columns, [&](int64_t begin, int64_t end) { kernel.swiglu_backward(pass, begin, end); });
  auto dx = at::empty({rows, x.size(1)}, x.options());
  multiply(dx, gradient, weight.t(), {});
  return dx;
}

}  // namespace
}  // namespace icae_fast

TORCH_LIBRARY_IMPL(icae_fast, CPU, m) {
  m.impl("swiglu", icae_fast::swiglu_cpu);
  m.impl("swiglu_backward", icae_fast::swiglu_backward_cpu);
}
