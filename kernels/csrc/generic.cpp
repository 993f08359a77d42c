// Plain C++ for every other CPU; the compiler makes what vectors it can of the fixed-size loops. And the
// choice.
#include <cstdint>

#include "isa.h"

namespace dejavu {
namespace {
#include "types.h"
#include "plain.h"

struct Vec {
  static constexpr int WIDTH = 8;
  float v[WIDTH];
  static Vec zero() { return {}; }
  static Vec set1(float x) {
    Vec a;
    for (int i = 0; i < WIDTH; ++i) a.v[i] = x;
    return a;
  }
  static Vec load(const float* p) {
    Vec a;
    for (int i = 0; i < WIDTH; ++i) a.v[i] = p[i];
    return a;
  }
  static Vec load_n(const float* p, int64_t n) {
    Vec a = {};
    for (int64_t i = 0; i < n; ++i) a.v[i] = p[i];
    return a;
  }
  void store(float* p) const { store_n(p, WIDTH); }
  void store_n(float* p, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) p[i] = v[i];
  }
  static Vec fma(Vec a, Vec b, Vec c) {
    for (int i = 0; i < WIDTH; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  static Vec relu(Vec a) {
    for (int i = 0; i < WIDTH; ++i) a.v[i] = a.v[i] < 0 ? 0 : a.v[i];  // NaN stays
    return a;
  }
  static float sum(Vec a) {
    return ((a.v[0] + a.v[4]) + (a.v[1] + a.v[5])) + ((a.v[2] + a.v[6]) + (a.v[3] + a.v[7]));
  }
  static void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    out[0] = sum(a);
    out[1] = sum(b);
    out[2] = sum(c);
    out[3] = sum(d);
  }
};

template <class E>
inline Vec widen_n(const E* p, int64_t n) {
  Vec a = {};
  for (int64_t i = 0; i < n; ++i) a.v[i] = widen_one(p[i]);
  return a;
}
template <class E>
inline Vec widen(const E* p) {
  return widen_n(p, Vec::WIDTH);
}
template <class E>
inline void store_as(Vec a, E* p) {
  for (int i = 0; i < Vec::WIDTH; ++i) narrow_one(a.v[i], p + i);
}

constexpr int MAX_TOKENS = 2, ACCUMULATE_TOKENS = 5, MANY_TOKENS = 5;
#include "tiles.h"
#include "accumulate.h"
#include "nibbles.h"
}  // namespace

const Kernels generic_kernels = {"generic", input_widened, dot_widened, accumulate_widened,
                                 nullptr,   nullptr,       nullptr,     nullptr,
                                 threshold, activate,      widen_any,   finish_any};

const Kernels* const* supported(int* count) {
  static const Kernels* list[5];
  int n = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (vnni && __builtin_cpu_supports("avx512bf16")) list[n++] = &avx512_bf16_kernels;
  if (vnni) list[n++] = &avx512_vnni_kernels;
  if (avx512) list[n++] = &avx512_kernels;
  if (avx2) list[n++] = &avx2_kernels;
#endif
  list[n++] = &generic_kernels;
  *count = n;
  return list;
}

}  // namespace dejavu
