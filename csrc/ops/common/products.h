// Products with frozen weights.
#pragma once

#include <ATen/core/Tensor.h>

namespace icae_fast {

// Check that x (T, d), weight (n, d) and bias (n) or undefined are of one type that the kernels support.
void check_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const char* op);

// out = x weight^T + bias, by the package's GEMM or ATen's. x has a unit stride, weight has one in either
// dimension, and bias is contiguous.
void multiply(at::Tensor& out, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias);
void multiply_by_aten(at::Tensor& out, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias);

}  // namespace icae_fast
