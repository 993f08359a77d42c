// AVX-512 with integer products (VPDPWSSD of pairs, VPDPBUSD of four), but none of bf16: floats are widened
// to fp32.
#include "isa.h"
#if defined(__x86_64__)
#include <immintrin.h>

#include "target.h"
DEJAVU_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")

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
}  // namespace

const Kernels avx512_vnni_kernels = {"avx512_vnni",  input_integers, dot_integers, accumulate_integers,
                                     lanes_integers, has_quads,      pack_lanes,   round_any,
                                     threshold,      activate,       widen_any,    finish_any};
}  // namespace dejavu

DEJAVU_TARGET_END
#endif
