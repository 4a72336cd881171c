// Block attention and its gradient on a CPU.
//
// The loops are those of ../xla.py, with its axes: X blocks of all rows, K key heads,
// M = G·t queries of a block, s keys of a block, H head width. Pairs of blocks come in
// the order of `mask.Pairs`, in which pairs of one block of queries are adjacent.
//
// GrpoBlocksForward. In: q [X, K, M, H], transposed keys [X, K, H, s], values
// [X, K, s, H]; the pairs' rows, queries, keys [most] and their count; real, segments,
// positions [B, T]. Out: the attention output [X, K, M, H], log Σ e^score [X, K, M].
//
// GrpoBlocksBackward. In: q, keys [X, K, s, H], transposed keys, transposed values;
// log Σ e^score; ∂L/∂out, and Σ_h ∂L/∂out · out [X, K, M]; then as above. Out: the
// gradients of q, keys and values.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "tiles.h"

namespace {

constexpr int64_t kMost = 128;  // the most positions of a block
constexpr int64_t kParts = 4;   // of a key head's pairs; fixed so that sums are too
constexpr int64_t kStrip = 4 * kRows;  // queries that are trimmed together

// Some queries of a pair of blocks, and the range of keys that they may attend to.
struct Strip {
  int64_t first, rows, low, keys;
};

// The strips of a pair, for one of the G query heads that share a key head.
struct Strips {
  int64_t count = 0;
  Strip strips[kMost / kStrip + 1];

  const Strip* begin() const { return strips; }
  const Strip* end() const { return strips + count; }
};

struct Blocks {
  int64_t heads, queries, size, width, per_row, count;  // K, M, t = s, H
  int32_t far, of_prompt;  // the window, mask.PROMPT
  const int32_t *row, *mine, *theirs, *segments, *positions;
  const bool* real;

  int64_t Query(int64_t n) const { return row[n] * per_row + mine[n]; }
  int64_t Key(int64_t n) const { return row[n] * per_row + theirs[n]; }

  // Writes the mask of pair n: 0 where `AttentionMask.allowed` is true, else -1e30.
  // Returns the strips that may attend to any key.
  Strips Seen(int64_t n, float* seen) const {
    int64_t start = row[n] * per_row * size;
    int64_t first = start + mine[n] * size, other = start + theirs[n] * size;
    int32_t before = mine[n] == theirs[n] ? 0 : size;  // keys before t, or all
    int32_t of[kMost], prompt[kMost];  // a key's segment; its prompt or -1
    for (int64_t s = 0; s < size; ++s) {
      int32_t x = segments[other + s];
      of[s] = real[other + s] ? x : -1;
      prompt[s] = of[s] > 0 && x % of_prompt == 0 ? x / of_prompt : -1;
    }
    for (int64_t t = 0; t < size; ++t) {
      int32_t segment = segments[first + t], position = positions[first + t];
      int32_t group = segment / of_prompt, last = before + t;
      const int32_t* at = positions + other;
      float* out = seen + t * size;
      for (int32_t s = 0; s < static_cast<int32_t>(size); ++s) {
        int32_t may = (s < last) & ((of[s] == segment) | (prompt[s] == group)) &
                      (position - at[s] < far);
        out[s] = may ? 0.0f : -1e30f;
      }
      if (mine[n] == theirs[n]) out[t] = 0.0f;
    }
    Strips found;
    for (int64_t first = 0; first < size; first += kStrip) {
      int64_t rows = std::min(kStrip, size - first), low = size, high = 0;
      for (int64_t t = first; t < first + rows; ++t) {
        const float* sees = seen + t * size;
        int64_t a = 0, b = size;
        while (a < low && sees[a] < 0) ++a;
        while (b > high && sees[b - 1] < 0) --b;
        low = std::min(low, a), high = std::max(high, b);
      }
      if (low >= high) continue;
      low -= low % kLanes;  // whole vectors
      high = std::min(size, (high + kLanes - 1) / kLanes * kLanes);
      found.strips[found.count++] = {first, rows, low, high - low};
    }
    return found;
  }

  // Returns the first pair of a part. A block of queries is never split between parts.
  int64_t Begin(int64_t part) const {
    int64_t n = count * part / kParts;
    while (n > 0 && n < count && Query(n) == Query(n - 1)) ++n;
    return n;
  }

