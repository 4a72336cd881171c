// Code that the kernels share: registers, threads, products of small matrices, e^x.

#ifndef GRPO_JAX_TILES_H_
#define GRPO_JAX_TILES_H_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using Bools = ffi::Buffer<ffi::PRED>;

namespace {

// A tile of sums in registers has kRows · kWide vectors of kLanes numbers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kWide = 4, kRows = 6;
#elif defined(__AVX2__) || defined(__ARM_NEON)
constexpr int kLanes = 8, kWide = 2, kRows = 4;
#else
#error "neither AVX2 nor NEON"
#endif
typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline int64_t Threads(ffi::ThreadPool pool) {  // XLA says 0 if unknown
  return std::max<int64_t>(1, pool.num_threads());
}

// Runs items 0, 1, … on this thread and on free threads of the pool. It waits only for
// items in progress; a helper that starts late finds no items left.
void Share(ffi::ThreadPool pool, int64_t items, std::function<void(int64_t)> run) {
  struct State {
    std::function<void(int64_t)> run;
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  state->run = std::move(run);
  auto work = [state, items] {
    for (int64_t item; (item = state->next.fetch_add(1)) < items;) {
      state->run(item);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  int64_t helpers = std::min(Threads(pool), items) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work(); });
  work();
  while (state->done.load(std::memory_order_acquire) < items)
    std::this_thread::yield();
}

struct Matrix {
  const float* data;
  int64_t stride;      // from row to row
  int64_t across = 1;  // from column to column; 1 in a second factor
};

// C [M, N vectors] = or += A [M, k] · B [k, N vectors], with the sums in registers.
template <int M, int N, bool kAdd>
inline void Tile(int64_t k, Matrix a, Matrix b, float* c, int64_t stride) {
  Vec sum[M][N] = {};
  if (kAdd)
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j)
        sum[i][j] = *reinterpret_cast<const Vec*>(c + i * stride + j * kLanes);
  for (int64_t p = 0; p < k; ++p, a.data += a.across, b.data += b.stride) {
    if (!kAdd && p % 16 == 0)  // the next tile's rows
      for (int i = 0; i < M; ++i)
        __builtin_prefetch(a.data + (M + i) * a.stride);
    Vec row[N];
    for (int j = 0; j < N; ++j)
      row[j] = *reinterpret_cast<const Vec*>(b.data + j * kLanes);
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j) sum[i][j] += a.data[i * a.stride] * row[j];
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j)
      *reinterpret_cast<Vec*>(c + i * stride + j * kLanes) = sum[i][j];
}

Matrix From(Matrix a, int64_t row, int64_t column) {
  return {a.data + row * a.stride + column * a.across, a.stride, a.across};
}

template <int M, bool kAdd>
void Rows(int64_t n, int64_t k, Matrix a, Matrix b, float* c, int64_t stride) {
  int64_t j = 0;
  for (; j + kWide * kLanes <= n; j += kWide * kLanes)
    Tile<M, kWide, kAdd>(k, a, From(b, 0, j), c + j, stride);
  for (; j + kLanes <= n; j += kLanes)
    Tile<M, 1, kAdd>(k, a, From(b, 0, j), c + j, stride);
  for (; j < n; ++j)
    for (int i = 0; i < M; ++i) {
      float sum = kAdd ? c[i * stride + j] : 0.0f;
      for (int64_t p = 0; p < k; ++p)
        sum += a.data[i * a.stride + p * a.across] * b.data[p * b.stride + j];
      c[i * stride + j] = sum;
    }
}

// C [m, n] = or += A [m, k] · B [k, n].
template <bool kAdd = true>
void Add(int64_t m, int64_t n, int64_t k, Matrix a, Matrix b, float* c,
         int64_t stride) {
  int64_t i = 0;
  auto some = [&](auto rows) {
    constexpr int M = decltype(rows)::value;
    for (; i + M <= m; i += M)
      Rows<M, kAdd>(n, k, From(a, i, 0), b, c + i * stride, stride);
  };
  some(std::integral_constant<int, kRows>());
  some(std::integral_constant<int, 3>());
  some(std::integral_constant<int, 1>());
}

// e^x for x <= 0, with relative error 1e-7; 0 below -87. Compilers vectorise it.
inline float Exp(float x) {
  float y = std::max(x, -87.0f) * 1.44269504f;
  float n = std::floor(y + 0.5f), f = y - n;
  float p = 1.5403530e-4f;  // 2^f = Σ (f ln 2)^i / i!, i up to 6
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &p, 4);
  bits += static_cast<int32_t>(n) << 23;
  std::memcpy(&p, &bits, 4);
  return x < -87.0f ? 0.0f : p;
}

// Returns the greatest of `least` and n numbers.
inline float Greatest(float least, int64_t n, const float* x) {
  Vec some = {};
  some += least;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    Vec here = *reinterpret_cast<const Vec*>(x + j);
    some = here > some ? here : some;
  }
  for (int i = 0; i < kLanes; ++i) least = std::max(least, some[i]);
  for (; j < n; ++j) least = std::max(least, x[j]);
  return least;
}

// Continues one query's running softmax with n scores, which become weights. It updates
// the highest score and the sum of weights, and rescales the output to a new highest.
inline void Soften(int64_t n, float* scores, int64_t width, float* top, float* total,
                   float* out) {
  float now = Greatest(*top, n, scores), sum = 0;
  for (int64_t j = 0; j < n; ++j) {
    scores[j] = Exp(scores[j] - now);
    sum += scores[j];
  }
  float fade = Exp(*top - now);
  *top = now;
  *total = *total * fade + sum;
  for (int64_t h = 0; h < width; ++h) out[h] *= fade;
}

}  // namespace

#endif
