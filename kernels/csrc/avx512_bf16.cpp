// AVX-512 with bf16 products (VDPBF16PS): two neighbours along a row, or two rows, in one multiply-add of 32
// lanes.
#include "isa.h"
#if defined(__x86_64__)
#include <immintrin.h>

#include "target.h"
DEJAVU_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma,f16c")

namespace dejavu {
namespace {
#include "types.h"
#include "plain.h"
#include "vec_avx512.h"
constexpr int MAX_TOKENS = 6, ACCUMULATE_TOKENS = 12, MANY_TOKENS = 8;
#define MULTIPLY_ADD _mm512_dpwssd_epi32
#include "vec_avx512_ints.h"
#include "tiles.h"
#include "accumulate.h"
#include "nibbles.h"
#include "integers.h"
#include "lanes.h"
#include "nibble_quads.h"

inline __m512bh as_bf16(__m512i v) { return reinterpret_cast<__m512bh>(v); }
inline __mmask32 first32(int64_t n) { return static_cast<__mmask32>((1ull << n) - 1); }

// 32 elements as bf16; the first n, then zeros.
inline __m512i bf16s(const BFloat* p) { return _mm512_loadu_si512(p); }
inline __m512i bf16s_n(const BFloat* p, int64_t n) { return _mm512_maskz_loadu_epi16(first32(n), p); }

struct PairDot {
  using W = BFloat;
  using X = BFloat;
  using WVec = __m512i;
  using Acc = Vec;
  static constexpr int64_t STEP = 32;
  static constexpr int TOKENS = MAX_TOKENS;
  static __m512i load_w(const BFloat* p) { return bf16s(p); }
  static __m512i load_w_n(const BFloat* p, int64_t n) { return bf16s_n(p, n); }
  static __m512i load_x(const BFloat* p) { return bf16s(p); }
  static __m512i load_x_n(const BFloat* p, int64_t n) { return bf16s_n(p, n); }
  static Vec mad(Vec acc, __m512i w, __m512i x) { return {_mm512_dpbf16_ps(acc.v, as_bf16(w), as_bf16(x))}; }
};

// Two neighbours, in all lanes.
inline __m512bh both(const BFloat* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, 4);
  return as_bf16(_mm512_set1_epi32(pair));
}

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
  using Acc = Vec;
  using Sum = float;
  static constexpr int GROUP = 2, VECTORS = 2;
  static constexpr bool GROUPED = false;
  static constexpr int64_t COLUMNS = 32;

  static constexpr int64_t bytes(int64_t columns) { return columns * int64_t(sizeof(W)); }
  static void load(const BFloat* const* w, int64_t column, int64_t width, __m512i* to) {
    const BFloat *a = w[0] + column, *b = w[1] + column;
    const Pair pair =
        width == COLUMNS ? paired(bf16s(a), bf16s(b)) : paired(bf16s_n(a, width), bf16s_n(b, width));
    to[0] = pair.low;
    to[1] = pair.high;
  }
  static __m512bh value(const BFloat* h) { return both(h); }
  static Vec mad(Vec acc, __m512i w, __m512bh value) { return {_mm512_dpbf16_ps(acc.v, as_bf16(w), value)}; }
};

// R rows by V vectors of tokens.
template <int R, int V>
void pair_tile(const BFloat* const* w, const BFloat* const* next, const int32_t* x, int64_t tokens,
               const Segment* segments, int64_t num_segments, float* out, int64_t ldo) {
  constexpr int UNROLL = 4;
  constexpr int64_t LINE_PAIRS = 16;
  Vec acc[V][R];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[v][r] = Vec::zero();
  const auto add = [&](int64_t pair, auto count) {
    __m512i values[count.value][V];
    for (int u = 0; u < count.value; ++u)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) values[u][v] = _mm512_loadu_si512(x + ((pair + u) * V + v) * 16);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      for (int u = 0; u < count.value; ++u) {
        const __m512bh weights = both(w[r] + 2 * (pair + u));
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v)
          acc[v][r].v = _mm512_dpbf16_ps(acc[v][r].v, as_bf16(values[u][v]), weights);
      }
  };
  for (int64_t s = 0; s < num_segments; ++s) {
    int64_t pair = segments[s].begin / 2;
    const int64_t end = segments[s].end / 2;
    for (; pair + UNROLL <= end; pair += UNROLL) {
      if (next != nullptr && pair % LINE_PAIRS < UNROLL)
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) prefetch(next[r] + 2 * pair);
      add(pair, Number<UNROLL>());
    }
    for (; pair < end; ++pair) add(pair, Number<1>());
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) store_lanes<R>(acc[v], tokens - 16 * v, out + 16 * v * ldo, ldo);
}

template <int V>
void pair_rows(const Rows& rows, int64_t begin, int64_t end, int64_t last, const void* x, int64_t tokens,
               const Segment* segments, int64_t num_segments, float* out, int64_t ldo, bool prefetch) {
  lane_rows<BFloat, 8>(rows, begin, end, last, prefetch,
                       [&](auto n, const auto* w, const auto* next, int64_t at) {
                         pair_tile<decltype(n)::value, V>(w, next, static_cast<const int32_t*>(x), tokens,
                                                          segments, num_segments, out + at, ldo);
                       });
}

void dot_lanes(const Rows& rows, int64_t begin, int64_t end, int64_t last, const void* x, int64_t columns,
               int64_t tokens, const Segment* segments, int64_t num_segments, float* out, int64_t ldo,
               bool prefetch) {
  if (rows.type != Type::bf16)
    lanes_integers(rows, begin, end, last, x, columns, tokens, segments, num_segments, out, ldo, prefetch);
  else if (lane_width(tokens) == 16)
    pair_rows<1>(rows, begin, end, last, x, tokens, segments, num_segments, out, ldo, prefetch);
  else
    pair_rows<2>(rows, begin, end, last, x, tokens, segments, num_segments, out, ldo, prefetch);
}

bool has_lanes(Type type, int64_t columns) {
  return has_quads(type, columns) || (type == Type::bf16 && columns % 32 == 0);
}

Type dot_input(Type weights, Type inputs) {
  return weights == Type::bf16 && inputs == Type::bf16 ? Type::bf16 : input_integers(weights, inputs);
}

void dot(const Rows& rows, int64_t begin, int64_t end, const Values& x, int64_t tokens,
         const Segment* segments, int64_t num_segments, float* out, int64_t ldo) {
  if (x.type == Type::bf16)
    dot_rows<PairDot>(rows, begin, end, x, tokens, segments, num_segments, out, ldo);
  else
    dot_integers(rows, begin, end, x, tokens, segments, num_segments, out, ldo);
}

void accumulate(const Rows& rows, int64_t begin, int64_t end, const Values& h, const int32_t* places,
                int64_t tokens, int64_t column_begin, int64_t column_end, float* out, int64_t ldo,
                char* scratch, bool add) {
  if (rows.type == Type::bf16 && h.type == Type::bf16)
    accumulate_rows<PairAccumulate>(rows, begin, end, h, places, tokens, column_begin, column_end, out, ldo,
                                    scratch, add);
  else
    accumulate_integers(rows, begin, end, h, places, tokens, column_begin, column_end, out, ldo, scratch,
                        add);
}
}  // namespace

const Kernels avx512_bf16_kernels = {"avx512_bf16", dot_input, dot,       accumulate, dot_lanes, has_lanes,
                                     pack_lanes,    round_any, threshold, activate,   widen_any, finish_any};
}  // namespace dejavu

DEJAVU_TARGET_END
#endif
