// Conversions without vector instructions. After types.h.
inline float widen_one(float x) { return x; }
inline float widen_one(int8_t x) { return x; }
inline float widen_one(BFloat x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float widen_one(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);           // infinity, NaN
  if (rest < 0x400) return float_of(sign | bits_of(static_cast<float>(rest) * 0x1p-24f));  // subnormal, zero
  return float_of(sign | ((rest << 13) + 0x38000000));
}

inline void narrow_one(float x, float* p) { *p = x; }
inline void narrow_one(float x, BFloat* p) {
  const uint32_t bits = bits_of(x);
  p->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow_one(float x, Half* p) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  uint32_t half;
  if (rest > 0x7f800000)
    half = 0x7e00;
  else if (rest >= 0x477ff000)
    half = 0x7c00;  // rounds beyond 65504
  else if (rest < 0x38800000)
    half = bits_of(float_of(rest) + 0.5f) - 0x3f000000;  // subnormal: the addition rounds
  else
    half = (rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13;
  p->bits = static_cast<uint16_t>(sign | half);
}
