// Dropout.
#pragma once

#include "kernels/unit.h"
#include "kernels/vec.h"

namespace icae_fast::ICAE_UNIT {

// The hash of icae_fast/ops/_dropout.py. The loops are plain: the compiler vectorises them for each unit.
ICAE_INLINE uint32_t mix(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x7FEB352Du;
  h = (h ^ (h >> 15)) * 0x846CA68Bu;
  return h ^ (h >> 16);
}

ICAE_INLINE uint32_t row_hash(const DropoutMask& mask, int64_t row) {
  return mix(mask.key + static_cast<uint32_t>(mask.rows == nullptr ? row : mask.rows[row]));
}

template <class T>
static void apply_dropout(const DropoutMask& mask, const void* src, int64_t src_stride, void* dst,
                          int64_t dst_stride, int64_t cols, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint32_t h = row_hash(mask, row);
    const T* from = static_cast<const T*>(src) + (mask.rows == nullptr ? row : mask.rows[row]) * src_stride;
    T* __restrict__ to = static_cast<T*>(dst) + row * dst_stride;
    for (int64_t c = 0; c < cols; ++c) to[c] = mix(h + static_cast<uint32_t>(c)) >= mask.threshold ? from[c] : T{0};
  }
}

template <class T>
static void add_dropout(const DropoutMask& mask, const void* src, int64_t src_stride, void* dst, int64_t dst_stride,
                        int64_t cols, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint32_t h = row_hash(mask, row);
    const T* from = static_cast<const T*>(src) + row * src_stride;
    T* __restrict__ to = static_cast<T*>(dst) + row * dst_stride;
    for (int64_t c = 0; c < cols; ++c) {
      const auto kept = mix(h + static_cast<uint32_t>(c)) >= mask.threshold ? to_compute(from[c]) : 0;
      store_one(to + c, to_compute(to[c]) + kept);
    }
  }
}

}  // namespace icae_fast::ICAE_UNIT
