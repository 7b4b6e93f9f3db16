// All kernels of one unit and its table. A unit_*.cpp defines ICAE_ISA and ICAE_VECTOR_BYTES, includes every
// standard header, switches the compiler to its instruction set, and only then includes this. The order matters:
// an inline function of a standard header that is compiled for AVX-512 here may be the copy that the linker keeps
// for the whole library, and so crash CPUs without it.
#include "table.h"

#if defined(__GNUC__) && !defined(__clang__)
// Vectors are only passed between functions of one unit, all compiled for the same instruction set.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#define ICAE_PASTE2(a, b) a##b
#define ICAE_PASTE(a, b) ICAE_PASTE2(a, b)
#define ICAE_TEXT2(a) #a
#define ICAE_TEXT(a) ICAE_TEXT2(a)

namespace icae_fast {
namespace ICAE_PASTE(unit_, ICAE_ISA) {

// clang-format off: each one uses those before it
#include "vec.h"
#include "tiles.h"
#include "product.h"
#include "attention_values.h"
#include "attention.h"
#include "attention_weights.h"
#include "attention_forward.h"
#include "attention_few.h"
#include "attention_backward.h"
#include "heads.h"
#include "rows.h"
#include "decode.h"
#include "gemm.h"
// clang-format on

template <class T>
static int64_t scratch_bytes(const AttentionInput& in, bool backward) {
  return backward ? backward_scratch_bytes<T>(in) : forward_scratch_bytes<T>(in);
}

template <class T>
constexpr AttentionKernels attention_kernels() {
  return {Product<T>::kTiles ? kTileDepth : kPad,
          packed_bytes<T>,
          scratch_bytes<T>,
          partial_bytes<T>,
          pack_keys<T>,
          forward_tile<T>,
          forward_few<T>,
          backward_slice<T>,
          sum_slices<T>};
}

template <class T>
constexpr HeadsKernels heads_kernels() {
  return {heads_forward<T>, heads_backward<T>, drop<T>, add_kept<T>};
}

template <class T>
constexpr RowsKernels rows_kernels() {
  return {norm_forward<T>, norm_backward<T>, swiglu_forward<T>, swiglu_backward<T>};
}

template <class T>
constexpr DecodeKernels decode_kernels() {
  return {streamed_product<T>, widen_row<T>, norm_row<T>, turn_head<T>, merge_head<T>, first_largest<T>};
}

static constexpr Kernels table = {
    ICAE_TEXT(ICAE_ISA),
    {attention_kernels<float>(), attention_kernels<bf16>(), attention_kernels<double>()},
    {heads_kernels<float>(), heads_kernels<bf16>(), heads_kernels<double>()},
    {rows_kernels<float>(), rows_kernels<bf16>(), rows_kernels<double>()},
    {decode_kernels<float>(), decode_kernels<bf16>(), decode_kernels<double>()},
#if defined(ICAE_AVX512)
    {kWidens, gemm_scratch_bytes, gemm_run},
    register_products,
#else
    {false, nullptr, nullptr},
    nullptr,
#endif
};

}  // namespace ICAE_PASTE(unit_, ICAE_ISA)

const Kernels& ICAE_PASTE(kernels_, ICAE_ISA)() { return ICAE_PASTE(unit_, ICAE_ISA)::table; }

}  // namespace icae_fast
