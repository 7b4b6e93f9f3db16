// The bf16 GEMM: y = finish(x W^T + bias), where what follows the product is done while a tile is in registers.
//
// A call owns some columns: it packs their weights into its own scratch (36 KiB a panel at k 576, hot in this
// core's cache), and runs over the rows of x, which are read where they lie as pairs to broadcast. That is what
// makes packing at every call cheap: with panels packed by one thread and read by all, it cost 5 % of the time at
// T 2560, N 960, k 576 (Zen 4, two threads); so it costs under 1 %, and 97 % of the rate of bare `vdpbf16ps` is
// left, where oneDNN reaches 81 to 88 %.
//
// Without ICAE_BF16_PAIRS operands are widened to fp32 for FMAs, weights in the panels and rows of x a block at a
// time.
//
// With AMX a panel is multiplied with up to kMostRows rows at once, into memory (tiles.h), and what follows reads
// it from there.

#if defined(ICAE_AVX512)

using GemmProduct = Product<bf16>;
using GemmOperand = GemmProduct::E;
constexpr bool kWidens = GemmProduct::kPair == 1;

// Elements of a step of a panel, which is (k / pair, 2 halves, kHalf, pair) for each term.
constexpr int64_t kPanelStep = 2 * kHalf * GemmProduct::kPair;
#if defined(ICAE_AMX)
constexpr int64_t kRowStep = 16, kMostRows = 128;
#else
constexpr int64_t kRowStep = kTileRows, kMostRows = 96;
#endif

// Elements of k in a panel: pairs, or whole steps of tiles; where k ends in the middle of one, x is copied and
// padded.
static inline int64_t padded_k(const GemmTerm& term) {
  return round_up(term.k, GemmProduct::kTiles ? kTileDepth : 2);
}

static inline int64_t panel_size(const GemmTerm& term) { return padded_k(term) * 2 * kHalf; }

static inline int64_t panel_size(const Gemm& g) {
  int64_t size = 0;
  for (int64_t i = 0; i < g.n_terms; ++i) size += panel_size(g.terms[i]);
  return size;
}

// Rows whose x is kept in the second-level cache while all panels of the call pass over it.
static inline int64_t block_rows(const Gemm& g) {
  constexpr int64_t kBlockBytes = 256 << 10;
  const int64_t rows = kBlockBytes / at_least(1, g.terms[0].k * static_cast<int64_t>(sizeof(GemmOperand)));
  return at_least(kRowStep, at_most(rows, kMostRows) / kRowStep * kRowStep);
}

static inline int64_t copied_row(const GemmTerm& term) { return padded_k(term) + kRowGap; }

static int64_t gemm_scratch_bytes(const Gemm& g, int64_t panels) {
  int64_t elements = panels * panel_size(g);
  for (int64_t i = 0; i < g.n_terms; ++i) elements += block_rows(g) * copied_row(g.terms[i]);
  return elements * sizeof(GemmOperand);
}

// Pairs along k of 16 columns, as the step or the two steps of a panel that `to` is the first of.
ICAE_INLINE void store_panel_pairs(GemmOperand* to, __m512i pairs) {
  if constexpr (kWidens) {
    store(to, first_of_pairs(pairs));
    store(to + kPanelStep, second_of_pairs(pairs));
  } else {
    _mm512_storeu_si512(to, pairs);
  }
}
constexpr int64_t kPairStep = kPanelStep * 2 / GemmProduct::kPair;

// The first of up to n elements of a row of x.
ICAE_INLINE void store_row(GemmOperand* to, __m512i elements, int64_t n) {
  if constexpr (kWidens) {
    put(to, widen(_mm512_castsi512_si256(elements)), at_most(16, n));
    if (n > 16) put(to + 16, widen(_mm512_extracti64x4_epi64(elements, 1)), at_most(16, n - 16));
  } else {
    store_bytes(to, elements, n * sizeof(bf16));
  }
}

