// The AVX-512 unit once more, for CPUs that do twice as much with FMAs as with `vdpbf16ps`: operands of large
// products of bf16 are widened to fp32, and values are summed up in fp16 (attention_values.h). Products that wait
// for memory keep to `vdpbf16ps`, and ask for it otherwise (decode.h): what these CPUs have in common is Intel's
// cores.
#include "table.h"

#if defined(ICAE_BUILDS_FP16)
#include <immintrin.h>

#include <cstdint>

#if defined(__clang__)
#pragma clang attribute push(                                                                                \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx512fp16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx512fp16")
#endif

#define ICAE_ISA avx512_fp16
#define ICAE_VECTOR_BYTES 64
#define ICAE_AVX512
#define ICAE_FP16
#define ICAE_EVERY_LINE_AHEAD
#include "unit.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
