// Subnormal results flushed to zero.
#pragma once

#include "kernels/unit.h"

namespace icae_fast::ICAE_UNIT {

// Scope in which this thread's arithmetic returns 0 in place of a subnormal. A softmax weight below 2^-126 changes
// no sum of weights, but as an operand it costs a microcode assist of about 150 cycles: fp32 attention took 50 to
// 80 times as long where logits had a standard deviation of 20. Only x86 has the mode here; other CPUs run
// subnormals at speed.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kFlushToZero); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kFlushToZero = 0x8000;
  const unsigned before_;
#else
  FlushSubnormals() {}
  ~FlushSubnormals() {}
#endif

 public:
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

}  // namespace icae_fast::ICAE_UNIT