// Weights of up to 16 columns into one half of a panel, with zeros from k up to `padded`.
static inline void pack_half(const bf16* w, int64_t w_row, int64_t n, int64_t k, int64_t padded, GemmOperand* to) {
  for (int64_t d = 0; d < k; d += 32) {
    __m512i x[16];
    for (int i = 0; i < 16; ++i) {
      x[i] = i < n ? load_bytes(w + i * w_row + d, (k - d) * sizeof(bf16)) : _mm512_setzero_si512();
    }
    transpose(x);
    const int64_t steps = at_most(16, (padded - d) / 2);
    for (int64_t s = 0; s < steps; ++s) store_panel_pairs(to + (d / 2 + s) * kPairStep, x[s]);
  }
}

// Rows d and d + 1 of a matrix of k rows as pairs, n of them, with zeros behind either end.
ICAE_INLINE __m512i pairs_of_rows(const bf16* from, int64_t row, int64_t d, int64_t n, int64_t k) {
  const auto lanes = [&](int64_t i) {
    if (i >= k) return _mm512_setzero_si512();
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((1u << n) - 1, from + i * row));
  };
  return _mm512_or_si512(lanes(d), _mm512_slli_epi32(lanes(d + 1), 16));
}

// The same of transposed weights, (k, n).
static inline void pack_half_transposed(const bf16* w, int64_t w_row, int64_t n, int64_t k, int64_t padded,
                                        GemmOperand* to) {
  for (int64_t d = 0; d < padded; d += 2, to += kPairStep) {
    store_panel_pairs(to, pairs_of_rows(w, w_row, d, n, k));
  }
}

// n rows of a transposed x, (k, n), into rows of k elements, with zeros from k up to `padded`.
static inline void copy_transposed(const bf16* x, int64_t x_row, int64_t n, int64_t k, int64_t padded,
                                   GemmOperand* to, int64_t to_row) {
  for (int64_t r = 0; r < n; r += 16) {
    const int64_t rows = at_most(16, n - r);
    for (int64_t d = 0; d < padded; d += 32) {
      __m512i pairs[16];
      for (int i = 0; i < 16; ++i) pairs[i] = pairs_of_rows(x + r, x_row, d + 2 * i, rows, k);
      transpose(pairs);
      for (int64_t i = 0; i < rows; ++i) {
        store_row(to + (r + i) * to_row + d, pairs[i], at_most(32, padded - d));
      }
    }
  }
}

static inline void pack_panel(const Gemm& g, int64_t panel, GemmOperand* to) {
  const Halves halves = g.halves(panel);
  for (int64_t i = 0; i < g.n_terms; ++i) {
    const GemmTerm& term = g.terms[i];
    for (int h = 0; h < 2; ++h) {
      const bf16* w = static_cast<const bf16*>(term.w) + halves.column[h] * (term.w_transposed ? 1 : term.w_row);
      const auto pack = term.w_transposed ? pack_half_transposed : pack_half;
      pack(w, term.w_row, halves.n[h], term.k, padded_k(term), to + h * kHalf * GemmProduct::kPair);
    }
    to += panel_size(term);
  }
}

// Rows of x that are widened next, asked for with every few steps of the products before: they come from the
// third-level cache or memory, for each call anew, and waiting for them took a tenth of the time (T 2560, k 576,
// N 960). All of a tile's at once waited for one another and took as long.
struct RowsSoon {
  static constexpr int64_t kSteps = 8;
  const char* at = nullptr;
  int64_t each = 0;

  // n rows from `row` on, over `tiles` products.
  RowsSoon(const GemmTerm& term, int64_t row, int64_t n, int64_t tiles) {
    if (!kWidens || term.x_transposed || n <= 0 || term.k == 0) return;
    const int64_t row_bytes = term.x_row * static_cast<int64_t>(sizeof(bf16));
    at = static_cast<const char*>(term.x) + row * row_bytes;
    each = ceil_div(kSteps * n * row_bytes, tiles * term.k);
  }

  ICAE_FORCED void ask() {
    __builtin_prefetch(at);
    at += each;
  }
};

template <int height>
using Sums = V<float>[height][2];

