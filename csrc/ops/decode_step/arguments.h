// Arguments of decode_step, for the op and for a step that is bound to its weights.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "ops/common/shared_attention.h"

namespace icae_fast {

constexpr const char* kDecodeStep = "decode_step";

// The matrices of a layer, in the order in which `matrices` and `biases` list them.
enum Matrix : int64_t { kQKV, kOut, kGateUp, kDown, kMatrices };

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// What stays the same from step to step, in the order of the schema (icae_fast/ops/decode_step/spec.py). The caller
// holds the token ids and the tails' starts and lengths.
struct DecodeArguments {
  at::Tensor embedding;
  std::vector<at::Tensor> norms, matrices;
  OptionalTensors biases, qk_norms;
  at::Tensor head, cos, sin;  // cos and sin: one row per token, or the tables of all positions
  at::Tensor tail_keys, tail_values;
  std::vector<at::Tensor> prefix_keys, prefix_values;
  std::vector<int64_t> prefix_rows;
  int64_t q_heads, kv_heads;
  double scale, eps;
  std::vector<int64_t> windows;

  int64_t layers() const { return static_cast<int64_t>(windows.size()); }
  int64_t hidden() const { return embedding.size(1); }
  int64_t head_dim() const { return tail_keys.size(3); }
};

// Raise if the weights and caches are not what `icae_fast.ops.decode_step` describes.
void check_decode_weights(const DecodeArguments& a);
void check_decode_tokens(const at::Tensor& tokens);
// Raise if cos and sin do not have `positions` rows (any number of rows if negative) of head_dim / 2 values.
void check_decode_angles(const DecodeArguments& a, int64_t positions);

// Each row's own keys, and the segments that rows share.
struct DecodeRows {
  std::vector<TailRow> tails;
  std::vector<PrefixSegment> segments;
};
// Place every row's keys. Raises if a row's keys are not in the cache or its token is not in the vocabulary.
DecodeRows decode_rows(const DecodeArguments& a, const at::Tensor& tokens, const std::vector<int64_t>& starts,
                       const std::vector<int64_t>& lengths);

}  // namespace icae_fast
