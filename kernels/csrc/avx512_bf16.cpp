// AVX-512 with bf16 products (VDPBF16PS): two neighbours along a row, or two rows, in one multiply-add of 32 lanes.
#include "isa.h"
#if defined(__x86_64__)
#include <immintrin.h>

#include "target.h"
DEJAVU_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

namespace dejavu {
namespace {
#include "types.h"
#include "vec_avx512.h"
constexpr int MAX_TOKENS = 6;
#include "tiles.h"

inline __m512bh as_bf16(__m512i v) { return reinterpret_cast<__m512bh>(v); }
inline __mmask32 first32(int64_t n) { return static_cast<__mmask32>((1ull << n) - 1); }

struct PairDot {
  using W = BFloat;
  using X = BFloat;
  using WVec = __m512i;
  static constexpr int64_t STEP = 32;
  static __m512i load_w(const BFloat* p) { return _mm512_loadu_si512(p); }
  static __m512i load_w_n(const BFloat* p, int64_t n) { return _mm512_maskz_loadu_epi16(first32(n), p); }
  static __m512i load_x(const BFloat* p) { return load_w(p); }
  static __m512i load_x_n(const BFloat* p, int64_t n) { return load_w_n(p, n); }
  static Vec mad(Vec acc, __m512i w, __m512i x) { return {_mm512_dpbf16_ps(acc.v, as_bf16(w), as_bf16(x))}; }
};

// Two rows at a time, interleaved; h is rounded to bf16, as dense vLLM does between fc1 and fc2.
struct PairAccumulate {
  using W = BFloat;
  using H = BFloat;
  static constexpr int GROUP = 2;
  static constexpr int GROUPS = 2;  // of 32 columns
  static constexpr int64_t COLUMNS = 32 * GROUPS;

  static void pack(const float* h, int64_t n, BFloat* to) {
    for (int64_t i = 0; i < n; i += Vec::WIDTH)  // zeros up to a whole vector, which PANEL_ROWS has room for
      store_as(n - i < Vec::WIDTH ? Vec::load_n(h + i, n - i) : Vec::load(h + i), to + i);
  }

  struct Pairs {
    __m512i of[2 * GROUPS];
  };

  // Rows i and i + 1; an odd last row meets itself, times 0.
  static Pairs pairs(const BFloat* const* w, int64_t i, int64_t n, int64_t column, int64_t width) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const BFloat *a = w[i] + column, *b = w[i + 1 < n ? i + 1 : i] + column;
    Pairs pairs;
    for (int g = 0; g < GROUPS; ++g) {
      __m512i x, y;
      if (width == COLUMNS) {
        x = _mm512_loadu_si512(a + 32 * g);
        y = _mm512_loadu_si512(b + 32 * g);
      } else {
        const int64_t left = width - 32 * g;
        const __mmask32 mask = first32(left < 0 ? 0 : left < 32 ? left : 32);
        x = _mm512_maskz_loadu_epi16(mask, a + 32 * g);
        y = _mm512_maskz_loadu_epi16(mask, b + 32 * g);
      }
      pairs.of[2 * g] = _mm512_permutex2var_epi16(x, low, y);
      pairs.of[2 * g + 1] = _mm512_permutex2var_epi16(x, high, y);
    }
    return pairs;
  }

  static void fill(const BFloat* const* w, int64_t i, int64_t n, int64_t column, int64_t width, BFloat* to) {
    const Pairs both = pairs(w, i, n, column, width);
    for (int g = 0; g < 2 * GROUPS; ++g) _mm512_storeu_si512(to + 32 * g, both.of[g]);
  }

  template <int T>
  static void from_panel(const BFloat* panel, int64_t n, const BFloat* h, float* sums, const Later& later) {
    tile<T>(
        [&](int64_t i) {
          later.prefetch_at(i, 2);
          Pairs both;
          for (int g = 0; g < 2 * GROUPS; ++g) both.of[g] = _mm512_loadu_si512(panel + i * COLUMNS + 32 * g);
          return both;
        },
        n, h, sums);
  }

