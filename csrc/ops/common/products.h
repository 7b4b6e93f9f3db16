// Plain products with frozen weights.
#pragma once

#include <ATen/core/Tensor.h>

namespace icae_fast {

// x (T, d), weight (n, d), bias (n) or undefined, all of one type that the kernels take.
void check_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const char* op);

// out = x weight^T + bias, by the faster of the two products; x with unit stride, weight with one in either
// dimension, bias contiguous.
void multiply(at::Tensor& out, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias);
void multiply_by_aten(at::Tensor& out, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias);

}  // namespace icae_fast
