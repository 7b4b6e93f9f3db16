// The inner loop of forward attention (forward.h): one tile of keys and a group of lanes.
#pragma once

#include "kernels/attention/forward_scratch.h"
#include "kernels/attention/half_values.h"
#include "kernels/attention/layout.h"
#include "kernels/attention/softmax_weights.h"
#include "kernels/pack.h"
#include "kernels/product.h"
#include "kernels/tiles.h"
#include "kernels/unit.h"
#include "kernels/vec.h"

namespace icae_fast::ICAE_UNIT {

// A group of lanes as wide as a register block, for one tile of keys: P^T of all its keys, then O^T.
template <class T, int vectors>
struct LaneGroup {
  using P = Product<T>;
  using C = typename P::C;
  using E = typename P::E;
  static constexpr int W = Vec<C>::kWidth;

  const AttentionInput& in;
  const PackedKeys<T>& keys;
  const ForwardScratch<T>& t;
  int64_t first;  // first lane
  const SoftmaxWeights<T>& weights;
  bool check_nan;    // check every block for NaN
  int64_t tile;      // first key of the tile
  bool& has_output;  // whether O^T has been written

  // O^T += V^T P^T for the tile's keys up to `end`.
  void add_values(int64_t end) {
    if constexpr (P::kTiles) {
      add_by_tiles(end);
    } else if constexpr (ValueProduct<T>::kHalf) {
      add_in_half(end);
    } else {
      add_by_blocks(end);
    }
    has_output = true;
  }

  void add_by_blocks(int64_t end) {
    const OperandA<E> v = keys.columns(in, keys.v_steps, tile);
    const OperandB<E> p{t.p + first * P::kPair, kLanes * P::kPair};
    for (int64_t d = 0; d < keys.width(in); d += kBlockRows) {
      const OperandA<E> part{v.data + d / kBlockRows * v.block, v.row, v.step};
      C* o = t.o + d * kLanes + first;
      const int64_t steps = (end - tile) / P::kPair;
      has_output ? multiply_block<P, vectors, Result::kAccumulate>(part, p, steps, o, kLanes)
                 : multiply_block<P, vectors, Result::kOverwrite>(part, p, steps, o, kLanes);
    }
  }

  void add_in_half(int64_t end) {
#if defined(ICAE_FP16)
    static_assert(kHalfKeys % kForwardKeys == 0, "a tile has one scale");
    const HalfValues values = keys.half_values(in);
    for (int64_t d = 0; d < values.width; d += kBlockRows) {
      multiply_half<vectors>(values.block(d, tile), values.scales(tile) + d, t.p + first * 2, (end - tile) / 2,
                             has_output, t.o + d * kLanes + first);
    }
#endif
  }

  // AMX multiplies whole tiles, so keys past `end` get weight 0.
  void add_by_tiles(int64_t end) {
    const int64_t depth = round_up(end - tile, kTileDepth);
    clear(t.p + (end - tile) * kLanes, (tile + depth - end) * kLanes);
    const OperandA<E> v = keys.columns(in, keys.v_steps, tile);
    multiply_tiles(v.data, v.row, keys.width(in), t.p, kLanes, vectors * W, depth, has_output, t.o, kLanes);
  }

  // S^T of the tile's keys up to `end`.
  void score_by_tiles(int64_t end) {
    static_assert(kLanes <= kBlockVectors * W || !P::kTiles, "one group has all lanes");
    const int64_t width = keys.width(in);
    multiply_tiles(keys.k_rows + tile * width, width, round_up(end - tile, kTileDepth), t.q, kLanes, vectors * W,
                   width, false, t.s, kLanes);
  }

  // Largest score of each lane, or NaN if any score is NaN.
  ICAE_INLINE V<C> largest(const Block<P, vectors>& s, int n) {
    V<C> largest = s[0][n], any_nan = s[0][n];
#pragma GCC unroll 8
    for (int m = 1; m < kBlockRows; ++m) {
      largest = vmax(largest, s[m][n]);
      any_nan = s[m][n] == s[m][n] ? any_nan : s[m][n];
    }
    return any_nan == any_nan ? largest : any_nan;
  }

