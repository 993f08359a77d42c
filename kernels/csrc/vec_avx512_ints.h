// 16 int32 lanes, as integers.h asks for them. MULTIPLY_ADD(acc, a, b) is acc + the sum of each lane's two
// products.
struct Ints {
  __m512i v;
  static constexpr int WIDTH = 16;
  using Pairs = __m512i;
  static __mmask32 first(int64_t n) { return static_cast<__mmask32>((1ull << n) - 1); }
  static Ints zero() { return {_mm512_setzero_si512()}; }
  static Ints load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
  static Ints set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
  static int32_t total(Ints a) { return _mm512_reduce_add_epi32(a.v); }
  static Ints nearest(Vec a) { return {_mm512_cvtps_epi32(a.v)}; }
  void narrow(int16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(v));
  }
  void narrow(int8_t* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(v)); }
  void narrow(uint8_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(v));
  }
  Vec floats() const { return {_mm512_cvtepi32_ps(v)}; }
  static void sum4(Ints a, Ints b, Ints c, Ints d, float* out) {
    Vec::sum4(a.floats(), b.floats(), c.floats(), d.floats(), out);
  }
  static float sum(Ints a) { return Vec::sum(a.floats()); }
  static Ints mad(Ints acc, Pairs a, Pairs b) { return {MULTIPLY_ADD(acc.v, a, b)}; }
  static Pairs pairs(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Pairs pairs_n(const int8_t* p, int64_t n) {
    return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(first(n), p));
  }
  static Pairs pairs(const int16_t* p) { return _mm512_loadu_si512(p); }
  static Pairs pairs_n(const int16_t* p, int64_t n) { return _mm512_maskz_loadu_epi16(first(n), p); }
  static Pairs both(const int16_t* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
  }
};

// The middle quarters change places first: what follows works within halves.
inline void interleave(const int8_t* a, const int8_t* b, Ints::Pairs* to) {
  const __m256i x = _mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)), 0xd8),
                y = _mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)), 0xd8);
  to[0] = _mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(x, y));
  to[1] = _mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(x, y));
}
