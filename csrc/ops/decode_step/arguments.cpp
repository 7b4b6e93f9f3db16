// Checks of decode_step's arguments.
#include "ops/decode_step/arguments.h"

#include "common/checks.h"

namespace icae_fast {
namespace {

constexpr const char* kOp = kDecodeStep;

void check_matrix(const DecodeArguments& a, const at::Tensor& w, int64_t rows, int64_t columns, const char* name) {
  TORCH_CHECK(w.dim() == 2 && w.size(1) == columns && (rows < 0 || w.size(0) == rows) && w.stride(1) == 1, kOp,
              ": ", name, " is ", w.sizes(), "; it has ", columns, " columns and is contiguous");
  check_same_type(w, a.embedding, kOp, name);
}

void check_vector(const DecodeArguments& a, const at::Tensor& t, int64_t n, const char* name) {
  TORCH_CHECK(t.numel() == n && t.is_contiguous(), kOp, ": ", name, " is ", t.sizes(), ", not ", n, " values");
  check_same_type(t, a.embedding, kOp, name);
}

void check_cache(const DecodeArguments& a, const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.dim() == 4 && t.size(0) == a.layers() && t.size(2) == a.kv_heads && t.size(3) == a.head_dim() &&
                  t.stride(3) == 1,
              kOp, ": ", name, " are ", t.sizes(), ", not (", a.layers(), ", tokens, ", a.kv_heads, ", ",
              a.head_dim(), ")");
  check_same_type(t, a.embedding, kOp, name);
}

void check_layers(const DecodeArguments& a) {
  const auto n = static_cast<size_t>(a.layers());
  TORCH_CHECK(a.norms.size() == 2 * n + 1 && a.matrices.size() == kMatrices * n &&
                  a.biases.size() == kMatrices * n && a.qk_norms.size() == n,
              kOp, ": for ", n, " layers there must be ", 2 * n + 1, " norms, ", kMatrices * n,
              " matrices and biases, and ", n, " qk_norms");
  const int64_t d = a.hidden(), q = a.q_heads * a.head_dim(), qkv = q + 2 * a.kv_heads * a.head_dim();
  for (const auto& norm : a.norms) check_vector(a, norm, d, "a norm");
  for (size_t i = 0; i < n; ++i) {
    const auto* w = &a.matrices[kMatrices * i];
    TORCH_CHECK(w[kGateUp].dim() == 2 && w[kGateUp].size(0) % 2 == 0, kOp, ": gate_up is ", w[kGateUp].sizes(),
                "; its rows are those of gate and as many of up");
    check_matrix(a, w[kQKV], qkv, d, "qkv");
    check_matrix(a, w[kOut], d, q, "the output projection");
    check_matrix(a, w[kGateUp], -1, d, "gate_up");
    check_matrix(a, w[kDown], d, w[kGateUp].size(0) / 2, "the down projection");
    for (int64_t m = 0; m < kMatrices; ++m) {
      const std::optional<at::Tensor> bias = a.biases[kMatrices * i + m];
      if (bias.has_value()) check_vector(a, *bias, w[m].size(0), "a bias");
    }
    const std::optional<at::Tensor> norm = a.qk_norms[i];
    if (norm.has_value()) check_vector(a, *norm, 2 * a.head_dim(), "a q/k norm");
  }
  check_matrix(a, a.embedding, -1, d, "the embedding");
  check_matrix(a, a.head, -1, d, "the head");
}

}  // namespace

void check_decode_weights(const DecodeArguments& a) {
  dtype_of(a.embedding, kOp, "the embedding");
  TORCH_CHECK(a.embedding.dim() == 2 && a.tail_keys.dim() == 4, kOp,
              ": the embedding is (vocabulary, d) and tail_keys ", "(layers, tokens, kv_heads, head_dim)");
  check_sizes(kOp, a.q_heads, a.kv_heads, a.head_dim());
  TORCH_CHECK(a.q_heads % a.kv_heads == 0 && a.head_dim() % 2 == 0, kOp, ": ", a.q_heads, " query heads, ",
              a.kv_heads, " key/value heads, head_dim ", a.head_dim());
  check_layers(a);
  check_cache(a, a.tail_keys, "tail_keys");
  check_cache(a, a.tail_values, "tail_values");
  TORCH_CHECK(a.prefix_keys.size() == a.prefix_values.size(), kOp, ": there are ", a.prefix_keys.size(),
              " prefix_keys and ", a.prefix_values.size(), " prefix_values");
  for (size_t s = 0; s < a.prefix_keys.size(); ++s) {
    check_cache(a, a.prefix_keys[s], "prefix_keys");
    check_cache(a, a.prefix_values[s], "prefix_values");
    TORCH_CHECK(a.prefix_keys[s].size(1) == a.prefix_values[s].size(1), kOp, ": prefix ", s, " has ",
                a.prefix_keys[s].size(1), " keys and ", a.prefix_values[s].size(1), " values");
  }
}

void check_decode_tokens(const at::Tensor& tokens) {
  TORCH_CHECK(tokens.dim() == 1 && tokens.scalar_type() == at::kLong, kOp, ": tokens is 1-d int64, not ",
              tokens.sizes(), " ", tokens.scalar_type());
}

void check_decode_angles(const DecodeArguments& a, int64_t positions) {
  for (const auto* t : {&a.cos, &a.sin}) {
    TORCH_CHECK(t->dim() == 2 && (positions < 0 || t->size(0) == positions) && t->size(1) == a.head_dim() / 2 &&
                    t->is_contiguous() && t->scalar_type() == compute_type(a.embedding),
                kOp, ": cos and sin are (", positions < 0 ? "positions" : std::to_string(positions), ", ",
                a.head_dim() / 2, ") ", compute_type(a.embedding), ", contiguous, not ", t->sizes(), " ",
                t->scalar_type());
  }
  TORCH_CHECK(a.cos.size(0) == a.sin.size(0), kOp, ": cos has ", a.cos.size(0), " rows, and sin ", a.sin.size(0));
}

DecodeRows decode_rows(const DecodeArguments& a, const at::Tensor& tokens, const std::vector<int64_t>& starts,
                       const std::vector<int64_t>& lengths) {
  const auto rows = static_cast<size_t>(tokens.size(0));
  TORCH_CHECK(starts.size() == rows && lengths.size() == rows, kOp, ": tail_starts and tail_lengths have ",
              starts.size(), " and ", lengths.size(), " values for ", rows, " tokens");
  DecodeRows found;
  const int64_t* ids = tokens.const_data_ptr<int64_t>();
  for (size_t r = 0; r < rows; ++r) {
    TORCH_CHECK(lengths[r] >= 1 && is_within(starts[r], lengths[r], a.tail_keys.size(1)), kOp, ": row ", r,
                " has a tail of ", lengths[r], " keys from ", starts[r], ", of ", a.tail_keys.size(1));
    TORCH_CHECK(ids[r] >= 0 && ids[r] < a.embedding.size(0), kOp, ": token ", ids[r], " of row ", r,
                " is not in the vocabulary of ", a.embedding.size(0));
    found.tails.push_back({static_cast<int64_t>(r), 1, starts[r], lengths[r], 0});
  }
  std::vector<int64_t> segment_lengths;
  for (const auto& keys : a.prefix_keys) segment_lengths.push_back(keys.size(1));
  found.segments = place_segments(kOp, segment_lengths, a.prefix_rows, found.tails);
  return found;
}

}  // namespace icae_fast