  // Computes the scores of a strip, whose queries start at row `first` of [M, s].
  void Scores(const Strip& of, int64_t first, const float* scaled, const float* keys,
              const float* seen, float* scores) const {
    for (int64_t t = 0; t < of.rows; ++t)
      std::fill_n(scores + t * size, of.keys, 0.0f);
    Add(of.rows, of.keys, width, {scaled + first * width, width}, {keys + of.low, size},
        scores, size);
    // The mask is selected, not added, since a masked key may be NaN.
    for (int64_t t = 0; t < of.rows; ++t) {
      const float* sees = seen + (of.first + t) * size + of.low;
      for (int64_t s = 0; s < of.keys; ++s)
        scores[t * size + s] = sees[s] < 0 ? -1e30f : scores[t * size + s];
    }
  }

  // Divides the queries by √H.
  void Scale(const float* q, float* scaled) const {
    float scale = 1.0f / std::sqrt(static_cast<float>(width));
    for (int64_t i = 0; i < queries * width; ++i) scaled[i] = q[i] * scale;
  }
};

// Reads the operands that both calls share, in the order given at the top.
ffi::ErrorOr<Blocks> Read(Floats q, ffi::RemainingArgs rest, int64_t size,
                          int64_t window, int64_t of_prompt) {
  auto row = rest.get<Ints>(0), mine = rest.get<Ints>(1), theirs = rest.get<Ints>(2);
  auto count = rest.get<Ints>(3), segments = rest.get<Ints>(5);
  auto positions = rest.get<Ints>(6);
  auto real = rest.get<Bools>(4);
  if (!row || !mine || !theirs || !count || !real || !segments || !positions)
    return ffi::Unexpected(ffi::Error::InvalidArgument("pairs or rows are missing"));
  auto shape = q.dimensions();
  int64_t rows = real->dimensions()[0];
  if (size > kMost || shape[2] % size || shape[0] % rows)
    return ffi::Unexpected(ffi::Error::InvalidArgument("blocks do not fit"));
  Blocks of{};
  of.heads = shape[1], of.queries = shape[2], of.size = size, of.width = shape[3];
  of.per_row = shape[0] / rows, of.count = *count->typed_data();
  of.far = window ? window : INT32_MAX, of.of_prompt = of_prompt;
  of.row = row->typed_data(), of.mine = mine->typed_data();
  of.theirs = theirs->typed_data(), of.segments = segments->typed_data();
  of.positions = positions->typed_data(), of.real = real->typed_data();
  return of;
}

ffi::Error Forward(ffi::ThreadPool pool, Floats q, Floats keys, Floats values,
                   ffi::RemainingArgs rest, ffi::ResultBuffer<ffi::F32> result,
                   ffi::ResultBuffer<ffi::F32> log_total, int64_t size, int64_t window,
                   int64_t of_prompt) {
  auto read = Read(q, rest, size, window, of_prompt);
  if (!read.has_value()) return read.error();
  const Blocks of = *read;
  int64_t m = of.queries, width = of.width;
  std::vector<int64_t> starts;  // first pair of each block of queries
  for (int64_t n = 0; n < of.count; ++n)
    if (n == 0 || of.Query(n) != of.Query(n - 1)) starts.push_back(n);
  int64_t items = starts.size() * of.heads;
  starts.push_back(of.count);
  const float *all_q = q.typed_data(), *k = keys.typed_data(), *v = values.typed_data();
  float *all_out = result->typed_data(), *all_logs = log_total->typed_data();
  Share(pool, items, [&](int64_t item) {
    int64_t begin = starts[item / of.heads], end = starts[item / of.heads + 1];
    int64_t head = item % of.heads, block = of.Query(begin) * of.heads + head;
    std::vector<float> memory(m * (width + 1) + (kStrip + size) * size);
    float* scaled = memory.data();
    float* total = scaled + m * width;
    float* scores = total + m;
    float* seen = scores + kStrip * size;
    float *top = all_logs + block * m, *out = all_out + block * m * width;
    of.Scale(all_q + block * m * width, scaled);
    std::fill_n(top, m, -1e30f);
    std::fill_n(out, m * width, 0.0f);
    for (int64_t n = begin; n < end; ++n) {
      int64_t other = (of.Key(n) * of.heads + head) * size * width;
      Strips strips = of.Seen(n, seen);
      for (int64_t g = 0; g < m; g += size)
        for (const Strip& strip : strips) {
          int64_t first = g + strip.first;
          of.Scores(strip, first, scaled, k + other, seen, scores);
          for (int64_t t = 0; t < strip.rows; ++t)
            Soften(strip.keys, scores + t * size, width, top + first + t,
                   total + first + t, out + (first + t) * width);
          Add(strip.rows, width, strip.keys, {scores, size},
              {v + other + strip.low * width, width}, out + first * width, width);
        }
    }
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t h = 0; h < width; ++h) out[i * width + h] /= total[i];
      top[i] += std::log(total[i]);
    }
  });
  return ffi::Error::Success();
}

