// For CPUs without AVX2 and for all that are not x86: the compiler's default instruction set, with 128-bit vectors
// (SSE2, NEON, or whatever the compiler makes of them).
#include <cstdint>

#define ICAE_ISA scalar
#define ICAE_VECTOR_BYTES 16
#include "unit.h"
