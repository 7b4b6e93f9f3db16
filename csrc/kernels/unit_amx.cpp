// The AVX-512 unit with one difference: large bf16 products use AMX tiles (tiles.h). The tile instructions are in
// oneDNN's code, so this unit is compiled without them.
#include "kernels/prelude.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                                     \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16")
#endif
#define ICAE_TARGET_SWITCHED

#define ICAE_ISA amx
#define ICAE_VECTOR_BYTES 64
#define ICAE_AVX512
#define ICAE_BF16_PAIRS
#define ICAE_PREFETCH_EVERY_LINE
#define ICAE_AMX
#include "kernels/unit_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
