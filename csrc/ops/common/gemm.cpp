#include "ops/common/gemm.h"

#include <ATen/ops/empty.h>

#include "common/isa.h"
#include "common/parallel.h"

namespace icae_fast {
namespace {

// With fewer rows, packing the weights costs more than the faster product saves.
constexpr int64_t kFewestRows = 16;
// Packed panels of one task fit the second-level cache, 1 MiB or more on CPUs with AVX512-BF16.
constexpr int64_t kPanelBytes = 384 << 10;
// The same for CPUs that widen, which have 2 MiB.
constexpr int64_t kWidePanelBytes = 1 << 20;

// A multiple of kTileRows and of the 16 rows of an AMX tile.
constexpr int64_t kChunkStep = 48;

struct GemmTask {
  const Gemm* gemm;
  int64_t panel_begin, panel_end, row_begin, row_end;
};

int64_t inner_size(const Gemm& g) { return g.terms[0].k + (g.n_terms == 2 ? g.terms[1].k : 0); }

int64_t most_panels(const Gemm& g) {
  const int64_t elements = at_least(1, inner_size(g) * 2 * kHalf);
  if (kernels().gemm.widens) {
    return at_least(1,
                    at_most(kMostWidePanels, kWidePanelBytes / (elements * static_cast<int64_t>(sizeof(float)))));
  }
  return at_least(1, at_most(kMostPanels, kPanelBytes / (elements * 2)));
}

// Cut for units that widen: each task widens its own rows of x, so it gets many panels and few rows, with ever
// fewer rows towards the end.
std::vector<GemmTask> cut_rows(const std::vector<Gemm>& gemms) {
  constexpr int64_t kFewestRowsOfTask = 4 * kChunkStep;
  const auto work = [](const Gemm& g, int64_t panels, int64_t rows) { return panels * rows * inner_size(g); };
  int64_t left = 0;
  for (const auto& g : gemms) left += work(g, g.panels(), g.rows);
  std::vector<GemmTask> tasks;
  for (const auto& g : gemms) {
    const int64_t own = g.panels(), groups = ceil_div(own, most_panels(g));
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t p = i * own / groups, end = (i + 1) * own / groups;
      for (int64_t r = 0, n; r < g.rows; r += n) {
        const int64_t share = left / (2 * at::get_num_threads()) / at_least(1, work(g, end - p, 1));
        n = at_most(g.rows - r, at_least(kFewestRowsOfTask, round_up(share, kChunkStep)));
        tasks.push_back({&g, p, end, r, r + n});
        left -= work(g, end - p, n);
      }
    }
  }
  return tasks;
}

// Cut into tasks of up to `group` panels and `chunks` pieces of the rows. Tasks near the end are smaller, so that a
// delayed thread does not keep the others waiting for a whole task.
std::vector<GemmTask> cut(const std::vector<Gemm>& gemms, int64_t group, int64_t chunks, int64_t panels) {
  const int64_t single = panels - 4 * at::get_num_threads();  // from this panel on, tasks have one panel
  std::vector<GemmTask> tasks;
  int64_t before = 0;
  for (const auto& g : gemms) {
    const int64_t own = g.panels(), most = at_most(group, most_panels(g));
    const int64_t rows = round_up(ceil_div(g.rows, chunks), kChunkStep);
    for (int64_t p = 0, n; p < own; p += n, before += n) {
      n = at_least(1, at_most(at_most(most, own - p), single - before));
      for (int64_t r = 0; r < g.rows; r += rows) {
        tasks.push_back({&g, p, p + n, r, at_most(g.rows, r + rows)});
      }
    }
  }
  return tasks;
}

std::vector<GemmTask> plan(const std::vector<Gemm>& gemms) {
  constexpr int64_t kTasksPerThread = 3, kFewestChunkRows = 8 * kTileRows;
  const int64_t threads = at::get_num_threads();
  int64_t panels = 0, rows = 0;
  for (const auto& g : gemms) {
    panels += g.panels();
    rows = at_least(rows, g.rows);
  }
  const int64_t wanted = ceil_div(kTasksPerThread * threads, at_least(1, panels));
  const int64_t chunks = at_least(1, at_most(wanted, rows / kFewestChunkRows));
  return cut(gemms, at_most(kMostPanels, at_least(1, panels / (kTasksPerThread * threads))), chunks, panels);
}

}  // namespace

bool uses_gemm(const at::Tensor& x) {
  return kernels().gemm.run != nullptr && x.scalar_type() == at::kBFloat16 && x.size(1) > 0 &&
         x.size(0) >= kFewestRows;
}

at::Tensor unaliased_rows(const at::Tensor& x) {
  if (!rows_alias(x.stride(0))) return x;
  auto copy = at::empty({x.size(0), x.size(1) + kRowGap}, x.options()).narrow(1, 0, x.size(1));
  return copy.copy_(x);
}

Gemm gemm_of(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, at::Tensor& y) {
  Gemm g{};
  add_term(g, x, weight);
  g.rows = x.size(0);
  g.columns = weight.size(0);
  g.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
  g.y = y.mutable_data_ptr();
  g.y_row = y.stride(0);
  g.factor = 1;
  return g;
}

void add_term(Gemm& g, const at::Tensor& x, const at::Tensor& weight) {
  const bool x_transposed = x.stride(1) != 1, w_transposed = weight.stride(1) != 1;
  g.terms[g.n_terms++] = {x.const_data_ptr(),
                          x.stride(x_transposed),
                          weight.const_data_ptr(),
                          weight.stride(w_transposed),
                          x.size(1),
                          x_transposed,
                          w_transposed};
}

void run_gemms(const std::vector<Gemm>& gemms) {
  const auto& kernel = kernels().gemm;
  const auto tasks = kernel.widens ? cut_rows(gemms) : plan(gemms);
  if (tasks.empty()) return;
  int64_t bytes = 0;
  for (const auto& g : gemms) bytes = at_least(bytes, kernel.scratch_bytes(g, most_panels(g)));
  bytes = round_up(bytes, 64);
  const auto scratch = at::empty({max_workers(tasks.size()) * bytes}, at::kByte);
  char* const base = static_cast<char*>(scratch.mutable_data_ptr());
  for_each_task(tasks.size(), [&](int64_t i, int64_t worker) {
    const auto& t = tasks[i];
    kernel.run(*t.gemm, t.panel_begin, t.panel_end, t.row_begin, t.row_end, base + worker * bytes);
  });
}

}  // namespace icae_fast
