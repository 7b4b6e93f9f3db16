// A whole token step of the frozen model in one parallel region.
#include "ops/decode_step/step.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <utility>

#include "common/phases.h"

namespace icae_fast {
namespace {

// Most phases of a layer: four products, RoPE, packing keys, attention.
constexpr int64_t kPhasesPerLayer = 7;
// Up to this many rows, every thread applies RoPE to all queries itself: waiting for another thread takes longer.
constexpr int64_t kReplicatedRopeRows = 4;
// Bytes of weights that a thread prefetches before it computes the vector that they are multiplied with.
constexpr int64_t kPrefetchBytes = 4 << 10;

class DecodeStep {
 public:
  DecodeStep(DecodePlan& plan, DecodeRows rows, const DecodeAngles& angles, void* logits,
             const GreedyChoice* choice)
      : plan_(plan),
        angles_(angles),
        logits_(logits),
        choice_(choice),
        tails_(rows.tails),
        attention_(plan.unit.attention[static_cast<int>(plan.dtype)], plan.dtype, plan.q_heads, plan.kv_heads,
                   plan.head_dim, plan.scale, std::move(rows.segments), std::move(rows.tails), true),
        replicates_rope_(plan.rows <= kReplicatedRopeRows && attention_.pack_tasks() == 0),
        query_bytes_(plan.rows * plan.q_heads * plan.head_dim * plan.size),
        queries_(plan.queries.reserve((replicates_rope_ ? plan.workers : 1) * query_bytes_)),
        scratch_(plan.scratch.reserve(plan.workers * attention_.scratch_bytes())),
        argmax_(choice == nullptr ? 0 : plan.products.back().tasks() * plan.rows),
        phases_(static_cast<int64_t>(plan.layers.size()) * kPhasesPerLayer + 1, plan.workers) {}

  void run(const int64_t* tokens) {
    for (int64_t r = 0; r < plan_.rows; ++r) {
      plan_.kernels.widen(plan_.embedding + tokens[r] * plan_.embedding_row, plan_.hidden, stream(r));
    }
    std::atomic<int64_t> workers{0};
    at::parallel_for(0, plan_.workers, 1, [&](int64_t, int64_t) {
      const int64_t id = workers++;
      Phases::Worker worker(phases_);
      char* const x = plan_.inputs + id * plan_.inputs_row;
      const Strided q{queries_ + (replicates_rope_ ? id * query_bytes_ : 0), plan_.q_heads * plan_.head_dim,
                      plan_.head_dim};
      for (size_t i = 0; i < plan_.layers.size(); ++i) {
        layer(worker, i, x, q, scratch_ + id * attention_.scratch_bytes());
      }
      head(worker, x);
    });
    if (choice_ != nullptr) reduce_argmax();
  }

 private:
  // Prefetches weights of the next product, a little at a time, while a thread waits for the others.
  class WeightPrefetch {
   public:
    explicit WeightPrefetch(const DecodeProduct* next) : next_(next) {}
    bool operator()(int64_t task) {
      if (next_ == nullptr || prefetched_ >= kMost) return false;
      prefetched_ += kStep;
      return next_->prefetch(task, prefetched_ - kStep, prefetched_);
    }

   private:
    static constexpr int64_t kMost = 64 << 10, kStep = 512;
    const DecodeProduct* next_;
    int64_t prefetched_ = 0;
  };

  void layer(Phases::Worker& worker, size_t i, char* x, const Strided& q, char* scratch) {
    const size_t first = i * kMatrices;
    const auto& layer = plan_.layers[i];
    const auto& tensors = layer.tensors;
    const auto no_preparation = [](int64_t) {};
    const auto attend = [&](int64_t t) { attention_.attend(t, q, tensors, scratch); };
    WeightPrefetch rest(nullptr), output(&plan_.products[first + kOut]);
    const auto norm_before = [&] { norm(layer.attention_norm, x); };
    if (replicates_rope_) {
      project(worker, first + kQKV, x, norm_before,
              [&, key = int64_t{0}](int64_t t) mutable { return attention_.prefetch(t, key++, tensors); });
      worker.run(
          attention_.tasks(), [&](int64_t) { rope_queries(layer, q); },
          [&](int64_t t) {
            if (attention_.tail_of(t) >= 0)
              append_key_value(layer, attention_.tail_of(t), attention_.kv_head_of(t));
            attend(t);
          },
          output);
    } else {
      project(worker, first + kQKV, x, norm_before, rest);
      worker.run(plan_.rows, no_preparation, [&](int64_t r) { rope_row(layer, r, q); }, rest);
      if (attention_.pack_tasks() > 0) {
        worker.run(attention_.pack_tasks(), no_preparation, [&](int64_t t) { attention_.pack(t, tensors); }, rest);
      }
      worker.run(attention_.tasks(), no_preparation, attend, output);
    }
    project(worker, first + kOut, x, [&] { merge(x); });
    project(worker, first + kGateUp, x, [&] { norm(layer.mlp_norm, x); });
    project(worker, first + kDown, nullptr, [] {});
  }