  template <int T>
  static void from_rows(const BFloat* const* w, const BFloat* const* ahead, int64_t n, int64_t column, int64_t width, const BFloat* h, float* sums) {
    for (int64_t i = 0; i < n; ++i)
      for (int g = 0; g < GROUPS; ++g) prefetch(ahead[i] + 32 * g);
    if (width == COLUMNS) tile<T>([&](int64_t i) { return pairs(w, i, n, column, COLUMNS); }, n, h, sums);
    else tile<T>([&](int64_t i) { return pairs(w, i, n, column, width); }, n, h, sums);
  }

 private:
  template <int T, class Source>
  static void tile(const Source& weights, int64_t n, const BFloat* h, float* sums) {
    Vec acc[T][2 * GROUPS];
    for (int t = 0; t < T; ++t)
      for (int g = 0; g < 2 * GROUPS; ++g) acc[t][g] = Vec::load(sums + t * COLUMNS + 16 * g);
    for (int64_t i = 0; i < n; i += 2) {
      const Pairs both = weights(i);
      for (int t = 0; t < T; ++t) {
        int32_t pair;
        __builtin_memcpy(&pair, h + t * PANEL_ROWS + i, 4);
        const __m512bh value = as_bf16(_mm512_set1_epi32(pair));
        for (int g = 0; g < 2 * GROUPS; ++g) acc[t][g].v = _mm512_dpbf16_ps(acc[t][g].v, as_bf16(both.of[g]), value);
      }
    }
    for (int t = 0; t < T; ++t)
      for (int g = 0; g < 2 * GROUPS; ++g) acc[t][g].store(sums + t * COLUMNS + 16 * g);
  }
};

void transpose16(const uint32_t* from, int64_t stride, uint32_t* to, int64_t ld) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * stride);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * ld, r[i]);
}

void interleave(const uint16_t* a, const uint16_t* b, uint16_t* to, int64_t n) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m512i x = _mm512_loadu_si512(a + i), y = _mm512_loadu_si512(b + i);
    _mm512_storeu_si512(to + 2 * i, _mm512_permutex2var_epi16(x, low, y));
    _mm512_storeu_si512(to + 2 * i + 32, _mm512_permutex2var_epi16(x, high, y));
  }
  for (; i < n; ++i) {
    to[2 * i] = a[i];
    to[2 * i + 1] = b[i];
  }
}

Type dot_input(Type weights, Type inputs) { return weights == Type::bf16 && inputs == Type::bf16 ? Type::bf16 : Type::f32; }

void dot(const Rows& rows, int64_t begin, int64_t end, const void* x, Type x_type, int64_t ldx, int64_t tokens,
         const Segment* segments, int64_t num_segments, float* out, int64_t ldo) {
  if (x_type == Type::bf16) dot_rows<PairDot>(rows, begin, end, x, ldx, tokens, segments, num_segments, out, ldo);
  else dot_widened(rows, begin, end, x, x_type, ldx, tokens, segments, num_segments, out, ldo);
}

void accumulate(const Rows& rows, int64_t begin, int64_t end, const float* h, int64_t ldh, const int32_t* places, int64_t tokens, int64_t column_begin,
                int64_t column_end, float* out, int64_t ldo, char* scratch) {
  if (rows.type == Type::bf16) accumulate_rows<PairAccumulate>(rows, begin, end, h, ldh, places, tokens, column_begin, column_end, out, ldo, scratch);
  else accumulate_widened(rows, begin, end, h, ldh, places, tokens, column_begin, column_end, out, ldo, scratch);
}
}  // namespace

const Kernels avx512_bf16_kernels = {"avx512_bf16", dot_input, dot, accumulate, widen_any, finish_any, transpose16, interleave};
}  // namespace dejavu

DEJAVU_TARGET_END
#endif
