// Arguments of lora_qkv_rope, checked and split into those of q, k and v. Forward and backward share them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "abi/heads.h"
#include "abi/numbers.h"

namespace icae_fast {

using OptionalTensor = std::optional<at::Tensor>;

struct Projection {
  Dtype dtype;
  int64_t n_tokens, n_queries, q_heads, kv_heads, head_dim, rank;
  double scale, eps, p;
  at::Tensor x, weight, bias, lora_a, lora_b, cos, sin, norm, rows, seed;  // undefined if not passed

  Projection(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
             const OptionalTensor& lora_a, const OptionalTensor& lora_b, const at::Tensor& cos,
             const at::Tensor& sin, const OptionalTensor& qk_norm, const OptionalTensor& q_rows,
             const OptionalTensor& dropout_seed, int64_t num_q_heads, int64_t num_kv_heads, double lora_scale,
             double norm_eps, double dropout_p);

  int64_t q_size() const { return q_heads * head_dim; }
  int64_t kv_size() const { return kv_heads * head_dim; }
  bool has_lora() const { return lora_a.defined(); }
  bool drops() const { return has_lora() && seed.defined() && p > 0; }
  // If the adapters of q and v read the same rows and values, one product serves both.
  bool one_input() const { return !rows.defined() && !drops(); }
  // Kept elements are scaled by 1 / (1 - p). The products' scale includes that factor, exactly.
  double lora_scale() const { return drops() ? scale / (1 - p) : scale; }

  at::Tensor weight_q() const { return weight.narrow(0, 0, q_size()); }
  at::Tensor weight_k() const { return weight.narrow(0, q_size(), kv_size()); }
  at::Tensor weight_v() const { return weight.narrow(0, q_size() + kv_size(), kv_size()); }
  at::Tensor bias_q() const { return bias.defined() ? bias.narrow(0, 0, q_size()) : bias; }
  at::Tensor bias_k() const { return bias.defined() ? bias.narrow(0, q_size(), kv_size()) : bias; }
  at::Tensor bias_v() const { return bias.defined() ? bias.narrow(0, q_size() + kv_size(), kv_size()) : bias; }
  at::Tensor a_q() const { return lora_a.narrow(0, 0, rank); }
  at::Tensor a_v() const { return lora_a.narrow(0, rank, rank); }
  at::Tensor b_q() const { return lora_b.narrow(0, 0, q_size()); }
  at::Tensor b_v() const { return lora_b.narrow(0, q_size(), kv_size()); }

  at::Tensor query_input() const;  // rows of x that have a query
  // Inputs of q's and v's adapters: their rows of x, with dropout.
  struct AdapterInputs {
    at::Tensor q, v;
  };
  AdapterInputs adapter_inputs() const;
  // x A^T of q (n_queries, r) and of v (T, r) without the scale, and their inputs.
  struct Down {
    at::Tensor q, v, input_q, input_v;
  };
  Down down() const;

  DropoutMask mask(int64_t which) const;
  // Norm and RoPE of q (which = 0) or k (1).
  HeadsPass heads_pass(int64_t which) const;
  const HeadsKernels& kernels() const;
};

}  // namespace icae_fast