template <int height>
ICAE_INLINE void accumulate(const GemmOperand* x, int64_t x_row, const GemmOperand* panel, int64_t k,
                            Sums<height>& sums, RowsSoon& soon) {
  using P = GemmProduct;
  const auto step = [&](int64_t d) __attribute__((always_inline)) {
    const P::Operand w[2] = {P::lanes(panel), P::lanes(panel + kHalf * P::kPair)};
#pragma GCC unroll 12
    for (int r = 0; r < height; ++r) {
      const P::Operand each = P::broadcast(x + r * x_row + d);
      sums[r][0] = P::multiply_add(sums[r][0], each, w[0]);
      sums[r][1] = P::multiply_add(sums[r][1], each, w[1]);
    }
    panel += kPanelStep;
  };
  int64_t d = 0;
  for (; kWidens && d + soon.kSteps <= k; d += soon.kSteps) {
    soon.ask();
#pragma GCC unroll 8
    for (int i = 0; i < soon.kSteps; ++i) step(d + i);  // a loop around them cost 7 %
  }
  for (; d < k; d += P::kPair) step(d);
}

// ---- what follows the product --------------------------------------------------------------------------------

// Both halves of a row of y; `full` says that neither ends early.
template <bool full>
ICAE_INLINE void store_half(bf16* to, V<float> v, int64_t n) {
  full ? store(to, v) : store_n(to, v, n);
}
template <bool full>
ICAE_INLINE void store_both(bf16* row, const Halves& h, V<float> a, V<float> b) {
  store_half<full>(row + h.column[0], a, h.n[0]);
  store_half<full>(row + h.column[1], b, h.n[1]);
}

template <Finish finish, bool full>
ICAE_INLINE void finish_row(const Gemm& g, const Halves& h, int64_t d, int64_t row, V<float> a, V<float> b) {
  bf16* y = static_cast<bf16*>(g.y) + row * g.y_row;
  if constexpr (finish == Finish::kStore && full) {  // the halves are neighbours
    _mm512_storeu_si512(y + h.column[0], (__m512i)_mm512_cvtne2ps_pbh(b * g.factor, a * g.factor));
  } else if constexpr (finish == Finish::kStore) {
    store_both<full>(y, h, a * g.factor, b * g.factor);
  } else if constexpr (finish == Finish::kRotate) {
    const int64_t at = (g.table_rows == nullptr ? row : g.table_rows[row]) * (g.head_dim / 2) + d;
    const V<float> cos = full ? load(g.cos + at) : load_n(g.cos + at, h.n[0]);
    const V<float> sin = full ? load(g.sin + at) : load_n(g.sin + at, h.n[0]);
    store_both<full>(y, h, a * cos - b * sin, b * cos + a * sin);
  } else {
    if (g.kept != nullptr) store_both<full>(static_cast<bf16*>(g.kept) + row * g.columns, h, a, b);
    const V<float> sigmoid = _mm512_rcp14_ps(exp_of_negative<float, Elem<bf16>::kExpDegree>(a) + 1.0f);
    store_half<full>(y + h.column[0], a * sigmoid * b, h.n[0]);
  }
}

#if defined(ICAE_AMX)

// Rows of the next tile, of `left` rows.
static inline int64_t rows_of_tile(int64_t left) { return at_least(kRowStep, left / kRowStep * kRowStep); }

template <Finish finish, bool full>
static inline void finish_rows(const Gemm& g, const Halves& h, const float* sums, int64_t row, int64_t rows) {
  V<float> bias[2] = {};
  for (int i = 0; i < 2 && g.bias != nullptr; ++i) {
    bias[i] = load_n(static_cast<const bf16*>(g.bias) + h.column[i], h.n[i]);
  }
  const int64_t d = finish == Finish::kRotate ? h.column[0] % g.head_dim : 0;
  for (int64_t r = 0; r < rows; ++r, sums += 2 * kHalf) {
    finish_row<finish, full>(g, h, d, row + r, load(sums) + bias[0], load(sums + kHalf) + bias[1]);
  }
}

