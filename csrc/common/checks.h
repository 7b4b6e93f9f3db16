// Argument checks that several ops share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "abi/attention.h"
#include "abi/numbers.h"

namespace icae_fast {

inline Dtype dtype_of(const at::Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Dtype::Float;
    case at::kBFloat16:
      return Dtype::BFloat16;
    case at::kDouble:
      return Dtype::Double;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(
          false, op, ": ", name, " is ", t.scalar_type(),
          "; the C++ kernels take float32, bfloat16 and float64, and ICAE_FAST_REQUIRE=reference runs "
          "the plain-torch reference");
  }
}

// The type of sums, of cos and sin, and of log-sum-exps.
inline at::ScalarType compute_type(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_same_type(const at::Tensor& t, const at::Tensor& like, const char* op, const char* name) {
  TORCH_CHECK(t.scalar_type() == like.scalar_type(), op, ": ", name, " is ", t.scalar_type(), ", not ",
              like.scalar_type(), " as the other tensors are");
}

// Kernels take any stride between rows and heads, but need each head's elements next to each other.
inline at::Tensor with_unit_stride(const at::Tensor& t) {
  return t.dim() == 0 || t.stride(-1) == 1 ? t : t.contiguous();
}

// Strides of a (tokens, heads, head_dim) tensor whose last stride is 1.
inline Strided strided(const at::Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

// Values of a 1-d int32 tensor, as 64-bit integers: sums and differences of hostile values must not wrap.
inline std::vector<int64_t> int_values(const char* op, const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.dim() == 1 && t.scalar_type() == at::kInt, op, ": ", name, " is 1-d int32, not ", t.sizes(), " ",
              t.scalar_type());
  const auto dense = t.contiguous();
  const int32_t* first = dense.const_data_ptr<int32_t>();
  return {first, first + dense.numel()};
}

// Whether 0 <= begin and begin + length <= size. The sum is never formed, so it cannot wrap.
inline bool is_within(int64_t begin, int64_t length, int64_t size) {
  return begin >= 0 && length >= 0 && length <= size && begin <= size - length;
}

// Kernels count positions in 32 bits.
constexpr int64_t kMostPositions = std::numeric_limits<int32_t>::max();

// Raise if products of these sizes could wrap.
inline void check_sizes(const char* op, int64_t q_heads, int64_t kv_heads, int64_t head_dim) {
  constexpr int64_t kMost = 1 << 20;
  TORCH_CHECK(q_heads > 0 && kv_heads > 0 && q_heads <= kMost && kv_heads <= kMost && head_dim <= kMost, op, ": ",
              q_heads, " query heads, ", kv_heads, " key/value heads and head_dim ", head_dim,
              "; heads are positive, and none of the three exceeds ", kMost);
}

}  // namespace icae_fast
