// Products of float32 matrices on a CPU's bfloat16 tiles (AMX of Intel's Xeons).
//
// A float32 has 24 significant bits and a bfloat16 has 8, so x = x₁ + x₂ + x₃ exactly.
// Of the nine products of a's and b's parts, six are computed: a₂b₃, a₃b₂ and a₃b₃ are
// below float32's rounding. Sums are float32. Six products of tiles are still about
// twice as fast as one AVX-512 product. The tiles treat numbers below 1.2e-38 as 0, so
// numbers below about 1e-33 lose parts. Numbers above 3.39e38 and infinities give NaN.
//
// GrpoProduct: C [M, N] = Σ_k A [M, k] · B [k, N]. In: A and B in float32, each with k
// as its last axis ("along") or its first. Out: C, and scratch memory.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tiles.h"

#if defined(__AMXBF16__) && !defined(__AMX_BF16__)  // its name in older clangs
#define __AMX_BF16__ 1
#endif
#if defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t kSide = 16;             // rows or columns of a tile
constexpr int64_t kDepth = 32;            // k in a tile
constexpr int64_t kPart = kSide * kDepth; // bfloat16s of a tile
constexpr int64_t kTile = 3 * kPart;      // a tile's three parts, contiguous
constexpr int64_t kPair = 2 * kSide;      // side of the square in registers
constexpr int64_t kBlock = 32;            // tiles of k that are multiplied at a time
constexpr int64_t kStrip = 288;           // tiles of A that a thread packs at a time

// Splits 16 numbers x and 16 numbers y into parts; those of x are in the lower halves.
// Parts are rounded, not truncated, so remainders have either sign.
inline void Split(__m512 x, __m512 y, __m512i parts[3]) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int i = 0; i < 3; ++i) {
    __m512i a = _mm512_castps_si512(x), b = _mm512_castps_si512(y);
    if (i < 2) a = _mm512_add_epi32(a, half), b = _mm512_add_epi32(b, half);
    parts[i] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(a, 16), b, high, 0xF8);
    if (i == 2) break;
    x = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(a, high)));
    y = _mm512_sub_ps(y, _mm512_castsi512_ps(_mm512_and_si512(b, high)));
    asm("" : "+v"(x), "+v"(y));  // keeps this exact difference from being rearranged
  }
}

// Transposes 16 × 16 pairs.
inline void Turn(__m512i* x) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      y[i + j] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0x88);
      y[i + j + 4] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    x[j] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0x88);
    x[j + 8] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0xdd);
  }
}

// Loads the first `count` of 16 numbers, and 0 for the rest.
inline __m512 Load(const float* x, int64_t count) {
  if (count >= 16) return _mm512_loadu_ps(x);
  if (count <= 0) return _mm512_setzero_ps();
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), x);
}

// A factor of a product: `size` rows (of A) or columns (of B), `depth` of k.
struct Factor {
  const float* data;
  int64_t size, depth;
  bool along;  // k is the last axis

  // Packs `count` tiles that are adjacent in memory (in k if `along`, else in rows).
  // The first is at row `at` and at k. Tiles are written `step` apart, with 0 beyond
  // the edges. A tile pairs k with k + 16. With `across`, row j of a tile holds pair j,
  // as a second factor needs; otherwise its rows are the matrix's. Memory is read in
  // order, which is three times as fast as tile by tile.
  void Pack(int64_t at, int64_t k, int64_t count, int64_t step, bool across,
            uint16_t* to) const {
    int64_t rows = size - at, left = depth - k;
    for (int64_t i = 0; i < 16; ++i) {
      const float* x = along ? data + (at + i) * depth + k : data + (k + i) * size + at;
      const float* y = along ? x + 16 : x + 16 * size;
      bool here = i < (along ? rows : left), there = along ? here : i + 16 < left;
      for (int64_t u = 0; u < count; ++u) {
        int64_t first = along ? left - 32 * u : rows - 16 * u;
        __m512i parts[3];
        Split(Load(x, here ? first : 0),
              Load(y, there ? along ? first - 16 : first : 0), parts);
        for (int s = 0; s < 3; ++s)
          _mm512_store_si512(to + u * step + s * kPart + i * kDepth, parts[s]);
        x += along ? 32 : 16, y += along ? 32 : 16;
      }
    }
    if (across != along) return;
    for (int64_t u = 0; u < count; ++u)
      for (int s = 0; s < 3; ++s)
        Turn(reinterpret_cast<__m512i*>(to + u * step + s * kPart));
  }
};

