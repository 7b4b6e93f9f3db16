// This package's own GEMM over threads: which products it takes, and how they are cut into tasks.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../common/checks.h"
#include "../common/isa.h"

namespace icae_fast {

// Whether products with these operands go to the kernels rather than to ATen.
bool takes_gemm(const at::Tensor& x, int64_t rows);

// y = factor * x W^T + bias, to be changed further and given to run_gemms.
Gemm gemm_of(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, at::Tensor& y);

// Adds x W^T to what `g` sums up.
void add_term(Gemm& g, const at::Tensor& x, const at::Tensor& weight);

// Computes all of them in one parallel region.
void run_gemms(const std::vector<Gemm>& gemms);

}  // namespace icae_fast
