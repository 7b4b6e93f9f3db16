// Everything that kernels include from outside of kernels/: standard headers, intrinsics, and the ABI.
//
// A unit_*.cpp includes this before it switches the compiler to its instruction set. The order matters: the linker
// keeps one copy of an inline function for the whole library. If it kept a copy that was compiled for AVX-512, CPUs
// without AVX-512 would crash. No other kernel header includes a standard header; check_headers.py checks that.
#pragma once

#if defined(ICAE_TARGET_SWITCHED)
#error "include kernels/prelude.h before the compiler is switched to the unit's instruction set"
#endif

#include <cstdint>  // IWYU pragma: export

#if defined(__x86_64__)
#include <immintrin.h>  // IWYU pragma: export
#endif

#include "abi/kernels.h"  // IWYU pragma: export
