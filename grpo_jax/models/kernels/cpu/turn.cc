// A decode step on a CPU: its matrix products and its attention.
//
// Both are calls of XLA's foreign function interface; __init__.py compiles this file.
//
// GrpoFewRows: C [F, W] = A [F, D] · B [D, W], for W a multiple of 16. Weights are read
// from memory once, while others are multiplied, and are not packed.
//
// GrpoDecodeAttention: the attention of generation/kv_cache.py, with its axes. In:
// q [W, K·G, H]; the step's keys and values [W, K, H]; their column in the last block;
// prompts' keys [P, K, H, S] and values [P, K, S, H]; lengths [P]; prompt,
// position, live [W]; then, for each block of columns, places [W, B], keys [W, K, H, B]
// and values [W, K, B, H]. Out: [W, K·G, H], 0 where a slot is not live; and the last
// block, updated in place with the keys and values of the live slots.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "tiles.h"

namespace {

constexpr int64_t kTogether = 8;  // the most rows of a prompt in one matrix product
constexpr int64_t kChunk = 128;   // positions of a prompt at a time

template <int M, int N>
void SomeRows(int64_t rows, int64_t k, Matrix a, Matrix b, float* c, int64_t stride) {
  int64_t i = 0;
  for (; i + M <= rows; i += M)
    Tile<M, N, false>(k, From(a, i, 0), b, c + i * stride, stride);
  for (; i < rows; ++i)
    Tile<1, N, false>(k, From(a, i, 0), b, c + i * stride, stride);
}

ffi::Error FewRows(ffi::ThreadPool pool, Floats a, Floats b,
                   ffi::ResultBuffer<ffi::F32> c) {
  int64_t rows = a.dimensions()[0], k = a.dimensions()[1], n = b.dimensions()[1];
  Matrix weights{a.typed_data(), k}, x{b.typed_data(), n};
  float* out = c->typed_data();
  if (n % 16) return ffi::Error::InvalidArgument("columns are no multiple of 16");
  constexpr int64_t kStep = 2 * kRows;
  int64_t least = rows / (4 * Threads(pool));  // at least four items per thread
  int64_t each = std::max<int64_t>(least / kStep, 1) * kStep;
  Share(pool, (rows + each - 1) / each, [=](int64_t item) {
    int64_t last = std::min(rows, (item + 1) * each);
    for (int64_t i = item * each; i < last; i += kStep) {
      int64_t count = std::min(kStep, last - i), j = 0;
      auto some = [&](auto rows_of, auto wide) {
        constexpr int M = decltype(rows_of)::value, N = decltype(wide)::value;
        for (; j + N * kLanes <= n; j += N * kLanes)
          SomeRows<M, N>(count, k, From(weights, i, 0), From(x, 0, j),
                         out + i * n + j, n);
      };
      some(std::integral_constant<int, kRows>(), std::integral_constant<int, kWide>());
      some(std::integral_constant<int, kStep>(),
           std::integral_constant<int, kWide / 2>());
      some(std::integral_constant<int, kStep>(), std::integral_constant<int, 1>());
    }
  });
  return ffi::Error::Success();
}

// The running softmax of some queries: highest score, sum of weights, weighted values.
struct Parts {
  float *top, *total, *out;
  Parts From(int64_t row, int64_t width) const {
    return {top + row, total + row, out + row * width};
  }
};

// One slot's share of the cache: what it wrote into one block of columns.
struct Block {
  const int32_t* places;
  const float *keys, *values;
};

struct Attention {
  const float *q, *new_keys, *new_values, *prompt_keys, *prompt_values;
  float *last_keys, *last_values;
  const int32_t *lengths, *prompt, *position;
  std::vector<Block> blocks;
  int64_t column, kv_heads, groups, width, prompt_size, block, window;
  float* result;
  std::vector<int32_t> slots;   // the live ones, ordered by prompt
  std::vector<int64_t> starts;  // first row of each group of rows with one prompt

  // Scratch memory of one item.
  struct Memory {
    std::vector<float> floats;
    float *queries, *scores;
    Parts parts;
    Memory(int64_t rows, int64_t width, int64_t columns)
        : floats(rows * (2 * width + columns + 2)) {
      float* at = floats.data();
      auto take = [&](int64_t count) { return std::exchange(at, at + count); };
      queries = take(rows * width);
      scores = take(rows * columns);
      parts = {take(rows), take(rows), take(rows * width)};
      std::fill_n(parts.top, rows, -1e30f);
    }
  };

  // Computes one group of rows with the same prompt, for one key head.
  void Item(int64_t group, int64_t head) const {
    const int32_t* mine = &slots[starts[group]];
    int64_t rows = starts[group + 1] - starts[group], size = groups * width;
    Memory memory(rows * groups, width, std::max(kChunk, block));
    float scale = 1.0f / std::sqrt(static_cast<float>(width));
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = q + (mine[r] * kv_heads + head) * size;
      for (int64_t i = 0; i < size; ++i) memory.queries[r * size + i] = from[i] * scale;
    }
    // With a window, the rows attend to different parts of their prompt.
    int64_t together = window ? 1 : rows;
    for (int64_t r = 0; r < rows; r += together)
      Prompt(mine[r], head, r * groups, together * groups, memory);
    for (int64_t r = 0; r < rows; ++r) {
      Write(mine[r], head);
      for (const Block& b : blocks) Own(b, mine[r], head, r * groups, memory);
      Parts own = memory.parts.From(r * groups, width);
      float* to = result + (mine[r] * kv_heads + head) * size;
      for (int64_t i = 0; i < size; ++i) to[i] = own.out[i] / own.total[i / width];
    }
  }

