#include "ops/decode_step/plan.h"

#include <ATen/ops/empty.h>

#include <utility>

#include "common/checks.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/phases.h"

namespace icae_fast {
namespace {

const char* data_of(const at::Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }

// One layer of a (layers, tokens, heads, head_dim) cache.
Strided of_layer(const at::Tensor& t, int64_t layer) {
  return {data_of(t) + layer * t.stride(0) * t.element_size(), t.stride(1), t.stride(2)};
}

int64_t widest_gate(const DecodeArguments& a) {
  int64_t most = 1;
  for (int64_t i = 0; i < a.layers(); ++i) most = at_least(most, a.matrices[kMatrices * i + kDown].size(1));
  return most;
}

}  // namespace

char* ReusableBuffer::reserve(int64_t bytes) {
  if (!bytes_.defined() || bytes_.numel() < bytes) bytes_ = at::empty({bytes}, at::kByte);
  return static_cast<char*>(bytes_.mutable_data_ptr());
}

DecodePlan::DecodePlan(const DecodeArguments& a, int64_t rows)
    : dtype(dtype_of(a.embedding, kDecodeStep, "the embedding")),
      unit(icae_fast::kernels()),
      kernels(unit.decode[static_cast<int>(dtype)]),
      size(a.embedding.element_size()),
      wide(c10::elementSize(compute_type(a.embedding))),
      workers(running_threads()),
      rows(rows),
      hidden(a.hidden()),
      q_heads(a.q_heads),
      kv_heads(a.kv_heads),
      head_dim(a.head_dim()),
      scale(a.scale),
      eps(a.eps),
      embedding(data_of(a.embedding)),
      embedding_row(a.embedding.stride(0) * size),
      last_norm(a.norms[2 * a.layers()].const_data_ptr()),
      inputs_row(rows * at_least(hidden, q_heads * head_dim) * size) {
  stream = stream_.reserve(rows * hidden * wide);
  projected = projected_.reserve(rows * (q_heads + 2 * kv_heads) * head_dim * wide);
  gated = gated_.reserve(rows * widest_gate(a) * size);
  inputs = inputs_.reserve(workers * inputs_row);
  for (int64_t i = 0; i < a.layers(); ++i) add_layer(a, i);
  add_product(a.head, {}, StreamedEpilogue::kStore, inputs, nullptr, a.head.size(0));
}

void DecodePlan::add_layer(const DecodeArguments& a, int64_t i) {
  const auto* w = &a.matrices[kMatrices * i];
  const auto bias = [&](Matrix m) -> std::optional<at::Tensor> { return a.biases[kMatrices * i + m]; };
  const std::optional<at::Tensor> norms = a.qk_norms[i];
  DecodeLayer layer{a.norms[2 * i].const_data_ptr(), a.norms[2 * i + 1].const_data_ptr(), nullptr, nullptr, {}};
  if (norms.has_value()) {
    layer.q_norm = data_of(*norms);
    layer.k_norm = layer.q_norm + head_dim * size;
  }
  layer.tensors = {of_layer(a.tail_keys, i), of_layer(a.tail_values, i), {}, {}, a.windows[i]};
  for (size_t s = 0; s < a.prefix_keys.size(); ++s) {
    layer.tensors.keys.push_back(of_layer(a.prefix_keys[s], i));
    layer.tensors.values.push_back(of_layer(a.prefix_values[s], i));
  }
  layers.push_back(std::move(layer));
  add_product(w[kQKV], bias(kQKV), StreamedEpilogue::kStore, inputs, projected, w[kQKV].size(0));
  add_product(w[kOut], bias(kOut), StreamedEpilogue::kAdd, inputs, stream, hidden);
  add_product(w[kGateUp], bias(kGateUp), StreamedEpilogue::kSwiglu, inputs, gated, w[kDown].size(1));
  add_product(w[kDown], bias(kDown), StreamedEpilogue::kAdd, gated, stream, hidden);
}

void DecodePlan::add_product(const at::Tensor& w, const std::optional<at::Tensor>& bias, StreamedEpilogue epilogue,
                             const char* x, char* y, int64_t y_row) {
  const StreamedProduct p{x,
                          rows,
                          w.size(1),
                          w.const_data_ptr(),
                          w.stride(0),
                          w.size(0),
                          bias.has_value() ? bias->const_data_ptr() : nullptr,
                          epilogue,
                          y,
                          y_row};
  const int64_t row_bytes = w.stride(0) * size;
  auto bounds = cut_outputs(p.outputs(), row_bytes * (epilogue == StreamedEpilogue::kSwiglu ? 2 : 1), workers);
  products.push_back({p, std::move(bounds), row_bytes});
}

}  // namespace icae_fast
