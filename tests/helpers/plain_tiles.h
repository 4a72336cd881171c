// AMX's tiles in plain C++, for tests on CPUs with AVX-512 that have none:
// CXX="g++ -include …/plain_tiles.h". The operating system is not asked for them.

#include <immintrin.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#define __AMX_BF16__ 1
#define syscall(...) 0

namespace plain {

inline thread_local uint8_t tiles[8][16][64];
inline thread_local bool configured = false;

inline void Configure(const void* given) {
  uint8_t bytes[64];
  std::memcpy(bytes, given, 64);
  if (bytes[0] != 1 || bytes[1]) __builtin_trap();  // palette, first row
  for (int i = 0; i < 8; ++i)
    if (bytes[16 + 2 * i] != 64 || bytes[17 + 2 * i] || bytes[48 + i] != 16)
      __builtin_trap();
  configured = true;
}

inline void Release() {
  std::memset(tiles, 0xff, sizeof tiles);
  configured = false;
}

inline uint8_t* Row(int tile, int row) {
  if (!configured) __builtin_trap();
  return tiles[tile][row];
}

inline void Zero(int tile) { std::memset(Row(tile, 0), 0, sizeof tiles[tile]); }

inline void Load(int tile, const void* at, int64_t stride) {
  for (int i = 0; i < 16; ++i)
    std::memcpy(Row(tile, i), static_cast<const char*>(at) + i * stride, 64);
}

inline void Store(int tile, void* at, int64_t stride) {
  for (int i = 0; i < 16; ++i)
    std::memcpy(static_cast<char*>(at) + i * stride, Row(tile, i), 64);
}

// The lower or upper halves of 16 pairs of bfloat16s.
inline __m512 Half(__m512i pairs, int upper) {
  __m512i high = _mm512_set1_epi32(0xffff0000);
  return _mm512_castsi512_ps(upper ? _mm512_and_si512(pairs, high)
                                   : _mm512_slli_epi32(pairs, 16));
}

// c [i, j] += Σ_p a [i, p] b [p, j] of 16 pairs of bfloat16s, whose halves are summed
// apart, from 0, as Intel's manual has it; in the same order wherever it is called.
__attribute__((noinline, optimize("no-associative-math"))) inline void Multiply(
    int c, int a, int b) {
  for (int i = 0; i < 16; ++i) {
    __m512 sums[2] = {};
    for (int p = 0; p < 16; ++p) {
      uint32_t pair;
      std::memcpy(&pair, Row(a, i) + 4 * p, 4);
      __m512i left = _mm512_set1_epi32(pair), right = _mm512_loadu_si512(Row(b, p));
      for (int upper = 0; upper < 2; ++upper)
        sums[upper] = _mm512_fmadd_ps(Half(left, upper), Half(right, upper),
                                      sums[upper]);
    }
    _mm512_storeu_ps(Row(c, i), _mm512_loadu_ps(Row(c, i)) + (sums[0] + sums[1]));
  }
}

}  // namespace plain

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig plain::Configure
#define _tile_release plain::Release
#define _tile_loadd plain::Load
#define _tile_stored plain::Store
#define _tile_zero plain::Zero
#define _tile_dpbf16ps plain::Multiply