// Configures tiles of 16 rows of 64 bytes for its lifetime.
struct Tiles {
  Tiles() {
    struct {
      uint8_t palette = 1, start = 0, none[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
    asm volatile("" ::"r"(&config) : "memory");  // GCC 12 assumes 8 bytes are read
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// C [32, 32] = or += two panels of A times two of B, `count` tiles of k.
inline void Square(const uint16_t* a, int64_t next_a, const uint16_t* b,
                   int64_t next_b, int64_t count, bool add, float* c, int64_t stride) {
  int64_t row = stride * sizeof(float);
  float* below = c + kSide * stride;
  asm volatile("" ::: "memory");  // compilers don't know what tiles read and write
  if (add) {
    _tile_loadd(0, c, row);
    _tile_loadd(1, c + kSide, row);
    _tile_loadd(2, below, row);
    _tile_loadd(3, below + kSide, row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
#define A(part)                        \
  _tile_loadd(4, a + part * kPart, 64); \
  _tile_loadd(5, a + next_a + part * kPart, 64)
#define B(part)                        \
  _tile_loadd(6, b + part * kPart, 64); \
  _tile_loadd(7, b + next_b + part * kPart, 64)
#define MULTIPLY           \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7)
  for (int64_t t = 0; t < count; ++t, a += kTile, b += kTile) {
    A(0);
    B(2);
    MULTIPLY;
    B(1);
    MULTIPLY;
    A(1);
    MULTIPLY;
    B(0);
    MULTIPLY;
    A(2);
    MULTIPLY;
    A(0);
    MULTIPLY;
  }
#undef A
#undef B
#undef MULTIPLY
  _tile_stored(0, c, row);
  _tile_stored(1, c + kSide, row);
  _tile_stored(2, below, row);
  _tile_stored(3, below + kSide, row);
  asm volatile("" ::: "memory");
}

int64_t Up(int64_t count, int64_t to) { return (count + to - 1) / to; }

template <typename T>
T* Aligned(void* at) {
  return reinterpret_cast<T*>(Up(reinterpret_cast<int64_t>(at), 64) * 64);
}

// A thread's scratch memory, which grows and is reused.
struct Room {
  std::vector<char> bytes;
  template <typename T>
  T* Take(int64_t count) {
    if (bytes.size() < count * sizeof(T) + 64) bytes.resize(count * sizeof(T) + 64);
    return Aligned<T>(bytes.data());
  }
};

// Packs a whole second factor; its panels are contiguous.
void PackAll(ffi::ThreadPool pool, Factor b, int64_t pairs, uint16_t* to) {
  int64_t deep = Up(b.depth, kDepth), panel = deep * kTile;
  Share(pool, b.along ? 2 * pairs : deep, [=](int64_t i) {
    if (b.along) b.Pack(i * kSide, 0, deep, kTile, true, to + i * panel);
    else b.Pack(0, i * kDepth, 2 * pairs, panel, true, to + i * kTile);
  });
}

ffi::Error Product(ffi::ThreadPool pool, Floats left, Floats right,
                   ffi::ResultBuffer<ffi::F32> result,
                   ffi::ResultBuffer<ffi::U8> memory, bool a_along, bool b_along) {
  auto shape = result->dimensions();
  int64_t m = shape[0], n = shape[1], depth = left.dimensions()[a_along];
  Factor a{left.typed_data(), m, depth, a_along};
  Factor b{right.typed_data(), n, depth, b_along};
  int64_t deep = Up(depth, kDepth), panel = deep * kTile;
  int64_t pairs = Up(n, kPair);  // of B's panels
  size_t place = reinterpret_cast<size_t>(memory->untyped_data());
  uint16_t* packed = Aligned<uint16_t>(memory->untyped_data());
  if (place + memory->size_bytes() < reinterpret_cast<size_t>(packed) +
                                         2 * pairs * panel * sizeof(uint16_t))
    return ffi::Error::InvalidArgument("too little memory to work in");
  PackAll(pool, b, pairs, packed);
  float* c = result->typed_data();
  // Equal strips of A, the same number for each thread. If A has too few rows for that,
  // B's columns are split into groups too.
  int64_t block = std::min(kBlock, deep), threads = Threads(pool);
  int64_t strips = Up(Up(m, kStrip / block / 2 * kPair), threads) * threads;
  int64_t rows = Up(Up(m, strips), kPair) * kPair;
  strips = Up(m, rows);
  int64_t groups = std::min(pairs, Up(threads, strips));
  Share(pool, strips * groups, [=](int64_t item) {
    int64_t first = item / groups * rows, last = std::min(m, first + rows);
    int64_t group = item % groups, end = pairs * (group + 1) / groups;
    int64_t squares = Up(last - first, kPair);
    thread_local Room room;
    uint16_t* mine = room.Take<uint16_t>(2 * squares * block * kTile);
    Tiles tiles;
    for (int64_t t = 0; t < deep; t += block) {
      int64_t count = std::min(block, deep - t), wide = count * kTile;
      for (int64_t i = 0; i < (a_along ? 2 * squares : count); ++i)
        if (a_along)
          a.Pack(first + i * kSide, t * kDepth, count, kTile, false, mine + i * wide);
        else
          a.Pack(first, (t + i) * kDepth, 2 * squares, wide, false, mine + i * kTile);
      for (int64_t j = pairs * group / groups; j < end; ++j)
        for (int64_t i = 0; i < squares; ++i) {
          const uint16_t* x = mine + 2 * i * wide;
          const uint16_t* y = packed + 2 * j * panel + t * kTile;
          float* at = c + (first + i * kPair) * n + j * kPair;
          int64_t some = std::min(kPair, last - first - i * kPair);
          int64_t columns = std::min(kPair, n - j * kPair);
          if (some == kPair && columns == kPair) {
            Square(x, wide, y, panel, count, t > 0, at, n);
            continue;
          }
          alignas(64) float edge[kPair * kPair];
          for (int64_t r = 0; t && r < some; ++r)
            std::memcpy(edge + r * kPair, at + r * n, columns * sizeof(float));
          Square(x, wide, y, panel, count, t > 0, edge, kPair);
          for (int64_t r = 0; r < some; ++r)
            std::memcpy(at + r * n, edge + r * kPair, columns * sizeof(float));
        }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

// Asks the operating system for the tiles; returns whether this process may use them.
extern "C" int GrpoTiles() {
  constexpr int kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}

#else

namespace {
ffi::Error Product(ffi::ThreadPool, Floats, Floats, ffi::ResultBuffer<ffi::F32>,
                   ffi::ResultBuffer<ffi::U8>, bool, bool) {
  return ffi::Error::Internal("this CPU has no bfloat16 tiles");
}
}  // namespace

extern "C" int GrpoTiles() { return 0; }

#endif

XLA_FFI_DEFINE_HANDLER_SYMBOL(GrpoProduct, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Attr<bool>("a_along")
                                  .Attr<bool>("b_along"));
