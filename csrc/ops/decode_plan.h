// What of a token step stays the same from token to token: where weights and caches are, how products are cut into
// tasks, and room to work in. Made anew for each token it took 0.07 of SmolLM2's 6 to 9 ms.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/isa.h"
#include "decode_step.h"

namespace icae_fast {

// One product of a step, and how its outputs are cut into tasks.
struct DecodeProduct {
  StreamedProduct p;
  std::vector<int64_t> bounds;
  int64_t row_bytes;

  int64_t tasks() const { return static_cast<int64_t>(bounds.size()) - 1; }
  // Asks for a task's weights from byte `from` up to byte `to`, which depend on nothing; false if it has none
  // there.
  bool ask_for(int64_t task, int64_t from, int64_t to) const {
    if (task >= tasks()) return false;
    const char* w = static_cast<const char*>(p.w) + bounds[task] * row_bytes;
    const int64_t bytes = std::min(to, (bounds[task + 1] - bounds[task]) * row_bytes);
    for (int64_t i = from; i < bytes; i += 64) {
      __builtin_prefetch(w + i, 0, 2);
      if (p.after == After::kSwiglu) __builtin_prefetch(w + p.outputs() * row_bytes + i, 0, 2);
    }
    return from < bytes;
  }
};

struct DecodeLayer {
  const void *attention_norm, *mlp_norm;
  const char *q_norm, *k_norm;  // or null
  SharedTensors tensors;
};

// Memory that is kept; what is in it is lost when more is asked for.
class Room {
 public:
  char* of(int64_t bytes);

 private:
  at::Tensor bytes_;
};

struct DecodePlan {
  // Of checked arguments, whose weights and caches must outlive it; for the threads that there are now.
  explicit DecodePlan(const DecodeArguments& a);
  DecodePlan(const DecodePlan&) = delete;  // products point into it
  DecodePlan& operator=(const DecodePlan&) = delete;

  const Dtype dtype;
  const Kernels& unit;
  const DecodeKernels& kernels;
  const int64_t size, wide;  // bytes of an element of the weights, and of the compute type
  const int64_t workers, rows, hidden, q_heads, kv_heads, head_dim;
  const double scale, eps;
  const char* const embedding;
  const int64_t embedding_row;  // in bytes
  const void* const last_norm;
  // Activations in the compute type, but what a product reads in the weights' type; `inputs` is a row a worker.
  char *stream, *projected, *gated, *inputs;
  const int64_t inputs_row;
  std::vector<DecodeLayer> layers;
  std::vector<DecodeProduct> products;  // kMatrices a layer, and the head's, whose result is where the step says
  Room queries, scratch;

 private:
  void add_layer(const DecodeArguments& a, int64_t i);
  void add_product(const at::Tensor& w, const std::optional<at::Tensor>& bias, After after, const char* x, char* y,
                   int64_t y_row);

  Room stream_, projected_, gated_, inputs_;
};

// Where the rows' cos and sin are.
struct DecodeAngles {
  std::vector<const void*> cos, sin;
};

// The most likely tokens.
struct DecodeChoice {
  const std::vector<int64_t>& never;  // tokens that may not be chosen
  int64_t* places;                    // one a row: where the first of its largest logits is, or its first NaN
};

// A step: `logits` becomes (rows, V') in the compute type, for tokens of the vocabulary. With a choice, tokens that
// may not be chosen get -inf. One call at a time for a plan.
void run_decode_step(DecodePlan& plan, const int64_t* tokens, DecodeRows rows, const DecodeAngles& angles,
                     void* logits, const DecodeChoice* choice = nullptr);

}  // namespace icae_fast
