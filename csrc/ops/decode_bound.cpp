// decode_step with all that stays the same from step to step looked at once, and several steps in one call. Through
// the dispatcher some three hundred tensors go by for each token, and Python collects them: that, and choosing rows
// of the rotary tables, took 0.5 of SmolLM2's 10 ms a token.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <utility>

#include "../common/checks.h"
#include "decode_plan.h"

namespace icae_fast {
namespace {

// The same memory, kept for as long as this lives: the plan has pointers into it, and a parameter can be given
// other memory at any time (`.data =`, `.to(...)`).
at::Tensor kept(const at::Tensor& t) {
  return at::Tensor(t.unsafeGetTensorImpl()->shallow_copy_and_detach(c10::VariableVersion(0), false));
}

std::vector<at::Tensor> kept(std::vector<at::Tensor> tensors) {
  for (auto& t : tensors) t = kept(t);
  return tensors;
}

OptionalTensors kept(const OptionalTensors& tensors) {
  OptionalTensors all;
  for (const std::optional<at::Tensor> t : tensors) {
    all.push_back(t.has_value() ? std::optional<at::Tensor>(kept(*t)) : std::nullopt);
  }
  return all;
}

class BoundStep : public torch::CustomClassHolder {
 public:
  // As the op's arguments, but that cos and sin are tables of all positions.
  BoundStep(const at::Tensor& embedding, std::vector<at::Tensor> norms, std::vector<at::Tensor> matrices,
            const OptionalTensors& biases, const OptionalTensors& qk_norms, const at::Tensor& head,
            const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& tail_keys,
            const at::Tensor& tail_values, const std::vector<int64_t>& tail_starts,
            std::vector<at::Tensor> prefix_keys, std::vector<at::Tensor> prefix_values,
            std::vector<int64_t> prefix_rows, int64_t q_heads, int64_t kv_heads, double scale, double eps,
            std::vector<int64_t> windows)
      : embedding_(kept(embedding)),
        norms_(kept(std::move(norms))),
        matrices_(kept(std::move(matrices))),
        biases_(kept(biases)),
        qk_norms_(kept(qk_norms)),
        head_(kept(head)),
        cos_(kept(cos.contiguous())),
        sin_(kept(sin.contiguous())),
        tail_keys_(kept(tail_keys)),
        tail_values_(kept(tail_values)),
        tail_starts_(tail_starts.begin(), tail_starts.end()),
        prefix_keys_(kept(std::move(prefix_keys))),
        prefix_values_(kept(std::move(prefix_values))),
        prefix_rows_(std::move(prefix_rows)),
        q_heads_(q_heads),
        kv_heads_(kv_heads),
        scale_(scale),
        eps_(eps),
        windows_(std::move(windows)) {
    const auto a = arguments(cos_);
    check_decode_weights(a);
    check_decode_angles(a, -1);
  }

  // (R, V') logits for tokens (R,), whose rows' tails have these lengths with them.
  at::Tensor step(const at::Tensor& tokens, const std::vector<int64_t>& tail_lengths) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const std::lock_guard<std::mutex> one_at_a_time(mutex_);
    auto logits = at::empty({rows(), head_.size(0)}, embedding_.options().dtype(compute_type(embedding_)));
    read(tokens.contiguous(), {tail_lengths.begin(), tail_lengths.end()}, logits.mutable_data_ptr());
    return logits;
  }

  // (n, R): the tokens that n steps give, each row going on with its most likely one, the first of equals. The
  // first `least` steps give none of `eos`. n is `most`, or less where a row's token is one of `eos`: that step is
  // the last.
  at::Tensor greedy(const at::Tensor& tokens, const std::vector<int64_t>& tail_lengths, int64_t most,
                    const std::vector<int64_t>& eos, int64_t least) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const std::lock_guard<std::mutex> one_at_a_time(mutex_);
    TORCH_CHECK(most > 0, kDecodeStep, ": at least one step must be asked for, not ", most);
    std::vector<int32_t> lengths(tail_lengths.begin(), tail_lengths.end());
    const auto chosen = at::empty({most, rows()}, at::kLong);
    char* const logits = logits_.of(rows() * head_.size(0) * c10::elementSize(compute_type(embedding_)));
    const std::vector<int64_t> nothing;
    int64_t n = 0;
    for (bool ended = false; !ended && n < most; ++n) {
      const DecodeChoice choice{n < least ? eos : nothing, chosen.mutable_data_ptr<int64_t>() + n * rows()};
      read(n == 0 ? tokens.contiguous() : chosen.select(0, n - 1), lengths, logits, &choice);
      ended = std::any_of(choice.places, choice.places + rows(),
                          [&](int64_t id) { return std::find(eos.begin(), eos.end(), id) != eos.end(); });
      for (auto& length : lengths) ++length;
    }
    return chosen.narrow(0, 0, n);
  }

 private:
  int64_t rows() const { return static_cast<int64_t>(tail_starts_.size()); }

  void read(const at::Tensor& tokens, const std::vector<int32_t>& lengths, void* logits,
            const DecodeChoice* choice = nullptr) {
    const auto a = arguments(tokens);
    check_decode_tokens(a);
    auto rows = decode_rows(a, tail_starts_, lengths);
    DecodeAngles angles;
    for (const auto& tail : rows.tails) {
      const int64_t position = tail.start + tail.n_keys - 1;
      TORCH_CHECK(position < cos_.size(0), kDecodeStep, ": position ", position,
                  " is past the rotary tables, which have ", cos_.size(0));
      const int64_t bytes = position * cos_.stride(0) * cos_.element_size();
      angles.cos.push_back(static_cast<const char*>(cos_.const_data_ptr()) + bytes);
      angles.sin.push_back(static_cast<const char*>(sin_.const_data_ptr()) + bytes);
    }
    if (plan_ == nullptr || plan_->workers != at::get_num_threads()) plan_ = std::make_unique<DecodePlan>(a);
    run_decode_step(*plan_, tokens.const_data_ptr<int64_t>(), std::move(rows), angles, logits, choice);
  }

  DecodeArguments arguments(const at::Tensor& tokens) {
    return {tokens,   embedding_, head_,      cos_,         sin_,         norms_,         matrices_,
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
  std::mutex mutex_;  // of what follows
  std::unique_ptr<DecodePlan> plan_;
  Room logits_;
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