template <Finish finish>
static void gemm_tile(const Gemm& g, const Halves& h, const GemmOperand* const (&x)[2], const int64_t (&x_row)[2],
                      const GemmOperand* panel, int64_t row, int64_t rows, int64_t tile_rows, RowsSoon&) {
  alignas(64) float sums[kMostRows * 2 * kHalf];  // stays in the first-level cache
  for (int64_t i = 0; i < g.n_terms; ++i) {
    const int64_t k = padded_k(g.terms[i]);
    multiply_tiles(x[i], x_row[i], tile_rows, panel, 2 * kHalf, 2 * kHalf, k, i > 0, sums, 2 * kHalf);
    panel += panel_size(g.terms[i]);
  }
  h.n[0] == kHalf&& h.n[1] == kHalf ? finish_rows<finish, true>(g, h, sums, row, rows)
                                    : finish_rows<finish, false>(g, h, sums, row, rows);
}

#else

// Fewer rows at the end are a smaller tile: 4 rows of 128 would cost a tenth of them again as part of 12.
static inline int64_t rows_of_tile(int64_t left) { return left > 8 ? 12 : left > 4 ? 8 : 4; }

template <Finish finish, int height>
static void gemm_tile_of(const Gemm& g, const Halves& h, const GemmOperand* const (&x)[2],
                         const int64_t (&x_row)[2], const GemmOperand* panel, int64_t row, int64_t rows,
                         RowsSoon& soon) {
  Sums<height> sums;
  V<float> bias[2] = {};
  for (int i = 0; i < 2 && g.bias != nullptr; ++i) {
    bias[i] = load_n(static_cast<const bf16*>(g.bias) + h.column[i], h.n[i]);
  }
#pragma GCC unroll 12
  for (int r = 0; r < height; ++r) {
    sums[r][0] = bias[0];
    sums[r][1] = bias[1];
  }
  accumulate<height>(x[0], x_row[0], panel, g.terms[0].k, sums, soon);
  if (g.n_terms == 2) accumulate<height>(x[1], x_row[1], panel + panel_size(g.terms[0]), g.terms[1].k, sums, soon);
  const int64_t d = finish == Finish::kRotate ? h.column[0] % g.head_dim : 0;
  if (rows == height && h.n[0] == kHalf && h.n[1] == kHalf) {
#pragma GCC unroll 12
    for (int r = 0; r < height; ++r) finish_row<finish, true>(g, h, d, row + r, sums[r][0], sums[r][1]);
  } else {
#pragma GCC unroll 12
    for (int r = 0; r < height; ++r) {
      if (r < rows) finish_row<finish, false>(g, h, d, row + r, sums[r][0], sums[r][1]);
    }
  }
}

template <Finish finish>
static void gemm_tile(const Gemm& g, const Halves& h, const GemmOperand* const (&x)[2], const int64_t (&x_row)[2],
                      const GemmOperand* panel, int64_t row, int64_t rows, int64_t height, RowsSoon& soon) {
  static_assert(kTileRows == 12, "rows_of_tile knows these heights");
  if (height == 12) {
    gemm_tile_of<finish, 12>(g, h, x, x_row, panel, row, rows, soon);
  } else if (height == 8) {
    gemm_tile_of<finish, 8>(g, h, x, x_row, panel, row, rows, soon);
  } else {
    gemm_tile_of<finish, 4>(g, h, x, x_row, panel, row, rows, soon);
  }
}

#endif

static inline void copy_rows(const bf16* x, int64_t x_row, int64_t n, int64_t k, int64_t padded, GemmOperand* to,
                             int64_t to_row) {
  for (int64_t r = 0; r < n; ++r, to += to_row) {
    convert_row(x + r * x_row, k, to);
    clear(to + k, padded - k);
  }
}

// Rows of x for one block: where they lie, or copied.
struct RowBlock {
  const GemmOperand* x[2];
  int64_t x_row[2];

