// AVX2 with FMA and F16C: 8 fp32 lanes, 16 registers.
#include "isa.h"
#if defined(__x86_64__)
#include <immintrin.h>

#include "target.h"
DEJAVU_TARGET_BEGIN("avx2,fma,f16c")

namespace dejavu {
namespace {
#include "types.h"
#include "plain.h"

struct Vec {
  __m256 v;
  static constexpr int WIDTH = 8;
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load_n(const float* p, int64_t n) {
    float lanes[WIDTH] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store_n(float* p, int64_t n) const {
    float lanes[WIDTH];
    store(lanes);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
  }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec relu(Vec a) { return {_mm256_max_ps(_mm256_setzero_ps(), a.v)}; }  // NaN, second, stays
  static Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  static void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
  }
  static float sum(Vec a) {
    float sums[4];
    sum4(a, a, a, a, sums);
    return sums[0];
  }
};

inline Vec widen(const float* p) { return Vec::load(p); }
inline Vec widen(const Half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Vec widen(const BFloat* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline Vec widen(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
template <class E>
inline Vec widen_n(const E* p, int64_t n) {
  float lanes[Vec::WIDTH] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = widen_one(p[i]);
  return Vec::load(lanes);
}
template <class E>
inline void store_as(Vec a, E* p) {
  float lanes[Vec::WIDTH];
  a.store(lanes);
  for (int i = 0; i < Vec::WIDTH; ++i) narrow_one(lanes[i], p + i);
}

// 8 int32 lanes, as integers.h asks for them.
struct Ints {
  __m256i v;
  static constexpr int WIDTH = 8;
  using Pairs = __m256i;
  static Ints zero() { return {_mm256_setzero_si256()}; }
  static Ints load(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  void store(int32_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static Ints set1(int32_t x) { return {_mm256_set1_epi32(x)}; }
  static Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
  static int32_t total(Ints a) {
    int32_t lanes[WIDTH], sum = 0;
    a.store(lanes);
    for (int32_t lane : lanes) sum += lane;
    return sum;
  }
  static Ints nearest(Vec a) { return {_mm256_cvtps_epi32(a.v)}; }
  __m128i words() const { return _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)); }
  void narrow(int16_t* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words()); }
  void narrow(int8_t* p) const {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words(), words()));
  }
  void narrow(uint8_t* p) const {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words(), words()));
  }
  Vec floats() const { return {_mm256_cvtepi32_ps(v)}; }
  static void sum4(Ints a, Ints b, Ints c, Ints d, float* out) {
    Vec::sum4(a.floats(), b.floats(), c.floats(), d.floats(), out);
  }
  static float sum(Ints a) { return Vec::sum(a.floats()); }
  static Ints mad(Ints acc, Pairs a, Pairs b) { return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(a, b))}; }
  static Pairs pairs(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Pairs pairs(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  template <class E>
  static Pairs pairs_n(const E* p, int64_t n) {
    E some[2 * WIDTH] = {};
    for (int64_t i = 0; i < n; ++i) some[i] = p[i];
    return pairs(some);
  }
  static Pairs both(const int16_t* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return _mm256_set1_epi32(pair);
  }
};

inline void interleave(const int8_t* a, const int8_t* b, Ints::Pairs* to) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a)),
                y = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
  to[0] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(x, y));
  to[1] = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(x, y));
}

constexpr int MAX_TOKENS = 2, ACCUMULATE_TOKENS = 5, MANY_TOKENS = 5;
#include "tiles.h"
#include "accumulate.h"
#include "nibbles.h"
#include "integers.h"
}  // namespace

const Kernels avx2_kernels = {"avx2",  input_rounded, dot_rounded, accumulate_rounded, nullptr,   nullptr,
                              nullptr, round_any,     threshold,   activate,           widen_any, finish_any};
}  // namespace dejavu

DEJAVU_TARGET_END
#endif
