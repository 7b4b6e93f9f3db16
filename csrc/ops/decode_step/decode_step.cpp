// The op decode_step on the CPU.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <utility>

#include "common/checks.h"
#include "ops/decode_step/step.h"

namespace icae_fast {
namespace {

at::Tensor decode_step_cpu(const at::Tensor& tokens, const at::Tensor& embedding, at::TensorList norms,
                           at::TensorList matrices, const OptionalTensors& biases, const OptionalTensors& qk_norms,
                           const at::Tensor& head, const at::Tensor& cos, const at::Tensor& sin,
                           at::Tensor tail_keys, at::Tensor tail_values, const at::Tensor& tail_starts,
                           const at::Tensor& tail_lengths, at::TensorList prefix_keys, at::TensorList prefix_values,
                           at::IntArrayRef prefix_rows, int64_t num_q_heads, int64_t num_kv_heads, double scale,
                           double norm_eps, at::IntArrayRef windows) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto dense = tokens.contiguous();
  const DecodeArguments a{embedding,
                          norms.vec(),
                          matrices.vec(),
                          biases,
                          qk_norms,
                          head,
                          cos,
                          sin,
                          tail_keys,
                          tail_values,
                          prefix_keys.vec(),
                          prefix_values.vec(),
                          prefix_rows.vec(),
                          num_q_heads,
                          num_kv_heads,
                          scale,
                          norm_eps,
                          windows.vec()};
  check_decode_weights(a);
  check_decode_tokens(dense);
  const int64_t rows = dense.size(0);
  check_decode_angles(a, rows);
  auto placed = decode_rows(a, dense, int_values(kDecodeStep, tail_starts, "tail_starts"),
                            int_values(kDecodeStep, tail_lengths, "tail_lengths"));
  DecodeAngles angles;
  for (int64_t r = 0; r < rows; ++r) {
    angles.cos.push_back(cos.select(0, r).const_data_ptr());
    angles.sin.push_back(sin.select(0, r).const_data_ptr());
  }
  auto logits = at::empty({rows, head.size(0)}, embedding.options().dtype(compute_type(embedding)));
  DecodePlan plan(a, rows);
  run_decode_step(plan, dense.const_data_ptr<int64_t>(), std::move(placed), angles, logits.mutable_data_ptr());
  return logits;
}

}  // namespace
}  // namespace icae_fast

TORCH_LIBRARY_IMPL(icae_fast, CPU, m) { m.impl("decode_step", icae_fast::decode_step_cpu); }
