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
constexpr int MAX_TOKENS = 6;
#include "tiles.h"

Type dot_input(Type, Type) { return Type::f32; }
void dot(const Rows& rows, int64_t begin, int64_t end, const void* x, Type, int64_t ldx, int64_t tokens, const Segment* segments,
         int64_t num_segments, float* out, int64_t ldo) {
  dot_widened(rows, begin, end, x, ldx, tokens, segments, num_segments, out, ldo);
}
}  // namespace

const Kernels avx512_kernels = {"avx512", dot_input, dot, accumulate_widened, widen_any, finish_any, transpose16, interleave};
}  // namespace dejavu

DEJAVU_TARGET_END
#endif
