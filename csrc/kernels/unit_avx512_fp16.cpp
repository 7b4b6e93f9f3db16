// The AVX-512 unit for CPUs whose FMAs multiply twice as fast as `vdpbf16ps`. Operands of large bf16 products are
// widened to fp32, and attention sums values in fp16 (attention/half_values.h). Products that wait for memory still
// use `vdpbf16ps`, and prefetch differently (decode/streamed_product.h): these CPUs have Intel's cores in common.
#include "kernels/prelude.h"

#if defined(ICAE_BUILDS_FP16)
#if defined(__clang__)
#pragma clang attribute push(                                                                                \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx512fp16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx512fp16")
#endif
#define ICAE_TARGET_SWITCHED

#define ICAE_ISA avx512_fp16
#define ICAE_VECTOR_BYTES 64
#define ICAE_AVX512
#define ICAE_FP16
#define ICAE_PREFETCH_EVERY_LINE
#include "kernels/unit_table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
