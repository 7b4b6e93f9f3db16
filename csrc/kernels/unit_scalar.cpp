// For CPUs that are not x86, and for x86 CPUs without AVX2: the compiler's default instruction set, with 128-bit
// vectors (SSE2, NEON, or what the compiler generates for them).
#define ICAE_ISA scalar
#define ICAE_VECTOR_BYTES 16
#include "kernels/unit_table.h"
