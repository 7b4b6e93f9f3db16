// decode_step on the CPU: a whole token step of the frozen model in one parallel region.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../common/checks.h"
#include "../common/isa.h"
#include "../common/parallel.h"
#include "../common/phases.h"
#include "decode_step.h"

namespace icae_fast {
namespace {

// Phases of a layer at most: four products, RoPE, packing keys, attention.
constexpr int64_t kParts = 7;
// With so few rows each thread turns all queries itself, since handing them over takes longer.
constexpr int64_t kRowsTurnedAlone = 4;
// Bytes of weights that a thread asks for before it makes the vector that they are multiplied with.
constexpr int64_t kAskedBefore = 4 << 10;

// Keys of one layer of a (layers, tokens, heads, head_dim) tensor.
Strided of_layer(const at::Tensor& t, int64_t layer) {
  return {static_cast<const char*>(t.const_data_ptr()) + layer * t.stride(0) * t.element_size(), t.stride(1),
          t.stride(2)};
}

class Step {
 public:
  Step(const DecodeArguments& a, DecodeRows rows)
      : a_(a),
        dtype_(dtype_of(a.embedding, kDecodeStep, "the embedding")),
        unit_(kernels()),
        kernels_(unit_.decode[static_cast<int>(dtype_)]),
        tails_(rows.tails),
        size_(a.embedding.element_size()),
        wide_(dtype_ == Dtype::Double ? 8 : 4),
        workers_(at::get_num_threads()),
        attention_(unit_.attention[static_cast<int>(dtype_)], dtype_, a.q_heads, a.kv_heads, a.head_dim(), a.scale,
                   std::move(rows.segments), std::move(rows.tails), true),
        phases_(a.layers() * kParts + 1) {
    const auto narrow = a.embedding.options(), wide = narrow.dtype(compute_type(a.embedding));
    logits = at::empty({a.rows(), a.head.size(0)}, wide);
    stream_ = at::empty({a.rows(), a.hidden()}, wide);
    projected_ = at::empty({a.rows(), (a.q_heads + 2 * a.kv_heads) * a.head_dim()}, wide);
    turns_alone_ = a.rows() <= kRowsTurnedAlone && attention_.pack_tasks() == 0;
    queries_ = at::empty({turns_alone_ ? workers_ : 1, a.rows() * a.q_heads * a.head_dim()}, narrow);
    int64_t most = 1;
    for (int64_t i = 0; i < a.layers(); ++i) most = at_least(most, matrix(i, kDown).size(1));
    gated_ = at::empty({a.rows(), most}, narrow);
    inputs_ = at::empty({workers_, a.rows() * at_least(a.hidden(), a.q_heads * a.head_dim())}, narrow);
    scratch_ = at::empty({workers_, attention_.scratch_bytes()}, at::kByte);
    for (int64_t i = 0; i < a.layers(); ++i) {
      SharedTensors t{of_layer(a.tail_keys, i), of_layer(a.tail_values, i), {}, {}, a.windows[i]};
      for (size_t s = 0; s < a.prefix_keys.size(); ++s) {
        t.keys.push_back(of_layer(a.prefix_keys[s], i));
        t.values.push_back(of_layer(a.prefix_values[s], i));
      }
      tensors_.push_back(std::move(t));
    }
    for (int64_t i = 0; i < a.layers(); ++i) {
      add_product(matrix(i, kQKV), bias(i, kQKV), After::kStore, inputs_, projected_);
      add_product(matrix(i, kOut), bias(i, kOut), After::kAdd, inputs_, stream_);
      add_product(matrix(i, kGateUp), bias(i, kGateUp), After::kSwiglu, inputs_, gated_);
      add_product(matrix(i, kDown), bias(i, kDown), After::kAdd, gated_, stream_);
    }
    add_product(a.head, {}, After::kStore, inputs_, logits);
  }

  void run() {
    const int64_t* tokens = a_.tokens.const_data_ptr<int64_t>();
    for (int64_t r = 0; r < a_.rows(); ++r) {
      kernels_.widen(at(a_.embedding, tokens[r] * a_.embedding.stride(0)), a_.hidden(), row(stream_, r));
    }
    std::atomic<int64_t> workers{0};
    at::parallel_for(0, workers_, 1, [&](int64_t, int64_t) {
      const int64_t id = workers++;
      Phases::Worker worker(phases_);
      char* const x = row(inputs_, id);
      const Strided q{row(queries_, turns_alone_ ? id : 0), a_.q_heads * a_.head_dim(), a_.head_dim()};
      for (int64_t i = 0; i < a_.layers(); ++i) layer(worker, i, x, q, row(scratch_, id));
      project(worker, products_.size() - 1, x, [&] { norm(a_.norms[2 * a_.layers()], x); });
    });
  }

