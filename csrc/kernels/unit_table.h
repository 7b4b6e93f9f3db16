// Every kernel of one unit, and the unit's table of function pointers. Only the unit_*.cpp include this.
#pragma once

#include "kernels/attention/table.h"
#include "kernels/decode/table.h"
#include "kernels/gemm/gemm.h"
#include "kernels/gemm/panel.h"
#include "kernels/rows/table.h"
#include "kernels/unit.h"

namespace icae_fast {
namespace ICAE_UNIT {

// One row for each member of `Kernels` (abi/kernels.h); those of three kernels are in the order of Dtype.
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

}  // namespace ICAE_UNIT

const Kernels& ICAE_PASTE(kernels_, ICAE_ISA)() { return ICAE_UNIT::table; }

}  // namespace icae_fast
