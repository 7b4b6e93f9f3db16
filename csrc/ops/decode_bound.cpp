// decode_step with all that stays the same from step to step looked at once, and several steps in one call. Through
// the dispatcher some three hundred tensors go by for each token, and Python collects them: that, and choosing rows
// of the rotary tables, took 0.5 of SmolLM2's 10 ms a token.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <limits>

#include "../common/checks.h"
#include "../common/isa.h"
#include "decode_step.h"

namespace icae_fast {
namespace {

class BoundStep : public torch::CustomClassHolder {
 public:
  // As the op's arguments, but that cos and sin are tables of all positions.
  BoundStep(at::Tensor embedding, std::vector<at::Tensor> norms, std::vector<at::Tensor> matrices,
            OptionalTensors biases, OptionalTensors qk_norms, at::Tensor head, at::Tensor cos, at::Tensor sin,
            at::Tensor tail_keys, at::Tensor tail_values, const std::vector<int64_t>& tail_starts,
            std::vector<at::Tensor> prefix_keys, std::vector<at::Tensor> prefix_values,
            std::vector<int64_t> prefix_rows, int64_t q_heads, int64_t kv_heads, double scale, double eps,
            std::vector<int64_t> windows)
      : embedding_(std::move(embedding)),
        norms_(std::move(norms)),
        matrices_(std::move(matrices)),
        biases_(std::move(biases)),
        qk_norms_(std::move(qk_norms)),
        head_(std::move(head)),
        cos_(std::move(cos)),
        sin_(std::move(sin)),
        tail_keys_(std::move(tail_keys)),
        tail_values_(std::move(tail_values)),
        tail_starts_(tail_starts.begin(), tail_starts.end()),
        prefix_keys_(std::move(prefix_keys)),
        prefix_values_(std::move(prefix_values)),
        prefix_rows_(std::move(prefix_rows)),
        q_heads_(q_heads),
        kv_heads_(kv_heads),
        scale_(scale),
        eps_(eps),
        windows_(std::move(windows)) {
    check_decode_weights(arguments(cos_, cos_, sin_));
  }

  // (R, V') logits for tokens (R,), whose rows' tails have these lengths with them.
  at::Tensor step(const at::Tensor& tokens, const std::vector<int64_t>& tail_lengths) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return logits(tokens.contiguous(), {tail_lengths.begin(), tail_lengths.end()});
  }

  // (n, R): the tokens that n steps give, each row going on with its most likely one, the first of equals. The
  // first `least` steps give none of `eos`. n is `most`, or less where a row's token is one of `eos`: that step is
  // the last.
  at::Tensor greedy(const at::Tensor& tokens, const std::vector<int64_t>& tail_lengths, int64_t most,
                    const std::vector<int64_t>& eos, int64_t least) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    TORCH_CHECK(most > 0, kDecodeStep, ": at least one step must be asked for, not ", most);
    std::vector<int32_t> lengths(tail_lengths.begin(), tail_lengths.end());
    std::vector<at::Tensor> chosen;
    for (bool ended = false; !ended && static_cast<int64_t>(chosen.size()) < most;) {
      const auto scores = logits(chosen.empty() ? tokens.contiguous() : chosen.back(), lengths);
      if (static_cast<int64_t>(chosen.size()) < least) forbid(scores, eos);
      chosen.push_back(largest(scores));
      const auto* ids = chosen.back().const_data_ptr<int64_t>();
      ended = std::any_of(ids, ids + scores.size(0),
                          [&](int64_t id) { return std::find(eos.begin(), eos.end(), id) != eos.end(); });
      for (auto& length : lengths) ++length;
    }
    return at::stack(chosen);
  }

 private:
  static void forbid(const at::Tensor& scores, const std::vector<int64_t>& ids) {
    for (const int64_t id : ids) {
      if (id >= 0 && id < scores.size(1)) scores.select(1, id).fill_(-std::numeric_limits<double>::infinity());
    }
  }

  // (R,) where the largest of each row's scores are.
  at::Tensor largest(const at::Tensor& scores) const {
    const auto& kernel = kernels().decode[static_cast<int>(dtype_of(embedding_, kDecodeStep, "the embedding"))];
    const auto places = at::empty({scores.size(0)}, at::kLong);
    for (int64_t r = 0; r < scores.size(0); ++r) {
      const void* const row =
          static_cast<const char*>(scores.const_data_ptr()) + r * scores.stride(0) * scores.element_size();
      places.mutable_data_ptr<int64_t>()[r] = kernel.largest(row, scores.size(1));
    }
    return places;
  }

  at::Tensor logits(const at::Tensor& tokens, const std::vector<int32_t>& lengths) {
    auto rows = decode_rows(arguments(tokens, cos_, sin_), tail_starts_, lengths);
    std::vector<int64_t> positions;
    for (const auto& tail : rows.tails) {
      positions.push_back(tail.start + tail.n_keys - 1);
      TORCH_CHECK(positions.back() < cos_.size(0), kDecodeStep, ": position ", positions.back(),
                  " is past the rotary tables, which have ", cos_.size(0));
    }
    const auto index = at::tensor(positions, at::kLong);
    const auto cos = cos_.index_select(0, index), sin = sin_.index_select(0, index);
    const auto a = arguments(tokens, cos, sin);
    check_decode_rows(a);
    return run_decode_step(a, std::move(rows));
  }

  DecodeArguments arguments(const at::Tensor& tokens, const at::Tensor& cos, const at::Tensor& sin) {
    return {tokens,   embedding_, head_,      cos,          sin,          norms_,         matrices_,
            biases_,  qk_norms_,  tail_keys_, tail_values_, prefix_keys_, prefix_values_, prefix_rows_,
            q_heads_, kv_heads_,  scale_,     eps_,         windows_};
  }

  at::Tensor embedding_;
  std::vector<at::Tensor> norms_, matrices_;
  OptionalTensors biases_, qk_norms_;
  at::Tensor head_, cos_, sin_, tail_keys_, tail_values_;
  std::vector<int32_t> tail_starts_;
  std::vector<at::Tensor> prefix_keys_, prefix_values_;
  std::vector<int64_t> prefix_rows_;
  int64_t q_heads_, kv_heads_;
  double scale_, eps_;
  std::vector<int64_t> windows_;
};

}  // namespace
}  // namespace icae_fast

TORCH_LIBRARY_FRAGMENT(icae_fast, m) {
  m.class_<icae_fast::BoundStep>("BoundStep")
      .def(torch::init<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>, icae_fast::OptionalTensors,
                       icae_fast::OptionalTensors, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                       std::vector<int64_t>, std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<int64_t>,
                       int64_t, int64_t, double, double, std::vector<int64_t>>())
      .def("step", &icae_fast::BoundStep::step)
      .def("greedy", &icae_fast::BoundStep::greedy);
}
