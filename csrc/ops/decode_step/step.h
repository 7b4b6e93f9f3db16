// Run one token step from its plan.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/decode_step/arguments.h"
#include "ops/decode_step/plan.h"

namespace icae_fast {

// Each row's cos and sin.
struct DecodeAngles {
  std::vector<const void*> cos, sin;
};

// Take the argmax of the logits.
struct GreedyChoice {
  const std::vector<int64_t>& banned;  // ids that are not chosen: their logits become -inf
  int64_t* chosen;                     // one per row: index of the first of its largest logits, or of its first NaN
};

// Compute the logits (rows, V') of `tokens`, ids of the vocabulary, in the compute type. A plan runs one step at a
// time.
void run_decode_step(DecodePlan& plan, const int64_t* tokens, DecodeRows rows, const DecodeAngles& angles,
                     void* logits, const GreedyChoice* choice = nullptr);

}  // namespace icae_fast