ffi::Error Backward(ffi::ThreadPool pool, Floats q, Floats keys, Floats turned_keys,
                    Floats turned_values, Floats log_total, Floats d_out, Floats inner,
                    ffi::RemainingArgs rest, ffi::ResultBuffer<ffi::F32> d_q,
                    ffi::ResultBuffer<ffi::F32> d_keys,
                    ffi::ResultBuffer<ffi::F32> d_values, int64_t size, int64_t window,
                    int64_t of_prompt) {
  auto read = Read(q, rest, size, window, of_prompt);
  if (!read.has_value()) return read.error();
  const Blocks of = *read;
  int64_t m = of.queries, width = of.width, block_size = size * width;
  int64_t blocks = q.dimensions()[0], all = keys.element_count();
  const float *all_q = q.typed_data(), *k = keys.typed_data();
  const float *kt = turned_keys.typed_data(), *vt = turned_values.typed_data();
  const float *logs = log_total.typed_data(), *d = d_out.typed_data();
  const float* in = inner.typed_data();
  float *dq = d_q->typed_data(), *dk = d_keys->typed_data();
  float* dv = d_values->typed_data();
  std::vector<float> others((kParts - 1) * 2 * all);  // sums of parts 1, 2, …
  float scale = 1.0f / std::sqrt(static_cast<float>(width));
  Share(pool, kParts * of.heads, [&](int64_t item) {
    int64_t head = item % of.heads, part = item / of.heads;
    float *to_k = part ? &others[(part - 1) * 2 * all] : dk;
    float *to_v = part ? to_k + all : dv;
    if (part == 0)
      for (int64_t x = 0; x < blocks; ++x) {
        int64_t at = (x * of.heads + head) * block_size;
        std::fill_n(to_k + at, block_size, 0.0f);
        std::fill_n(to_v + at, block_size, 0.0f);
      }
    std::vector<float> memory(m * width + (2 * kStrip + size) * size);
    float* scaled = memory.data();
    float* weights = scaled + m * width;
    float* d_scores = weights + kStrip * size;
    float* seen = d_scores + kStrip * size;
    int64_t begin = of.Begin(part), end = of.Begin(part + 1);
    for (int64_t n = begin; n < end; ++n) {
      int64_t block = of.Query(n) * of.heads + head, at = block * m * width;
      int64_t other = (of.Key(n) * of.heads + head) * block_size;
      if (n == begin || of.Query(n) != of.Query(n - 1)) {
        of.Scale(all_q + at, scaled);
        std::fill_n(dq + at, m * width, 0.0f);
      }
      Strips strips = of.Seen(n, seen);
      for (int64_t g = 0; g < m; g += size)
        for (const Strip& strip : strips) {
          int64_t first = g + strip.first, rows = strip.rows, keys = strip.keys;
          int64_t here = at + first * width, there = other + strip.low * width;
          of.Scores(strip, first, scaled, kt + other, seen, weights);
          for (int64_t t = 0; t < rows; ++t) std::fill_n(d_scores + t * size, keys, 0.0f);
          Add(rows, keys, width, {d + here, width}, {vt + other + strip.low, size},
              d_scores, size);
          for (int64_t t = 0; t < rows; ++t) {
            float log = logs[block * m + first + t], mean = in[block * m + first + t];
            const float* sees = seen + (strip.first + t) * size + strip.low;
            for (int64_t s = 0; s < keys; ++s) {
              float& weight = weights[t * size + s];
              float& d_score = d_scores[t * size + s];
              weight = sees[s] < 0 ? 0.0f : Exp(weight - log);
              d_score = sees[s] < 0 ? 0.0f : weight * (d_score - mean) * scale;
            }
          }
          Add(keys, width, rows, {weights, 1, size}, {d + here, width}, to_v + there,
              width);
          Add(keys, width, rows, {d_scores, 1, size}, {all_q + here, width},
              to_k + there, width);
          Add(rows, width, keys, {d_scores, size}, {k + there, width}, dq + here,
              width);
        }
    }
  });
  Share(pool, blocks, [&](int64_t x) {
    int64_t first = x * of.heads * block_size, last = first + of.heads * block_size;
    for (int64_t part = 1; part < kParts; ++part) {
      const float* more = &others[(part - 1) * 2 * all];
      for (int64_t i = first; i < last; ++i) dk[i] += more[i];
      for (int64_t i = first; i < last; ++i) dv[i] += more[all + i];
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GrpoBlocksForward, Forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .RemainingArgs()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("size")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("prompt"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(GrpoBlocksBackward, Backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .RemainingArgs()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("size")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("prompt"));