  RowBlock(const Gemm& g, int64_t begin, int64_t n, GemmOperand* copy) {
    for (int64_t i = 0; i < g.n_terms; ++i) {
      const GemmTerm& term = g.terms[i];
      const bf16* const from = static_cast<const bf16*>(term.x) + begin * (term.x_transposed ? 1 : term.x_row);
      if constexpr (!kWidens) {
        x[i] = static_cast<const GemmOperand*>(static_cast<const void*>(from));  // the same type
        x_row[i] = term.x_row;
        if (padded_k(term) == term.k && n >= kRowStep && !term.x_transposed) continue;
      }
      x_row[i] = copied_row(term);
      if (term.x_transposed) {
        copy_transposed(from, term.x_row, n, term.k, padded_k(term), copy, x_row[i]);
      } else {
        copy_rows(from, term.x_row, n, term.k, padded_k(term), copy, x_row[i]);
      }
      // A tile always computes kRowStep rows; those past the end are not stored.
      for (int64_t r = n; r < kRowStep; ++r) clear(copy + r * x_row[i], padded_k(term));
      x[i] = copy;
      copy += block_rows(g) * x_row[i];
    }
  }
};

template <Finish finish>
static void gemm_panels(const Gemm& g, int64_t panel_begin, int64_t panel_end, int64_t row_begin, int64_t row_end,
                        void* scratch) {
  GemmOperand* const packed = static_cast<GemmOperand*>(scratch);
  const TileUse<GemmProduct> use;
  const int64_t size = panel_size(g), step = block_rows(g);
  for (int64_t p = panel_begin; p < panel_end; ++p) pack_panel(g, p, packed + (p - panel_begin) * size);
  for (int64_t begin = row_begin; begin < row_end; begin += step) {
    const int64_t n = at_most(step, row_end - begin);
    const RowBlock block(g, begin, n, packed + (panel_end - panel_begin) * size);
    RowsSoon soon(g.terms[0], begin + n, at_most(step, row_end - begin - n),
                  (panel_end - panel_begin) * ceil_div(n, kRowStep));
    for (int64_t p = panel_begin; p < panel_end; ++p) {
      const Halves halves = g.halves(p);
      for (int64_t r = 0, tile; r < n; r += tile) {
        tile = rows_of_tile(n - r);
        const int64_t at = at_least(0, at_most(r, n - tile));  // the last tile overlaps the one before
        const GemmOperand* const x[2] = {block.x[0] + at * block.x_row[0],
                                         g.n_terms == 2 ? block.x[1] + at * block.x_row[1] : nullptr};
        gemm_tile<finish>(g, halves, x, block.x_row, packed + (p - panel_begin) * size, begin + at,
                          at_most(tile, n), tile, soon);
      }
    }
  }
}

static void gemm_run(const Gemm& g, int64_t panel_begin, int64_t panel_end, int64_t row_begin, int64_t row_end,
                     void* scratch) {
  const auto run = g.finish == Finish::kStore    ? gemm_panels<Finish::kStore>
                   : g.finish == Finish::kRotate ? gemm_panels<Finish::kRotate>
                                                 : gemm_panels<Finish::kSwiglu>;
  run(g, panel_begin, panel_end, row_begin, row_end, scratch);
}

// Some thousand cycles of products, which depend on nothing but the CPU.
static int64_t register_products() {
  using P = GemmProduct;
  constexpr int kSums = 12;  // enough for two a cycle, each of which takes up to six
  constexpr int64_t kRounds = 400;
  P::Operand x = {};
  V<float> sums[kSums] = {};
  for (int s = 0; s < kSums; ++s) __asm__ volatile("" : "+v"(sums[s]));  // or the compiler would take them for one
  for (int64_t i = 0; i < kRounds; ++i) {
    __asm__ volatile("" : "+v"(x));
#pragma GCC unroll 12
    for (int s = 0; s < kSums; ++s) sums[s] = P::multiply_add(sums[s], x, x);
  }
  for (int s = 0; s < kSums; ++s) __asm__ volatile("" : : "v"(sums[s]));
  return kRounds * kSums * Vec<float>::kWidth * P::kPair;
}

#endif
