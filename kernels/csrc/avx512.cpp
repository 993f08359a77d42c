// AVX-512 of the first kind: floats are widened to fp32, pairs of int16 multiplied.
#include "isa.h"
#if defined(__x86_64__)
#include <immintrin.h>

#include "target.h"
DEJAVU_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace dejavu {
namespace {
#include "types.h"
#include "plain.h"
#include "vec_avx512.h"
constexpr int MAX_TOKENS = 6, ACCUMULATE_TOKENS = 12, MANY_TOKENS = 8;
// What VPDPWSSD does in one instruction.
inline __m512i multiply_add(__m512i acc, __m512i a, __m512i b) {
  return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b));
}
#define MULTIPLY_ADD multiply_add
#include "vec_avx512_ints.h"
#include "tiles.h"
#include "accumulate.h"
#include "nibbles.h"
#include "integers.h"
}  // namespace

const Kernels avx512_kernels = {"avx512",  input_rounded, dot_rounded, accumulate_rounded,
                                nullptr,   nullptr,       nullptr,     round_any,
                                threshold, activate,      widen_any,   finish_any};
}  // namespace dejavu

DEJAVU_TARGET_END
#endif
