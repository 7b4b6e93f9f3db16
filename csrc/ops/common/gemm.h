// This package's own GEMM over threads: which products it takes, and how they are cut into tasks.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "common/checks.h"
#include "common/isa.h"

namespace icae_fast {

// Whether products of x go to the kernels rather than to ATen.
bool uses_gemm(const at::Tensor& x);

// x (with a unit stride), or where its rows lie a multiple of 2 KiB apart a copy in which they do not: one pass
// over x, where copying the rows that each task needs took 8 % of the time at 256 x 2048 by 8192 columns.
at::Tensor unaliased_rows(const at::Tensor& x);

// y = factor * x W^T + bias, to be changed further and given to run_gemms.
Gemm gemm_of(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, at::Tensor& y);

// Adds x W^T to what `g` sums up; x (T, k) and W (n, k) have a unit stride in either dimension, so that transposed
// ones are read in place.
void add_term(Gemm& g, const at::Tensor& x, const at::Tensor& weight);

// Computes all of them in one parallel region.
void run_gemms(const std::vector<Gemm>& gemms);

}  // namespace icae_fast
