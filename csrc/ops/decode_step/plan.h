// The parts of a token step that stay the same from token to token: where weights and caches are, how products are
// cut into tasks, and working memory. Planning again for each token took 0.07 of SmolLM2's 6 to 9 ms.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "abi/decode.h"
#include "abi/kernels.h"
#include "abi/numbers.h"
#include "ops/common/shared_attention.h"
#include "ops/decode_step/arguments.h"

namespace icae_fast {

// One product of a step, and how its outputs are cut into tasks.
struct DecodeProduct {
  StreamedProduct p;
  std::vector<int64_t> bounds;  // outputs of task t: bounds[t] to bounds[t + 1]
  int64_t row_bytes;            // of a row of weights

  int64_t tasks() const { return static_cast<int64_t>(bounds.size()) - 1; }
  // Prefetch bytes `from` to `to` of a task's weights, which no earlier result changes. Returns false if the task
  // has no such bytes.
  bool prefetch(int64_t task, int64_t from, int64_t to) const {
    if (task >= tasks()) return false;
    const char* w = static_cast<const char*>(p.w) + bounds[task] * row_bytes;
    const int64_t bytes = std::min(to, (bounds[task + 1] - bounds[task]) * row_bytes);
    for (int64_t i = from; i < bytes; i += 64) {
      __builtin_prefetch(w + i, 0, 2);
      if (p.epilogue == StreamedEpilogue::kSwiglu) __builtin_prefetch(w + p.outputs() * row_bytes + i, 0, 2);
    }
    return from < bytes;
  }
};

struct DecodeLayer {
  const void *attention_norm, *mlp_norm;
  const char *q_norm, *k_norm;  // or null
  SharedTensors tensors;
};

// Memory that is reused from step to step. It grows on demand, and growing loses its content.
class ReusableBuffer {
 public:
  char* reserve(int64_t bytes);

 private:
  at::Tensor bytes_;
};

struct DecodePlan {
  // Plan steps of `rows` tokens for the current number of threads. The arguments are checked before, and their
  // weights and caches must outlive the plan.
  DecodePlan(const DecodeArguments& a, int64_t rows);
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
  // Activations. The residual stream and the projected heads are in the compute type. Inputs of products are in the
  // weights' type, and `inputs` has one copy per worker.
  char *stream, *projected, *gated, *inputs;
  const int64_t inputs_row;  // bytes of one worker's copy
  std::vector<DecodeLayer> layers;
  std::vector<DecodeProduct> products;  // kMatrices per layer, then the head's, whose result the step places
  ReusableBuffer queries, scratch;

 private:
  void add_layer(const DecodeArguments& a, int64_t i);
  void add_product(const at::Tensor& w, const std::optional<at::Tensor>& bias, StreamedEpilogue epilogue,
                   const char* x, char* y, int64_t y_row);

  ReusableBuffer stream_, projected_, gated_, inputs_;
};

}  // namespace icae_fast
