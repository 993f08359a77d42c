// 16 fp32 lanes. For inclusion in an anonymous namespace that is compiled for AVX-512 F, BW, DQ and VL.
struct Vec {
  __m512 v;
  static constexpr int WIDTH = 16;
  static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load_n(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_n(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec relu(Vec a) { return {_mm512_max_ps(_mm512_setzero_ps(), a.v)}; }  // NaN, second, stays
  static Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  static float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
  // out[i] = sum of the i-th vector
  static void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
    const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
};

inline Vec widen(const float* p) { return Vec::load(p); }
inline Vec widen_n(const float* p, int64_t n) { return Vec::load_n(p, n); }
inline Vec widen_half(__m256i h) { return {_mm512_cvtph_ps(h)}; }
inline Vec widen(const Half* p) {
  return widen_half(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec widen_n(const Half* p, int64_t n) {
  return widen_half(_mm256_maskz_loadu_epi16(Vec::first(n), p));
}
inline Vec widen_bfloat(__m256i b) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16))};
}
inline Vec widen(const BFloat* p) {
  return widen_bfloat(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec widen_n(const BFloat* p, int64_t n) {
  return widen_bfloat(_mm256_maskz_loadu_epi16(Vec::first(n), p));
}
inline Vec widen_int8(__m128i i) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(i))}; }
inline Vec widen(const int8_t* p) { return widen_int8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec widen_n(const int8_t* p, int64_t n) { return widen_int8(_mm_maskz_loadu_epi8(Vec::first(n), p)); }

inline void store_as(Vec a, float* p) { a.store(p); }
inline void store_as(Vec a, Half* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_as(Vec a, BFloat* p) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i result =
      _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
}
