// The bf16 GEMM: y = epilogue(x W^T + bias), with the epilogue applied while a tile is in registers.
//
// A call owns some columns. It packs their weights into its own scratch (36 KiB per panel at k 576, hot in this
// core's cache), and iterates over the rows of x, which it reads in place as pairs to broadcast. That makes packing
// at every call cheap: panels that one thread packed and all read cost 5 % of the time at T 2560, N 960, k 576 (Zen
// 4, two threads). Packing per call costs under 1 %, and the GEMM reaches 97 % of the rate of bare `vdpbf16ps`,
// where oneDNN reaches 81 to 88 %.
//
// Without ICAE_BF16_PAIRS, operands are widened to fp32 for FMAs: weights in the panels, and rows of x a block at a
// time.
//
// With AMX, a panel is multiplied with up to kMostRows rows at once into memory (tiles.h), and the epilogue reads
// the sums from there.
#pragma once

#include "kernels/gemm/panel.h"
#include "kernels/gemm/tile.h"
#include "kernels/product.h"
#include "kernels/tiles.h"
#include "kernels/unit.h"
#include "kernels/vec.h"

namespace icae_fast::ICAE_UNIT {

#if defined(ICAE_AVX512)

template <GemmEpilogue epilogue>
static void gemm_panels(const Gemm& g, int64_t panel_begin, int64_t panel_end, int64_t row_begin, int64_t row_end,
                        void* scratch) {
  GemmOperand* const packed = static_cast<GemmOperand*>(scratch);
  const TileRegisters<GemmProduct> use;
  const int64_t size = panel_size(g), step = block_rows(g);
  for (int64_t p = panel_begin; p < panel_end; ++p) pack_panel(g, p, packed + (p - panel_begin) * size);
  for (int64_t begin = row_begin; begin < row_end; begin += step) {
    const int64_t n = at_most(step, row_end - begin);
    const RowBlock block(g, begin, n, packed + (panel_end - panel_begin) * size);
    RowPrefetch prefetch(g.terms[0], begin + n, at_most(step, row_end - begin - n),
                         (panel_end - panel_begin) * ceil_div(n, kRowStep));
    for (int64_t p = panel_begin; p < panel_end; ++p) {
      const Halves halves = g.halves(p);
      for (int64_t r = 0, tile; r < n; r += tile) {
        tile = rows_of_tile(n - r);
        const int64_t at = at_least(0, at_most(r, n - tile));  // the last tile overlaps the previous one
        const GemmOperand* const x[2] = {block.x[0] + at * block.x_row[0],
                                         g.n_terms == 2 ? block.x[1] + at * block.x_row[1] : nullptr};
        gemm_tile<epilogue>(g, halves, x, block.x_row, packed + (p - panel_begin) * size, begin + at,
                            at_most(tile, n), tile, prefetch);
      }
    }
  }
}

static void gemm_run(const Gemm& g, int64_t panel_begin, int64_t panel_end, int64_t row_begin, int64_t row_end,
                     void* scratch) {
  const auto run = g.epilogue == GemmEpilogue::kStore  ? gemm_panels<GemmEpilogue::kStore>
                   : g.epilogue == GemmEpilogue::kRope ? gemm_panels<GemmEpilogue::kRope>
                                                       : gemm_panels<GemmEpilogue::kSwiglu>;
  run(g, panel_begin, panel_end, row_begin, row_end, scratch);
}

// Run some thousand cycles of products that depend only on the CPU, and return their number.
static int64_t register_products() {
  using P = GemmProduct;
  constexpr int kSums = 12;  // enough for two per cycle with a latency of up to six
  constexpr int64_t kRounds = 400;
  P::Operand x = {};
  V<float> sums[kSums] = {};
  for (int s = 0; s < kSums; ++s)
    __asm__ volatile("" : "+v"(sums[s]));  // or the compiler would merge the equal sums
  for (int64_t i = 0; i < kRounds; ++i) {
    __asm__ volatile("" : "+v"(x));
#pragma GCC unroll 12
    for (int s = 0; s < kSums; ++s) sums[s] = P::multiply_add(sums[s], x, x);
  }
  for (int s = 0; s < kSums; ++s) __asm__ volatile("" : : "v"(sums[s]));
  return kRounds * kSums * Vec<float>::kWidth * P::kPair;
}

#endif

}  // namespace icae_fast::ICAE_UNIT
