// 16-bit floats as bits, and their conversion in plain C++. For inclusion in an anonymous namespace.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}
