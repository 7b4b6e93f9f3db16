// The AVX-512 unit once more, but for large products of bf16, whose operands are widened to fp32: for CPUs that do
// twice as much with FMAs as with `vdpbf16ps`. Products that wait for memory keep to that, and ask for it otherwise
// (decode.h): what these CPUs have in common is Intel's cores.
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

#define ICAE_ISA avx512_fma
#define ICAE_VECTOR_BYTES 64
#define ICAE_AVX512
#define ICAE_EVERY_LINE_AHEAD
#include "unit.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
