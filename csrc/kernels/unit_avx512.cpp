#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "table.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                     \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16")
#endif

#define ICAE_ISA avx512
#define ICAE_VECTOR_BYTES 64
#define ICAE_AVX512
#define ICAE_BF16_PAIRS
#include "unit.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
