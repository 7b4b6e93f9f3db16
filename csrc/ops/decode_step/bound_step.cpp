// decode_step bound to its weights and caches, which are checked and planned once, with several steps per call.
// Through the dispatcher, Python collects and passes some three hundred tensors per token: that, and selecting rows
// of the rotary tables, took 0.5 of SmolLM2's 10 ms per token.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <utility>

#include "common/checks.h"
#include "common/parallel.h"
#include "ops/decode_step/step.h"

namespace icae_fast {
namespace {

// An alias of the same memory. The plan points into that memory, and a parameter may be given other memory at any
// time (`.data =`, `.to(...)`).
at::Tensor pinned(const at::Tensor& t) {
  return at::Tensor(t.unsafeGetTensorImpl()->shallow_copy_and_detach(c10::VariableVersion(0), false));
}

void pin(OptionalTensors& tensors) {
  OptionalTensors aliases;
  for (const std::optional<at::Tensor> t : tensors) {
    aliases.push_back(t.has_value() ? std::optional<at::Tensor>(pinned(*t)) : std::nullopt);
  }
  tensors = aliases;
}

DecodeArguments pinned(DecodeArguments a) {
  a.cos = a.cos.contiguous();
  a.sin = a.sin.contiguous();
  for (auto* t : {&a.embedding, &a.head, &a.cos, &a.sin, &a.tail_keys, &a.tail_values}) *t = pinned(*t);
  for (auto* list : {&a.norms, &a.matrices, &a.prefix_keys, &a.prefix_values}) {
    for (auto& t : *list) t = pinned(t);
  }
  pin(a.biases);
  pin(a.qk_norms);
  return a;
}

class BoundStep : public torch::CustomClassHolder {
 public:
  // cos and sin of the arguments are tables of all positions.
  BoundStep(DecodeArguments a, const std::vector<int64_t>& tail_starts)
      : a_(pinned(std::move(a))), tail_starts_(tail_starts) {
    check_decode_weights(a_);
    check_decode_angles(a_, -1);
  }

  // Return the logits (R, V') of tokens (R,). `tail_lengths` count each row's new token.
  at::Tensor step(const at::Tensor& tokens, const std::vector<int64_t>& tail_lengths) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const std::lock_guard<std::mutex> one_at_a_time(mutex_);
    auto logits = at::empty({rows(), a_.head.size(0)}, a_.embedding.options().dtype(compute_type(a_.embedding)));
    run(tokens.contiguous(), tail_lengths, logits.mutable_data_ptr());
    return logits;
  }

  // Run up to `most` greedy steps and return the argmax tokens (n, R). The steps end early once a row's token is in
  // `eos`, which is returned too. The first `least` steps choose no token of `eos`.
  at::Tensor greedy(const at::Tensor& tokens, const std::vector<int64_t>& tail_lengths, int64_t most,
                    const std::vector<int64_t>& eos, int64_t least) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const std::lock_guard<std::mutex> one_at_a_time(mutex_);
    TORCH_CHECK(most > 0, kDecodeStep, ": at least one step must be asked for, not ", most);
    std::vector<int64_t> lengths = tail_lengths;
    const auto chosen = at::empty({most, rows()}, at::kLong);
    char* const logits = logits_.reserve(rows() * a_.head.size(0) * c10::elementSize(compute_type(a_.embedding)));
    const std::vector<int64_t> nothing;
    int64_t n = 0;
    for (bool ended = false; !ended && n < most; ++n) {
      const GreedyChoice choice{n < least ? eos : nothing, chosen.mutable_data_ptr<int64_t>() + n * rows()};
      run(n == 0 ? tokens.contiguous() : chosen.select(0, n - 1), lengths, logits, &choice);
      ended = std::any_of(choice.chosen, choice.chosen + rows(),
                          [&](int64_t id) { return std::find(eos.begin(), eos.end(), id) != eos.end(); });
      for (auto& length : lengths) ++length;
    }
    return chosen.narrow(0, 0, n);
  }

 private:
  int64_t rows() const { return static_cast<int64_t>(tail_starts_.size()); }

  void run(const at::Tensor& tokens, const std::vector<int64_t>& lengths, void* logits,
           const GreedyChoice* choice = nullptr) {
    check_decode_tokens(tokens);
    auto rows = decode_rows(a_, tokens, tail_starts_, lengths);
    DecodeAngles angles;
    for (const auto& tail : rows.tails) {
      const int64_t position = tail.start + tail.n_keys - 1;
      TORCH_CHECK(position < a_.cos.size(0), kDecodeStep, ": position ", position,
                  " is past the rotary tables, which have ", a_.cos.size(0));
      const int64_t bytes = position * a_.cos.stride(0) * a_.cos.element_size();
      angles.cos.push_back(static_cast<const char*>(a_.cos.const_data_ptr()) + bytes);
      angles.sin.push_back(static_cast<const char*>(a_.sin.const_data_ptr()) + bytes);
    }
    if (plan_ == nullptr || plan_->workers != running_threads()) {
      plan_ = std::make_unique<DecodePlan>(a_, tokens.size(0));
    }
    run_decode_step(*plan_, tokens.const_data_ptr<int64_t>(), std::move(rows), angles, logits, choice);
  }

  const DecodeArguments a_;
  const std::vector<int64_t> tail_starts_;
  std::mutex mutex_;  // guards what follows
  std::unique_ptr<DecodePlan> plan_;
  ReusableBuffer logits_;
};

}  // namespace
}  // namespace icae_fast

TORCH_LIBRARY_FRAGMENT(icae_fast, m) {
  m.class_<icae_fast::BoundStep>("BoundStep")
      .def(torch::init([](at::Tensor embedding, std::vector<at::Tensor> norms, std::vector<at::Tensor> matrices,
                          icae_fast::OptionalTensors biases, icae_fast::OptionalTensors qk_norms, at::Tensor head,
                          at::Tensor cos, at::Tensor sin, at::Tensor tail_keys, at::Tensor tail_values,
                          std::vector<int64_t> tail_starts, std::vector<at::Tensor> prefix_keys,
                          std::vector<at::Tensor> prefix_values, std::vector<int64_t> prefix_rows, int64_t q_heads,
                          int64_t kv_heads, double scale, double eps, std::vector<int64_t> windows) {
        return c10::make_intrusive<icae_fast::BoundStep>(
            icae_fast::DecodeArguments{embedding, norms, matrices, biases, qk_norms, head, cos, sin, tail_keys,
                                       tail_values, prefix_keys, prefix_values, prefix_rows, q_heads, kv_heads,
                                       scale, eps, windows},
            tail_starts);
      }))
      .def("step", &icae_fast::BoundStep::step)
      .def("greedy", &icae_fast::BoundStep::greedy);
}
