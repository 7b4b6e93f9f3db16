// A 64-bit fingerprint of the bytes of tensors, at memory speed. icae_fast/ops/fingerprint/__init__.py says what it
// is for and what it must guarantee.
#include <ATen/core/Tensor.h>
#include <ATen/ops/contiguous_ops.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <bit>
#include <cstring>
#include <vector>

#include "common/parallel.h"

namespace icae_fast {
namespace {

constexpr uint64_t kFactor = 0x9E3779B97F4A7C15;  // odd, so that multiplication is invertible
constexpr int kLanes = 8;                         // hides the latency of a step: xor, multiply, rotate
constexpr int64_t kChunk = 128 << 10;

// A bijection in h and in x, so that one changed word changes every later h. The rotation brings the high bits down
// again: without it, two flipped signs in one lane would cancel.
inline uint64_t step(uint64_t h, uint64_t x) { return std::rotl((h ^ x) * kFactor, 29); }

uint64_t load(const char* data) {
  uint64_t x;
  std::memcpy(&x, data, sizeof x);
  return x;
}

uint64_t hash_chunk(const char* data, int64_t bytes) {
  constexpr int64_t kStep = kLanes * sizeof(uint64_t);
  uint64_t h[kLanes];
  for (int i = 0; i < kLanes; ++i) h[i] = step(bytes, i);
  for (; bytes >= kStep; data += kStep, bytes -= kStep) {
    for (int i = 0; i < kLanes; ++i) h[i] = step(h[i], load(data + i * sizeof(uint64_t)));
  }
  char rest[kStep] = {};
  std::memcpy(rest, data, bytes);
  uint64_t all = 0;
  for (int i = 0; i < kLanes; ++i) all = step(all, step(h[i], load(rest + i * sizeof(uint64_t))));
  return all;
}

struct Chunk {
  const char* data;
  int64_t bytes;
};

int64_t fingerprint_cpu(at::TensorList tensors) {
  std::vector<at::Tensor> rows;  // keeps contiguous copies alive
  std::vector<Chunk> chunks;
  uint64_t all = 0;
  for (const auto& t : tensors) {
    TORCH_CHECK(t.device().is_cpu(), "fingerprint: a tensor is on ", t.device(), " and another one on the CPU");
    rows.push_back(t.contiguous());
    all = step(all, t.nbytes());
    const auto* data = static_cast<const char*>(rows.back().const_data_ptr());
    for (int64_t at = 0, end = t.nbytes(); at < end; at += kChunk)
      chunks.push_back({data + at, std::min(kChunk, end - at)});
  }
  std::vector<uint64_t> hashes(chunks.size());
  for_each_task(chunks.size(),
                [&](int64_t i, int64_t) { hashes[i] = hash_chunk(chunks[i].data, chunks[i].bytes); });
  for (const uint64_t h : hashes) all = step(all, h);
  return static_cast<int64_t>(all);
}

}  // namespace
}  // namespace icae_fast

TORCH_LIBRARY_IMPL(icae_fast, CPU, m) { m.impl("fingerprint", icae_fast::fingerprint_cpu); }
