// decode_step on the CPU: a whole token step of the frozen model in one parallel region.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <utility>

#include "../common/checks.h"
#include "../common/phases.h"
#include "decode_plan.h"

namespace icae_fast {
namespace {

// Phases of a layer at most: four products, RoPE, packing keys, attention.
constexpr int64_t kParts = 7;
// With so few rows each thread turns all queries itself, since handing them over takes longer.
constexpr int64_t kRowsTurnedAlone = 4;
// Bytes of weights that a thread asks for before it makes the vector that they are multiplied with.
constexpr int64_t kAskedBefore = 4 << 10;

class Step {
 public:
  Step(DecodePlan& plan, DecodeRows rows, const DecodeAngles& angles, void* logits, const DecodeChoice* choice)
      : plan_(plan),
        angles_(angles),
        logits_(logits),
        choice_(choice),
        tails_(rows.tails),
        attention_(plan.unit.attention[static_cast<int>(plan.dtype)], plan.dtype, plan.q_heads, plan.kv_heads,
                   plan.head_dim, plan.scale, std::move(rows.segments), std::move(rows.tails), true),
        turns_alone_(plan.rows <= kRowsTurnedAlone && attention_.pack_tasks() == 0),
        query_bytes_(plan.rows * plan.q_heads * plan.head_dim * plan.size),
        queries_(plan.queries.of((turns_alone_ ? plan.workers : 1) * query_bytes_)),
        scratch_(plan.scratch.of(plan.workers * attention_.scratch_bytes())),
        found_(choice == nullptr ? 0 : plan.products.back().tasks() * plan.rows),
        phases_(static_cast<int64_t>(plan.layers.size()) * kParts + 1) {}

  void run(const int64_t* tokens) {
    for (int64_t r = 0; r < plan_.rows; ++r) {
      plan_.kernels.widen(plan_.embedding + tokens[r] * plan_.embedding_row, plan_.hidden, stream(r));
    }
    std::atomic<int64_t> workers{0};
    at::parallel_for(0, plan_.workers, 1, [&](int64_t, int64_t) {
      const int64_t id = workers++;
      Phases::Worker worker(phases_);
      char* const x = plan_.inputs + id * plan_.inputs_row;
      const Strided q{queries_ + (turns_alone_ ? id * query_bytes_ : 0), plan_.q_heads * plan_.head_dim,
                      plan_.head_dim};
      for (size_t i = 0; i < plan_.layers.size(); ++i) {
        layer(worker, i, x, q, scratch_ + id * attention_.scratch_bytes());
      }
      head(worker, x);
    });
    if (choice_ != nullptr) choose();
  }

 private:
  // What a thread that waits asks for of the product that comes next, a little at a time.
  class Ahead {
   public:
    explicit Ahead(const DecodeProduct* next) : next_(next) {}
    bool operator()(int64_t task) {
      if (next_ == nullptr || asked_ >= kMost) return false;
      asked_ += kStep;
      return next_->ask_for(task, asked_ - kStep, asked_);
    }

   private:
    static constexpr int64_t kMost = 64 << 10, kStep = 512;
    const DecodeProduct* next_;
    int64_t asked_ = 0;
  };

  void layer(Phases::Worker& worker, size_t i, char* x, const Strided& q, char* scratch) {
    const size_t first = i * kMatrices;
    const auto& layer = plan_.layers[i];
    const auto& tensors = layer.tensors;
    const auto nothing = [](int64_t) {};
    const auto attend = [&](int64_t t) { attention_.attend(t, q, tensors, scratch); };
    Ahead rest(nullptr), output(&plan_.products[first + kOut]);
    const auto norm_before = [&] { norm(layer.attention_norm, x); };
    if (turns_alone_) {
      project(worker, first + kQKV, x, norm_before,
              [&, key = int64_t{0}](int64_t t) mutable { return attention_.ask_for(t, key++, tensors); });
      worker.run(
          attention_.tasks(), [&](int64_t) { turn_queries(layer, q); },
          [&](int64_t t) {
            if (attention_.tail_of(t) >= 0) turn_key(layer, attention_.tail_of(t), attention_.kv_head_of(t));
            attend(t);
          },
          output);
    } else {
      project(worker, first + kQKV, x, norm_before, rest);
      worker.run(plan_.rows, nothing, [&](int64_t r) { turn(layer, r, q); }, rest);
      if (attention_.pack_tasks() > 0) {
        worker.run(attention_.pack_tasks(), nothing, [&](int64_t t) { attention_.pack(t, tensors); }, rest);
      }
      worker.run(attention_.tasks(), nothing, attend, output);
    }
    project(worker, first + kOut, x, [&] { merge(x); });
    project(worker, first + kGateUp, x, [&] { norm(layer.mlp_norm, x); });
    project(worker, first + kDown, nullptr, [] {});
  }

