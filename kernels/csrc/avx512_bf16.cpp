// AVX-512 with bf16 products (VDPBF16PS): two neighbours along a row, or two rows, in one multiply-add of 32
// lanes.
#include "isa.h"
#if defined(__x86_64__)
#include <immintrin.h>

#include "target.h"
DEJAVU_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

namespace dejavu {
namespace {
#include "types.h"
#include "vec_avx512.h"
constexpr int MAX_TOKENS = 6, ACCUMULATE_TOKENS = 12, MANY_TOKENS = 8;
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

struct Pair {
  __m512i low, high;  // of columns 0 to 15 and 16 to 31
};

inline Pair paired(__m512i a, __m512i b) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7,
                                       38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  return {_mm512_permutex2var_epi16(a, low, b), _mm512_permutex2var_epi16(a, high, b)};
}

// Two rows at a time, interleaved; h is rounded to bf16, as dense vLLM does between fc1 and fc2.
struct PairAccumulate {
  using W = BFloat;
  using H = BFloat;
  using WVec = __m512i;
  using HVec = __m512bh;
  static constexpr int GROUP = 2, VECTORS = 2;
  static constexpr int64_t COLUMNS = 32;

  // Rows i and i + 1; an odd last row meets itself, times 0.
  static void load(const BFloat* const* w, int64_t i, int64_t n, int64_t column, int64_t width, __m512i* to) {
    const BFloat *a = w[i] + column, *b = w[i + 1 < n ? i + 1 : i] + column;
    const __mmask32 mask = first32(width);
    const Pair pair = width == COLUMNS
                          ? paired(_mm512_loadu_si512(a), _mm512_loadu_si512(b))
                          : paired(_mm512_maskz_loadu_epi16(mask, a), _mm512_maskz_loadu_epi16(mask, b));
    to[0] = pair.low;
    to[1] = pair.high;
  }
  static __m512bh value(const BFloat* h) {
    int32_t pair;
    __builtin_memcpy(&pair, h, 4);
    return as_bf16(_mm512_set1_epi32(pair));
  }
  static Vec mad(Vec acc, __m512i w, __m512bh value) { return {_mm512_dpbf16_ps(acc.v, as_bf16(w), value)}; }
};

// 16 rows of 16 32-bit elements become 16 columns.
inline void transpose(__m512i* r) {
  __m512i t[16];
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
}

void pack_lanes(const void* x, int64_t ldx, int64_t tokens, int64_t columns, void* to) {
  const auto* input = static_cast<const BFloat*>(x);
  auto* out = static_cast<int32_t*>(to);
  const int64_t width = lane_width(tokens);
  for (int64_t first = 0; first < width; first += 16)
    for (int64_t c = 0; c < columns; c += 32) {
      __m512i rows[16];
      for (int64_t t = 0; t < 16; ++t)
        rows[t] =
            first + t < tokens ? _mm512_loadu_si512(input + (first + t) * ldx + c) : _mm512_setzero_si512();
      transpose(rows);
      for (int64_t pair = 0; pair < 16; ++pair)
        _mm512_storeu_si512(out + (c / 2 + pair) * width + first, rows[pair]);
    }
}

// R rows by V vectors of tokens. A pair of a row's elements is broadcast to all tokens: a row is read once
// for 16 V of them.
template <int R, int V>
void lane_tile(const BFloat* const* w, const BFloat* const* next, const int32_t* x, int64_t tokens,
               const Segment* segments, int64_t num_segments, float* out, int64_t ldo) {
  constexpr int UNROLL = 4;
  constexpr int64_t LINE_PAIRS = 16;
  Vec acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = Vec::zero();
  const auto add = [&](int64_t pair, auto count) {
    __m512i values[count.value][V];
    for (int u = 0; u < count.value; ++u)
      for (int v = 0; v < V; ++v) values[u][v] = _mm512_loadu_si512(x + ((pair + u) * V + v) * 16);
    for (int r = 0; r < R; ++r)
      for (int u = 0; u < count.value; ++u) {
        const __m512bh weights = PairAccumulate::value(w[r] + 2 * (pair + u));
        for (int v = 0; v < V; ++v)
          acc[r][v].v = _mm512_dpbf16_ps(acc[r][v].v, as_bf16(values[u][v]), weights);
      }
  };
  for (int64_t s = 0; s < num_segments; ++s) {
    int64_t pair = segments[s].begin / 2;
    const int64_t end = segments[s].end / 2;
    for (; pair + UNROLL <= end; pair += UNROLL) {
      if (next != nullptr && pair % LINE_PAIRS < UNROLL)
        for (int r = 0; r < R; ++r) prefetch(next[r] + 2 * pair);
      add(pair, Number<UNROLL>());
    }
    for (; pair < end; ++pair) add(pair, Number<1>());
  }
  for (int v = 0; v < V; ++v) {
    __m512i lanes[16];
    for (int r = 0; r < 16; ++r)
      lanes[r] = r < R ? _mm512_castps_si512(acc[r < R ? r : 0][v].v) : _mm512_setzero_si512();
    transpose(lanes);
    for (int t = 0; t < 16 && 16 * v + t < tokens; ++t)
      _mm512_mask_storeu_epi32(out + (16 * v + t) * ldo, Vec::first(R), lanes[t]);
  }
}

template <int R, int V>
void lane_group(const Rows& rows, int64_t i, int64_t last, const int32_t* x, int64_t tokens,
                const Segment* segments, int64_t num_segments, float* out, int64_t ldo, bool prefetch) {
  const BFloat *w[R], *next[R];
  for (int r = 0; r < R; ++r) {
    w[r] = row<BFloat>(rows, i + r);
    next[r] = row<BFloat>(rows, i + r + R < last ? i + r + R : last - 1);
  }
  lane_tile<R, V>(w, prefetch ? next : nullptr, x, tokens, segments, num_segments, out, ldo);
}

template <int V>
void lane_rows(const Rows& rows, int64_t begin, int64_t end, int64_t last, const int32_t* x, int64_t tokens,
               const Segment* segments, int64_t num_segments, float* out, int64_t ldo, bool prefetch) {
  constexpr int R = 8;
  int64_t i = begin;
  for (; i + R <= end; i += R)
    lane_group<R, V>(rows, i, last, x, tokens, segments, num_segments, out + i - begin, ldo, prefetch);
  for (; i < end; ++i)
    lane_group<1, V>(rows, i, last, x, tokens, segments, num_segments, out + i - begin, ldo, prefetch);
}

void dot_lanes(const Rows& rows, int64_t begin, int64_t end, int64_t last, const void* x, int64_t tokens,
               const Segment* segments, int64_t num_segments, float* out, int64_t ldo, bool prefetch) {
  const auto* input = static_cast<const int32_t*>(x);
  if (lane_width(tokens) == 16)
    lane_rows<1>(rows, begin, end, last, input, tokens, segments, num_segments, out, ldo, prefetch);
  else
    lane_rows<2>(rows, begin, end, last, input, tokens, segments, num_segments, out, ldo, prefetch);
}

Type dot_input(Type weights, Type inputs) {
  return weights == Type::bf16 && inputs == Type::bf16 ? Type::bf16 : Type::f32;
}

void dot(const Rows& rows, int64_t begin, int64_t end, const void* x, Type x_type, int64_t ldx,
         int64_t tokens, const Segment* segments, int64_t num_segments, float* out, int64_t ldo) {
  if (x_type == Type::bf16)
    dot_rows<PairDot>(rows, begin, end, x, ldx, tokens, segments, num_segments, out, ldo);
  else
    dot_widened(rows, begin, end, x, x_type, ldx, tokens, segments, num_segments, out, ldo);
}

void accumulate(const Rows& rows, int64_t begin, int64_t end, const void* h, Type h_type, int64_t ldh,
                const int32_t* places, int64_t tokens, int64_t column_begin, int64_t column_end, float* out,
                int64_t ldo, char* scratch) {
  if (h_type == Type::bf16)
    accumulate_rows<PairAccumulate>(rows, begin, end, h, ldh, places, tokens, column_begin, column_end, out,
                                    ldo, scratch);
  else
    accumulate_widened(rows, begin, end, h, h_type, ldh, places, tokens, column_begin, column_end, out, ldo,
                       scratch);
}
}  // namespace

const Kernels avx512_bf16_kernels = {"avx512_bf16", dot_input, dot,      accumulate, dot_lanes,
                                     pack_lanes,    threshold, activate, widen_any,  finish_any};
}  // namespace dejavu

DEJAVU_TARGET_END
#endif