  // Raise the shift of each lane that has a score above its limit to at least that score. Rescales the weights of
  // the tile's earlier keys, O^T and the sum. A NaN or infinite score makes its lane NaN for good.
  //
  // The shift rises by whole powers of two where weights have 16 bits, so that none is rounded again. Where the new
  // shift has too few bits for that (logits of 1e5 and more in fp32), the nearest power is off by at most a half,
  // for weights that are below 2^-kSlack of the largest.
  __attribute__((noinline)) void raise_shift(int64_t key, const Block<P, vectors>& s) {
    for (int n = 0; n < vectors; ++n) {
      Softmax<C>& softmax = *t.softmax;
      const int64_t lane = first + n * W;
      const V<C> highest = largest(s, n), limit = load(softmax.limit + lane), before = load(softmax.shift + lane);
      const I<C> rises = ~(highest <= limit);
      if (!any<C>(rises)) continue;
      const V<C> top = highest + (highest - highest);  // NaN if infinite
      // Before the first shift the sum is 0, and O^T of the lane is finite.
      const I<C> again = rises & (limit != -kInfinity<C>);
      const V<C> powers = whole((top - before) * weights.exponent) + C(1);
      // Where all earlier weights vanish, the sum might overflow, so the top is taken as it is.
      const I<C> fades = again & (powers < set1(C(Vec<C>::kBias)));
      const V<C> raised = fades ? vmax(before + powers / weights.exponent, top) : rises ? top : before;
      const V<C> lost = again ? (raised - before) * weights.exponent : V<C>{};
      const V<C> nan = raised - raised;  // or 0; integers would lose it
      const V<C> factor =
          nan + (SoftmaxWeights<T>::kKeepsNan ? exp2<C, Elem<T>::kExpDegree>(-lost) : power_of(-whole(lost)));
      const V<C> slack = set1(C(kSlack) / weights.exponent), highest_kept = raised + slack;
      store(softmax.shift + lane, raised);
      // Large scores may round the limit up by more than the slack.
      store(softmax.limit + lane, rises ? (highest_kept - raised > slack ? raised : highest_kept) : limit);
      store(softmax.sum + lane, load(softmax.sum + lane) * factor);
      for (int64_t d = 0; d < keys.width(in) && has_output; ++d) {
        C* o = t.o + d * kLanes + lane;
        store(o, load(o) * factor);
      }
      scale_weights(t.p + lane * ValueProduct<T>::kPair, key - tile, factor);
    }
  }

  // The nearest whole number, and 2^x of whole x <= 0, or 0 if it is subnormal.
  static V<C> whole(V<C> x) { return (x + Vec<C>::kRound) - Vec<C>::kRound; }
  static V<C> power_of(V<C> x) {
    const V<C> least = set1(C(-Vec<C>::kBias));
    const I<C> exponent = __builtin_convertvector(x > least ? x : least, I<C>);
    return (V<C>)((I<C>{} + Vec<C>::kBias + exponent) << Vec<C>::kMantissa);
  }

  // Lanes whose scores contain a NaN or an infinity, from the first vector of lanes: a non-finite element of a key
  // makes the scores of every lane non-finite. `check_nan` covers queries.
  ICAE_INLINE I<C> non_finite(const Block<P, vectors>& s) {
    V<C> total = s[0][0];
#pragma GCC unroll 8
    for (int m = 1; m < kBlockRows; ++m) total += s[m][0];
    const V<C> zero = total - total;
    return zero != zero;
  }

  // Scores of kBlockRows keys, then their weights.
  template <bool masked>
  ICAE_FORCED void softmax_block(int64_t key) {
    const int64_t width = keys.width(in);
    Softmax<C>& softmax = *t.softmax;
    Block<P, vectors> s = {};
    if constexpr (P::kTiles) {
      load_block<P, vectors>(s, t.s + (key - tile) * kLanes, kLanes);
    } else {
      multiply_into<P, vectors>(s, {keys.k_rows + key * width, width, P::kPair},
                                {t.q + first * P::kPair, kLanes * P::kPair}, ceil_div(in.head_dim, P::kPair));
    }
    I<C> rises = SoftmaxWeights<T>::kKeepsNan ? I<C>{} : non_finite(s);
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      const int64_t lane = first + n * W;
      if constexpr (masked) {
        const I<C> low = load_int<C>(t.range->low + lane), high = load_int<C>(t.range->high + lane);
#pragma GCC unroll 8
        for (int m = 0; m < kBlockRows; ++m) {
          s[m][n] = t.range->reads(key + m, low, high) ? s[m][n] : set1(-kInfinity<C>);
        }
      }
      V<C> even = s[0][n], odd = s[1][n];  // two chains, since a maximum takes four cycles
#pragma GCC unroll 4
      for (int m = 2; m < kBlockRows; m += 2) {
        even = vmax(even, s[m][n]);
        odd = vmax(odd, s[m + 1][n]);
      }
      rises |= ~(vmax(even, odd) <= load(softmax.limit + lane));
    }
    if (__builtin_expect(check_nan || any<C>(rises), 0)) {
      Block<P, vectors> copy;  // taking the address of `s` would move it out of registers
#pragma GCC unroll 8
      for (int m = 0; m < kBlockRows; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) copy[m][n] = s[m][n];
      }
      raise_shift(key, copy);
    }
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      const int64_t lane = first + n * W;
      const V<C> total = load(softmax.sum + lane), shift = load(softmax.shift + lane);
      typename SoftmaxWeights<T>::Sum sum = weights.begin(total);
#pragma GCC unroll 8
      for (int m = 0; m < kBlockRows; m += 2) {
        weights.of_pair(s[m][n] - shift, s[m + 1][n] - shift,
                        t.p + (key - tile + m) * kLanes + lane * ValueProduct<T>::kPair, sum);
      }
      store(softmax.sum + lane, weights.end(sum, total));
    }
  }

  void attend(int64_t end) {
    if constexpr (P::kTiles) score_by_tiles(end);
    for (int64_t key = tile; key < end; key += kBlockRows) {
      t.prefetch->issue(kPrefetchLanes);
      t.range->cut(key, key + kBlockRows) ? softmax_block<true>(key) : softmax_block<false>(key);
    }
    add_values(end);
  }
};

}  // namespace icae_fast::ICAE_UNIT