  // y (+)= x W^T, where `before` makes x, which is not the product's own where it is given; `idle` as of `run`.
  template <class Before, class Idle>
  void project(Phases::Worker& worker, size_t index, const void* x, const Before& before, const Idle& idle) {
    const auto& product = plan_.products[index];
    StreamedProduct p = product.p;
    if (x != nullptr) p.x = x;
    const auto begin = [&](int64_t task) {
      product.ask_for(task, 0, kAskedBefore);
      before();
    };
    worker.run(
        product.tasks(), begin,
        [&](int64_t t) { plan_.kernels.product(p, product.bounds[t], product.bounds[t + 1]); }, idle);
  }
  // The same where another product follows.
  template <class Before>
  void project(Phases::Worker& worker, size_t index, const void* x, const Before& before) {
    project(worker, index, x, before, Ahead(&plan_.products[index + 1]));
  }

  // The logits; each task's largest are looked for while they are in this core's cache.
  void head(Phases::Worker& worker, char* x) {
    const auto& product = plan_.products.back();
    StreamedProduct p = product.p;
    p.x = x;
    p.y = logits_;
    const auto begin = [&](int64_t task) {
      product.ask_for(task, 0, kAskedBefore);
      norm(plan_.last_norm, x);
    };
    const auto some = [&](int64_t t) {
      plan_.kernels.product(p, product.bounds[t], product.bounds[t + 1]);
      if (choice_ != nullptr) find_largest(p, t, product.bounds[t], product.bounds[t + 1]);
    };
    worker.run(product.tasks(), begin, some, Ahead(nullptr));
  }

  void find_largest(const StreamedProduct& p, int64_t task, int64_t begin, int64_t end) {
    for (int64_t r = 0; r < plan_.rows; ++r) {
      const int64_t row = r * p.y_row;
      for (const int64_t token : choice_->never) {
        if (token >= begin && token < end) forbid(row + token);
      }
      const char* const from = static_cast<const char*>(logits_) + (row + begin) * plan_.wide;
      found_[task * plan_.rows + r] = begin + plan_.kernels.largest(from, end - begin);
    }
  }
  void forbid(int64_t logit) {
    constexpr double least = -std::numeric_limits<double>::infinity();
    if (plan_.dtype == Dtype::Double) {
      static_cast<double*>(logits_)[logit] = least;
    } else {
      static_cast<float*>(logits_)[logit] = static_cast<float>(least);
    }
  }
  double logit(int64_t i) const {
    return plan_.dtype == Dtype::Double ? static_cast<const double*>(logits_)[i]
                                        : static_cast<const float*>(logits_)[i];
  }

  // Of the tasks' largest logits the first that is largest, or NaN.
  void choose() {
    const auto& product = plan_.products.back();
    for (int64_t r = 0; r < plan_.rows; ++r) {
      const int64_t row = r * product.p.y_row;
      int64_t best = 0;
      for (int64_t t = 0; t < product.tasks() && !std::isnan(logit(row + best)); ++t) {
        const int64_t place = found_[t * plan_.rows + r];
        if (!(logit(row + place) <= logit(row + best))) best = place;
      }
      choice_->places[r] = best;
    }
  }

  void norm(const void* weight, char* x) const {
    for (int64_t r = 0; r < plan_.rows; ++r, x += plan_.hidden * plan_.size) {
      plan_.kernels.norm(stream(r), weight, plan_.eps, plan_.hidden, x);
    }
  }

  void merge(char* x) const {
    const int64_t bytes = plan_.head_dim * plan_.size;
    for (int64_t r = 0; r < plan_.rows; ++r, x += plan_.q_heads * bytes) {
      attention_.merge(r, r, plan_.kernels.merge, x, bytes);
    }
  }

