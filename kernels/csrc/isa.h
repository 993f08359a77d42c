// What an instruction set offers, as plain functions over pointers: no PyTorch type crosses this line, because the files
// that are compiled for AVX must not emit inline functions that the linker might then pick for every CPU.
#pragma once

#include <cstdint>

namespace dejavu {

enum class Type { f32, f16, bf16, i8 };

// A range of columns [begin, end) that a row is read at.
struct Segment {
  int64_t begin, end;
};

// Rows of a matrix, by number: row i is `data + (ids ? ids[i] : i) * stride`, in elements.
struct Rows {
  const void* data;
  int64_t stride;
  const int32_t* ids;
  Type type;
};

constexpr int64_t accumulate_scratch(int64_t tokens, int64_t columns) {
  constexpr int64_t MOST_COLUMNS = 64, MOST_ROWS = 64;  // of a tile; of panels
  return 4 * (tokens * (columns + MOST_COLUMNS) + tokens * MOST_ROWS + MOST_ROWS * (columns + MOST_COLUMNS));
}

struct Kernels {
  const char* name;

  // Which type `dot` takes the other operand in, for weights and inputs of a type: bf16 where bf16 products are native.
  Type (*dot_input)(Type weights, Type inputs);

  // out[t * ldo + i - begin] = sum over the segments' columns k of row_i[k] * x[t * ldx + k], for rows begin <= i < end
  // and t < tokens; x in dot_input's type; accumulated in fp32.
  void (*dot)(const Rows& rows, int64_t begin, int64_t end, const void* x, Type x_type, int64_t ldx, int64_t tokens,
              const Segment* segments, int64_t num_segments, float* out, int64_t ldo);

  // out[t * ldo + c - column_begin] = sum over rows begin <= i < end of h[t * ldh + places[i]] * row_i[c], for columns
  // column_begin <= c < column_end; the order of the sum does not depend on the columns. `scratch`, aligned to 64 bytes,
  // has accumulate_scratch(tokens, columns) bytes.
  void (*accumulate)(const Rows& rows, int64_t begin, int64_t end, const float* h, int64_t ldh, const int32_t* places,
                     int64_t tokens, int64_t column_begin, int64_t column_end, float* out, int64_t ldo, char* scratch);

  void (*widen)(const void* from, Type type, float* to, int64_t n);
  // to = relu?(from + bias), rounded to nearest, ties to even; without a bias where that is null
  void (*finish)(const float* from, const float* bias, bool relu, void* to, Type type, int64_t n);

  // What gemm.cpp needs besides; null where bf16 products are not native.
  // to[j * ld + i] = from[i * stride + j] for i < 16, j < 16: 32-bit elements.
  void (*transpose16)(const uint32_t* from, int64_t stride, uint32_t* to, int64_t ld);
  // The pairs (a[i], b[i]) of 16-bit elements, one after the other.
  void (*interleave)(const uint16_t* a, const uint16_t* b, uint16_t* to, int64_t n);
};

// Of this CPU, best first; never empty: "generic" is plain C++.
extern const Kernels avx512_bf16_kernels, avx512_kernels, avx2_kernels, generic_kernels;
const Kernels* const* supported(int* count);

}  // namespace dejavu
