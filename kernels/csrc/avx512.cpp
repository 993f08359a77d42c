// AVX-512 without bf16 products: every type is widened to fp32.
#include "isa.h"
#if defined(__x86_64__)
#include <immintrin.h>

#include "target.h"
DEJAVU_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace dejavu {
namespace {
#include "types.h"
#include "vec_avx512.h"
constexpr int MAX_TOKENS = 6, ACCUMULATE_TOKENS = 12, MANY_TOKENS = 8;
#include "tiles.h"
}  // namespace

const Kernels avx512_kernels = {"avx512", input_widened, dot_widened, accumulate_widened, nullptr,
                                nullptr,  threshold,     activate,    widen_any,          finish_any};
}  // namespace dejavu

DEJAVU_TARGET_END
#endif
