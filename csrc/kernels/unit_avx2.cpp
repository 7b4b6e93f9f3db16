#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "table.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define ICAE_ISA avx2
#define ICAE_VECTOR_BYTES 32
#define ICAE_AVX2
#include "unit.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
