// decode_step's arguments and how it runs, for the op and for a step whose weights are bound once.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "shared_attention.h"

namespace icae_fast {

constexpr const char* kDecodeStep = "decode_step";

// What a layer's lists hold, in their order.
enum Matrix : int64_t { kQKV, kOut, kGateUp, kDown, kMatrices };

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

struct DecodeArguments {
  const at::Tensor &tokens, &embedding, &head, &cos, &sin;
  at::TensorList norms, matrices;
  const OptionalTensors &biases, &qk_norms;
  at::Tensor &tail_keys, &tail_values;
  at::TensorList prefix_keys, prefix_values;
  at::IntArrayRef prefix_rows;
  int64_t q_heads, kv_heads;
  double scale, eps;
  at::IntArrayRef windows;

  int64_t layers() const { return static_cast<int64_t>(windows.size()); }
  int64_t rows() const { return tokens.size(0); }
  int64_t hidden() const { return embedding.size(1); }
  int64_t head_dim() const { return tail_keys.size(3); }
};

// Raises where weights or caches are not what `icae_fast.ops.decode_step` describes, or the tokens, or cos and sin,
// which have `positions` rows, or any number if that is negative.
void check_decode_weights(const DecodeArguments& a);
void check_decode_tokens(const DecodeArguments& a);
void check_decode_angles(const DecodeArguments& a, int64_t positions);

// The rows' own keys, and the segments that they share.
struct DecodeRows {
  std::vector<TailRow> tails;
  std::vector<PrefixSegment> segments;
};
// Raises where a row's keys are not in the cache, or its token not in the vocabulary.
DecodeRows decode_rows(const DecodeArguments& a, const std::vector<int32_t>& starts,
                       const std::vector<int32_t>& lengths);

}  // namespace icae_fast
