// The AVX-512 unit once more, but for the products of bf16, which go to AMX tiles (tiles.h). The tile instructions
// themselves are in oneDNN's code, so none need be asked for here.
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

#define ICAE_ISA amx
#define ICAE_VECTOR_BYTES 64
#define ICAE_AVX512
#define ICAE_BF16_PAIRS
#define ICAE_EVERY_LINE_AHEAD
#define ICAE_AMX
#include "unit.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
