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

constexpr int MAX_TOKENS = 2, ACCUMULATE_TOKENS = 5, MANY_TOKENS = 5;
#include "tiles.h"
}  // namespace

const Kernels avx2_kernels = {"avx2",  input_widened, dot_widened, accumulate_widened, nullptr,
                              nullptr, threshold,     activate,    widen_any,          finish_any};
}  // namespace dejavu

DEJAVU_TARGET_END
#endif