  // y (+)= x W^T. `before` computes x, which replaces the product's own unless null; `idle` is passed to `run`.
  template <class Before, class Idle>
  void project(Phases::Worker& worker, size_t index, const void* x, const Before& before, const Idle& idle) {
    const auto& product = plan_.products[index];
    StreamedProduct p = product.p;
    if (x != nullptr) p.x = x;
    const auto begin = [&](int64_t task) {
      product.prefetch(task, 0, kPrefetchBytes);
      before();
    };
    worker.run(
        product.tasks(), begin,
        [&](int64_t t) { plan_.kernels.product(p, product.bounds[t], product.bounds[t + 1]); }, idle);
  }
  // The same, prefetching the product that follows.
  template <class Before>
  void project(Phases::Worker& worker, size_t index, const void* x, const Before& before) {
    project(worker, index, x, before, WeightPrefetch(&plan_.products[index + 1]));
  }

  // Logits. Each task finds its argmax while its logits are in this core's cache.
  void head(Phases::Worker& worker, char* x) {
    const auto& product = plan_.products.back();
    StreamedProduct p = product.p;
    p.x = x;
    p.y = logits_;
    const auto begin = [&](int64_t task) {
      product.prefetch(task, 0, kPrefetchBytes);
      norm(plan_.last_norm, x);
    };
    const auto compute = [&](int64_t t) {
      plan_.kernels.product(p, product.bounds[t], product.bounds[t + 1]);
      if (choice_ != nullptr) find_argmax(p, t, product.bounds[t], product.bounds[t + 1]);
    };
    worker.run(product.tasks(), begin, compute, WeightPrefetch(nullptr));
  }

  void find_argmax(const StreamedProduct& p, int64_t task, int64_t begin, int64_t end) {
    for (int64_t r = 0; r < plan_.rows; ++r) {
      const int64_t row = r * p.y_row;
      for (const int64_t token : choice_->banned) {
        if (token >= begin && token < end) ban(row + token);
      }
      const char* const from = static_cast<const char*>(logits_) + (row + begin) * plan_.wide;
      argmax_[task * plan_.rows + r] = begin + plan_.kernels.argmax(from, end - begin);
    }
  }
  void ban(int64_t logit) {
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

  // Reduce the tasks' argmaxes: the first of the largest logits, or the first NaN.
  void reduce_argmax() {
    const auto& product = plan_.products.back();
    for (int64_t r = 0; r < plan_.rows; ++r) {
      const int64_t row = r * product.p.y_row;
      int64_t best = 0;
      for (int64_t t = 0; t < product.tasks() && !std::isnan(logit(row + best)); ++t) {
        const int64_t index = argmax_[t * plan_.rows + r];
        if (!(logit(row + index) <= logit(row + best))) best = index;
      }
      choice_->chosen[r] = best;
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

  // Norm and RoPE of a row's queries and keys; its keys and values go into the cache.
  void rope_row(const DecodeLayer& layer, int64_t r, const Strided& q) const {
    for (int64_t h = 0; h < plan_.q_heads; ++h) rope_query(layer, r, h, q);
    for (int64_t h = 0; h < plan_.kv_heads; ++h) append_key_value(layer, r, h);
  }
  void rope_queries(const DecodeLayer& layer, const Strided& q) const {
    for (int64_t r = 0; r < plan_.rows; ++r) {
      for (int64_t h = 0; h < plan_.q_heads; ++h) rope_query(layer, r, h, q);
    }
  }
  void rope_query(const DecodeLayer& layer, int64_t r, int64_t h, const Strided& q) const {
    norm_rope(r, h, layer.q_norm, place(q, r, h));
  }
  void append_key_value(const DecodeLayer& layer, int64_t r, int64_t h) const {
    const int64_t at = tails_[r].k_begin + tails_[r].n_keys - 1, k = plan_.q_heads + h;
    norm_rope(r, k, layer.k_norm, place(layer.tensors.tail_k, at, h));
    plan_.kernels.norm_rope(projected(r, k + plan_.kv_heads), nullptr, 0, nullptr, nullptr, plan_.head_dim,
                            place(layer.tensors.tail_v, at, h));
  }
  void norm_rope(int64_t r, int64_t h, const char* norm, char* to) const {
    plan_.kernels.norm_rope(projected(r, h), norm, plan_.eps, angles_.cos[r], angles_.sin[r], plan_.head_dim, to);
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
  const GreedyChoice* const choice_;
  const std::vector<TailRow> tails_;
  SharedAttention attention_;
  const bool replicates_rope_;
  const int64_t query_bytes_;
  char *const queries_, *const scratch_;
  std::vector<int64_t> argmax_;  // (tasks, rows): index of each task's largest logit
  Phases phases_;
};

}  // namespace

void run_decode_step(DecodePlan& plan, const int64_t* tokens, DecodeRows rows, const DecodeAngles& angles,
                     void* logits, const GreedyChoice* choice) {
  if (plan.rows > 0) DecodeStep(plan, std::move(rows), angles, logits, choice).run(tokens);
}

}  // namespace icae_fast