  // Norm and RoPE of a row's heads; its key and value go into the cache.
  void turn(const DecodeLayer& layer, int64_t r, const Strided& q) const {
    for (int64_t h = 0; h < plan_.q_heads; ++h) turn_query(layer, r, h, q);
    for (int64_t h = 0; h < plan_.kv_heads; ++h) turn_key(layer, r, h);
  }
  void turn_queries(const DecodeLayer& layer, const Strided& q) const {
    for (int64_t r = 0; r < plan_.rows; ++r) {
      for (int64_t h = 0; h < plan_.q_heads; ++h) turn_query(layer, r, h, q);
    }
  }
  void turn_query(const DecodeLayer& layer, int64_t r, int64_t h, const Strided& q) const {
    turn_head(r, h, layer.q_norm, place(q, r, h));
  }
  void turn_key(const DecodeLayer& layer, int64_t r, int64_t h) const {
    const int64_t at = tails_[r].k_begin + tails_[r].n_keys - 1, k = plan_.q_heads + h;
    turn_head(r, k, layer.k_norm, place(layer.tensors.tail_k, at, h));
    plan_.kernels.head(projected(r, k + plan_.kv_heads), nullptr, 0, nullptr, nullptr, plan_.head_dim,
                       place(layer.tensors.tail_v, at, h));
  }
  void turn_head(int64_t r, int64_t h, const char* norm, char* to) const {
    plan_.kernels.head(projected(r, h), norm, plan_.eps, angles_.cos[r], angles_.sin[r], plan_.head_dim, to);
  }
  char* place(const Strided& x, int64_t row, int64_t head) const {
    return static_cast<char*>(const_cast<void*>(x.data)) + (row * x.row + head * x.head) * plan_.size;
  }
  char* stream(int64_t r) const { return plan_.stream + r * plan_.hidden * plan_.wide; }
  const char* projected(int64_t r, int64_t h) const {
    return plan_.projected + (r * (plan_.q_heads + 2 * plan_.kv_heads) + h) * plan_.head_dim * plan_.wide;
  }

  DecodePlan& plan_;
  const DecodeAngles& angles_;
  void* const logits_;
  const DecodeChoice* const choice_;
  const std::vector<TailRow> tails_;
  SharedAttention attention_;
  const bool turns_alone_;
  const int64_t query_bytes_;
  char *const queries_, *const scratch_;
  std::vector<int64_t> found_;  // (tasks, rows): each task's largest logits
  Phases phases_;
};

}  // namespace

void run_decode_step(DecodePlan& plan, const int64_t* tokens, DecodeRows rows, const DecodeAngles& angles,
                     void* logits, const DecodeChoice* choice) {
  if (plan.rows > 0) Step(plan, std::move(rows), angles, logits, choice).run(tokens);
}

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
  const DecodeArguments a{dense,        embedding,   head,          cos,         sin,
                          norms,        matrices,    biases,        qk_norms,    tail_keys,
                          tail_values,  prefix_keys, prefix_values, prefix_rows, num_q_heads,
                          num_kv_heads, scale,       norm_eps,      windows};
  check_decode_weights(a);
  check_decode_tokens(a);
  check_decode_angles(a, a.rows());
  auto rows = decode_rows(a, int_values(kDecodeStep, tail_starts, "tail_starts"),
                          int_values(kDecodeStep, tail_lengths, "tail_lengths"));
  DecodeAngles angles;
  for (int64_t r = 0; r < a.rows(); ++r) {
    angles.cos.push_back(cos.select(0, r).const_data_ptr());
    angles.sin.push_back(sin.select(0, r).const_data_ptr());
  }
  auto logits = at::empty({a.rows(), head.size(0)}, embedding.options().dtype(compute_type(embedding)));
  DecodePlan plan(a);
  run_decode_step(plan, dense.const_data_ptr<int64_t>(), std::move(rows), angles, logits.mutable_data_ptr());
  return logits;
}

}  // namespace
}  // namespace icae_fast

TORCH_LIBRARY_IMPL(icae_fast, CPU, m) { m.impl("decode_step", icae_fast::decode_step_cpu); }