  at::Tensor logits;

 private:
  const at::Tensor& matrix(int64_t layer, Matrix m) const { return a_.matrices[kMatrices * layer + m]; }
  std::optional<at::Tensor> bias(int64_t layer, Matrix m) const { return a_.biases[kMatrices * layer + m]; }
  static char* at(const at::Tensor& t, int64_t element) {
    return static_cast<char*>(const_cast<void*>(t.const_data_ptr())) + element * t.element_size();
  }
  static char* row(const at::Tensor& t, int64_t r) { return at(t, r * t.stride(0)); }

  // One product of the step, and how its outputs are cut into tasks.
  struct Product {
    StreamedProduct p;
    std::vector<int64_t> bounds;
    int64_t row_bytes;
    int64_t tasks() const { return static_cast<int64_t>(bounds.size()) - 1; }

    // Asks for a task's weights from byte `from` up to byte `to`, which depend on nothing; false if it has none
    // there.
    bool ask_for(int64_t task, int64_t from, int64_t to) const {
      if (task >= tasks()) return false;
      const char* w = static_cast<const char*>(p.w) + bounds[task] * row_bytes;
      const int64_t bytes = std::min(to, (bounds[task + 1] - bounds[task]) * row_bytes);
      for (int64_t i = from; i < bytes; i += 64) {
        __builtin_prefetch(w + i, 0, 2);
        if (p.after == After::kSwiglu) __builtin_prefetch(w + p.outputs() * row_bytes + i, 0, 2);
      }
      return from < bytes;
    }
  };

  // What a thread that waits asks for of the product that comes next, a little at a time.
  class Ahead {
   public:
    explicit Ahead(const Product* next) : next_(next) {}
    bool operator()(int64_t task) {
      if (next_ == nullptr || asked_ >= kMost) return false;
      asked_ += kStep;
      return next_->ask_for(task, asked_ - kStep, asked_);
    }

   private:
    static constexpr int64_t kMost = 64 << 10, kStep = 512;
    const Product* next_;
    int64_t asked_ = 0;
  };

  void add_product(const at::Tensor& w, const std::optional<at::Tensor>& bias, After after, const at::Tensor& x,
                   const at::Tensor& y) {
    StreamedProduct p{row(x, 0),
                      a_.rows(),
                      w.size(1),
                      w.const_data_ptr(),
                      w.stride(0),
                      w.size(0),
                      bias.has_value() ? bias->const_data_ptr() : nullptr,
                      after,
                      row(y, 0),
                      y.stride(0)};
    if (after == After::kSwiglu) p.y_row = p.outputs();
    const int64_t row_bytes = w.stride(0) * size_;
    auto bounds = cut_outputs(p.outputs(), row_bytes * (after == After::kSwiglu ? 2 : 1), workers_);
    products_.push_back({p, std::move(bounds), row_bytes});
  }

  void layer(Phases::Worker& worker, int64_t i, char* x, const Strided& q, char* scratch) {
    const size_t first = i * kMatrices;
    const auto& tensors = tensors_[i];
    const auto nothing = [](int64_t) {};
    const auto attend = [&](int64_t t) { attention_.attend(t, q, tensors, scratch); };
    Ahead rest(nullptr), output(&products_[first + kOut]);
    const auto norm_before = [&] { norm(a_.norms[2 * i], x); };
    if (turns_alone_) {
      project(worker, first + kQKV, x, norm_before,
              [&, key = int64_t{0}](int64_t t) mutable { return attention_.ask_for(t, key++, tensors); });
      worker.run(
          attention_.tasks(), [&](int64_t) { turn_queries(i, q); },
          [&](int64_t t) {
            if (attention_.tail_of(t) >= 0) turn_key(i, attention_.tail_of(t), attention_.kv_head_of(t));
            attend(t);
          },
          output);
    } else {
      project(worker, first + kQKV, x, norm_before, rest);
      worker.run(a_.rows(), nothing, [&](int64_t r) { turn(i, r, q); }, rest);
      if (attention_.pack_tasks() > 0) {
        worker.run(attention_.pack_tasks(), nothing, [&](int64_t t) { attention_.pack(t, tensors); }, rest);
      }
      worker.run(attention_.tasks(), nothing, attend, output);
    }
    project(worker, first + kOut, x, [&] { merge(x); });
    project(worker, first + kGateUp, x, [&] { norm(a_.norms[2 * i + 1], x); });
    project(worker, first + kDown, nullptr, [] {});
  }

