// The package's GEMM on threads: which products it computes, and how they are cut into tasks.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "abi/gemm.h"

namespace icae_fast {

// Whether products of x use this GEMM and not ATen's.
bool uses_gemm(const at::Tensor& x);

// Return x (unit stride), or a copy if its rows map to the same cache sets (a multiple of 2 KiB apart). This is one
// pass over x. When each task copied its own rows, that took 8 % of the time at 256 x 2048 by 8192 columns.
at::Tensor unaliased_rows(const at::Tensor& x);

// Describe y = factor * x W^T + bias. The caller may change it and passes it to run_gemms.
Gemm gemm_of(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, at::Tensor& y);

// Add the term x W^T to the sum. x (T, k) and W (n, k) have a unit stride in one dimension; transposed ones are
// read in place.
void add_term(Gemm& g, const at::Tensor& x, const at::Tensor& weight);

// Compute all products in one parallel region.
void run_gemms(const std::vector<Gemm>& gemms);

}  // namespace icae_fast