  void Write(int32_t slot, int64_t head) const {
    int64_t of = slot * kv_heads + head;
    for (int64_t h = 0; h < width; ++h)
      last_keys[(of * width + h) * block + column] = new_keys[of * width + h];
    std::memcpy(last_values + (of * block + column) * width, new_values + of * width,
                width * sizeof(float));
  }

  int64_t Oldest(int32_t slot) const {
    return window ? std::max<int64_t>(position[slot] - window + 1, 0) : 0;
  }

  void Prompt(int32_t slot, int64_t head, int64_t first, int64_t m,
              const Memory& memory) const {
    int64_t of = (prompt[slot] * kv_heads + head) * width * prompt_size;
    int64_t length = lengths[prompt[slot]], oldest = Oldest(slot);
    for (int64_t at = 0; at < length; at += kChunk) {
      int64_t count = std::min(kChunk, length - at);
      if (at + count <= oldest) continue;
      Look(first, m, count, {prompt_keys + of + at, prompt_size},
           {prompt_values + of + at * width, width}, memory,
           [=](int64_t j) { return at + j >= oldest; });
    }
  }

  void Own(const Block& b, int32_t slot, int64_t head, int64_t first,
           const Memory& memory) const {
    const int32_t* places = b.places + slot * block;
    int64_t oldest = Oldest(slot), begin = block, end = 0;
    for (int64_t j = 0; j < block; ++j)
      if (places[j] >= oldest) begin = std::min(begin, j), end = j + 1;
    if (end == 0) return;
    begin = begin / kLanes * kLanes;
    end = std::min((end + kLanes - 1) / kLanes * kLanes, block);
    int64_t of = (slot * kv_heads + head) * block * width;
    Look(first, groups, end - begin, {b.keys + of + begin, block},
         {b.values + of + begin * width, width}, memory,
         [=](int64_t j) { return places[begin + j] >= oldest; });
  }

  // Adds n more keys and values to the running softmax of the queries from `first` on,
  // those that `may` allows.
  template <typename May>
  void Look(int64_t first, int64_t m, int64_t n, Matrix keys, Matrix values,
            const Memory& memory, May may) const {
    Parts parts = memory.parts.From(first, width);
    float* scores = memory.scores;
    Add<false>(m, n, width, {memory.queries + first * width, width}, keys, scores, n);
    for (int64_t j = 0; j < n; ++j)
      if (!may(j))
        for (int64_t i = 0; i < m; ++i) scores[i * n + j] = -1e30f;
    for (int64_t i = 0; i < m; ++i)
      Soften(n, scores + i * n, width, parts.top + i, parts.total + i,
             parts.out + i * width);
    Add(m, width, n, {scores, n}, values, parts.out, width);
  }
};

ffi::Error DecodeAttention(ffi::ThreadPool pool, Floats q, Floats new_keys,
                           Floats new_values, Ints column, Floats prompt_keys,
                           Floats prompt_values, Ints lengths, Ints prompt,
                           Ints position, Bools live,
                           ffi::RemainingArgs columns,
                           ffi::ResultBuffer<ffi::F32> result,
                           ffi::ResultBuffer<ffi::F32> last_keys,
                           ffi::ResultBuffer<ffi::F32> last_values, int64_t window) {
  auto shape = prompt_keys.dimensions();
  Attention of{};
  of.q = q.typed_data();
  of.new_keys = new_keys.typed_data();
  of.new_values = new_values.typed_data();
  of.last_keys = last_keys->typed_data();
  of.last_values = last_values->typed_data();
  of.column = *column.typed_data();
  of.prompt_keys = prompt_keys.typed_data();
  of.prompt_values = prompt_values.typed_data();
  of.lengths = lengths.typed_data();
  of.prompt = prompt.typed_data();
  of.position = position.typed_data();
  of.result = result->typed_data();
  of.kv_heads = shape[1], of.width = shape[2], of.prompt_size = shape[3];
  of.groups = q.dimensions()[1] / of.kv_heads;
  of.window = window;
  for (size_t i = 0; i + 2 < columns.size(); i += 3) {
    auto places = columns.get<Ints>(i);
    auto keys = columns.get<Floats>(i + 1), values = columns.get<Floats>(i + 2);
    if (!places || !keys || !values)
      return ffi::Error::InvalidArgument("a block is int32, float32, float32");
    of.block = places->dimensions()[1];
    of.blocks.push_back(
        {places->typed_data(), keys->typed_data(), values->typed_data()});
  }
  const Block& last = of.blocks.back();
  if (last.keys != of.last_keys || last.values != of.last_values)
    return ffi::Error::Internal("the last block was copied");
  int64_t size = q.dimensions()[1] * of.width;
  for (int32_t i = 0; i < q.dimensions()[0]; ++i) {
    if (live.typed_data()[i]) of.slots.push_back(i);
    else std::fill_n(of.result + i * size, size, 0.0f);
  }
  std::stable_sort(of.slots.begin(), of.slots.end(), [&](int32_t a, int32_t b) {
    return of.prompt[a] < of.prompt[b];
  });
  int64_t count = of.slots.size();
  for (int64_t i = 0; i < count; ++i)
    if (i == 0 || of.prompt[of.slots[i]] != of.prompt[of.slots[i - 1]] ||
        i - of.starts.back() == kTogether)
      of.starts.push_back(i);
  int64_t items = of.starts.size() * of.kv_heads;
  of.starts.push_back(count);
  Share(pool, items, [&](int64_t item) {
    of.Item(item / of.kv_heads, item % of.kv_heads);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GrpoFewRows, FewRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(GrpoDecodeAttention, DecodeAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Bools>()
                                  .RemainingArgs()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("window"));