  // y (+)= x W^T, where `before` makes x, which is not the product's own where it is given; `idle` as of `run`.
  template <class Before, class Idle>
  void project(Phases::Worker& worker, size_t index, const void* x, const Before& before, const Idle& idle) {
    const Product& product = products_[index];
    StreamedProduct p = product.p;
    if (x != nullptr) p.x = x;
    const auto begin = [&](int64_t task) {
      product.ask_for(task, 0, kAskedBefore);
      before();
    };
    worker.run(
        product.tasks(), begin, [&](int64_t t) { kernels_.product(p, product.bounds[t], product.bounds[t + 1]); },
        idle);
  }
  // The same where another product follows.
  template <class Before>
  void project(Phases::Worker& worker, size_t index, const void* x, const Before& before) {
    project(worker, index, x, before, Ahead(index + 1 < products_.size() ? &products_[index + 1] : nullptr));
  }

  void norm(const at::Tensor& weight, char* x) const {
    for (int64_t r = 0; r < a_.rows(); ++r) {
      kernels_.norm(row(stream_, r), weight.const_data_ptr(), a_.eps, a_.hidden(), x + r * a_.hidden() * size_);
    }
  }

  void merge(char* x) const {
    const int64_t bytes = a_.head_dim() * size_;
    for (int64_t r = 0; r < a_.rows(); ++r, x += a_.q_heads * bytes) {
      attention_.merge(r, r, kernels_.merge, x, bytes);
    }
  }

  // Norm and RoPE of a row's heads; its key and value go into the cache.
  void turn(int64_t i, int64_t r, const Strided& q) const {
    for (int64_t h = 0; h < a_.q_heads; ++h) turn_query(i, r, h, q);
    for (int64_t h = 0; h < a_.kv_heads; ++h) turn_key(i, r, h);
  }
  void turn_queries(int64_t i, const Strided& q) const {
    for (int64_t r = 0; r < a_.rows(); ++r) {
      for (int64_t h = 0; h < a_.q_heads; ++h) turn_query(i, r, h, q);
    }
  }
  void turn_query(int64_t i, int64_t r, int64_t h, const Strided& q) const {
    const std::optional<at::Tensor> norms = a_.qk_norms[i];
    char* const to = static_cast<char*>(const_cast<void*>(q.data)) + (r * q.row + h * q.head) * size_;
    turn_head(r, h, norms.has_value() ? row(*norms, 0) : nullptr, to);
  }
  void turn_key(int64_t i, int64_t r, int64_t h) const {
    const int64_t dim = a_.head_dim(), place = tails_[r].k_begin + tails_[r].n_keys - 1, k = a_.q_heads + h;
    const std::optional<at::Tensor> norms = a_.qk_norms[i];
    turn_head(r, k, norms.has_value() ? row(*norms, 0) + dim * size_ : nullptr, cached(a_.tail_keys, i, place, h));
    kernels_.head(head(r, k + a_.kv_heads), nullptr, 0, nullptr, nullptr, dim, cached(a_.tail_values, i, place, h));
  }
  void turn_head(int64_t r, int64_t h, const char* norm, char* to) const {
    kernels_.head(head(r, h), norm, a_.eps, row(a_.cos, r), row(a_.sin, r), a_.head_dim(), to);
  }
  const char* head(int64_t r, int64_t h) const { return row(projected_, r) + h * a_.head_dim() * wide_; }

  static char* cached(const at::Tensor& t, int64_t layer, int64_t place, int64_t head) {
    return at(t, layer * t.stride(0) + place * t.stride(1) + head * t.stride(2));
  }

  const DecodeArguments& a_;
  const Dtype dtype_;
  const Kernels& unit_;
  const DecodeKernels& kernels_;
  const std::vector<TailRow> tails_;
  const int64_t size_, wide_;  // bytes of an element of the weights, and of the compute type
  const int64_t workers_;
  SharedAttention attention_;
  Phases phases_;
  std::vector<Product> products_;
  bool turns_alone_;
  at::Tensor stream_, projected_, queries_, gated_, inputs_, scratch_;  // the last two a row a worker
  std::vector<SharedTensors> tensors_;
};

}  // namespace

at::Tensor run_decode_step(const DecodeArguments& a, DecodeRows rows) {
  Step step(a, std::move(rows));
  if (a.rows() > 0) step.run();
  return step.logits;
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
  check_decode_rows(a);
  return run_decode_step(a, decode_rows(a, int_values(kDecodeStep, tail_starts, "tail_starts"),
                                        int_values(kDecodeStep, tail_lengths, "tail_lengths")));
}

}  // namespace
}  // namespace icae_fast

TORCH_LIBRARY_IMPL(icae_fast, CPU, m) { m.impl("decode_step", icae_fast::decode_step_cpu); }
