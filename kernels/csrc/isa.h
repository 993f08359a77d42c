// What an instruction set offers, as plain functions over pointers: no PyTorch type crosses this line,
// because the files that are compiled for AVX must not emit inline functions that the linker might then pick
// for every CPU.
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

// Tokens of a block of dot_lanes: one lane each, in one or two vectors.
constexpr int64_t LANE_BLOCK = 32;
constexpr int64_t lane_width(int64_t tokens) { return tokens > 16 ? 32 : 16; }

constexpr int64_t accumulate_scratch(int64_t tokens, int64_t columns) {
  constexpr int64_t MOST_COLUMNS = 64, MOST_ROWS = 128;  // of a tile; of a block
  return 4 * (tokens * (columns + MOST_COLUMNS) + MOST_ROWS * MOST_COLUMNS + tokens * MOST_ROWS);
}

struct Kernels {
  const char* name;

  // Which type `dot` takes the other operand in, for weights and inputs of a type: bf16 where bf16 products
  // are native.
  Type (*dot_input)(Type weights, Type inputs);

  // out[t * ldo + i - begin] = sum over the segments' columns k of row_i[k] * x[t * ldx + k], for rows begin
  // <= i < end and t < tokens; x in dot_input's type; accumulated in fp32.
  void (*dot)(const Rows& rows, int64_t begin, int64_t end, const void* x, Type x_type, int64_t ldx,
              int64_t tokens, const Segment* segments, int64_t num_segments, float* out, int64_t ldo);

  // out[t * ldo + c - column_begin] = sum over rows begin <= i < end of h[t * ldh + places[i]] * row_i[c],
  // for columns column_begin <= c < column_end; the order of the sum does not depend on the columns. h is in
  // dot_input's type. `scratch`, aligned to 64 bytes, has accumulate_scratch(tokens, columns) bytes.
  void (*accumulate)(const Rows& rows, int64_t begin, int64_t end, const void* h, Type h_type, int64_t ldh,
                     const int32_t* places, int64_t tokens, int64_t column_begin, int64_t column_end,
                     float* out, int64_t ldo, char* scratch);

  // `dot` for bf16 weights, bf16 inputs and many tokens, of which one block is multiplied: `x` as pack_lanes
  // left it, segments of even columns. Rows up to `last` are prefetched where `prefetch` says so. Null where
  // bf16 products are not native.
  void (*dot_lanes)(const Rows& rows, int64_t begin, int64_t end, int64_t last, const void* x, int64_t tokens,
                    const Segment* segments, int64_t num_segments, float* out, int64_t ldo, bool prefetch);
  // A block of tokens [tokens][ldx] for dot_lanes: pairs of columns, each of lane_width(tokens) tokens;
  // `columns` is a multiple of 32.
  void (*pack_lanes)(const void* x, int64_t ldx, int64_t tokens, int64_t columns, void* to);

  // How many scores[i] + bias[i] are positive; any[i] becomes 1 where that one is.
  int64_t (*threshold)(const float* scores, const float* bias, int32_t* any, int64_t n);
  // to = ReLU(values + bias), NaN as it is, of which `alive` gets the sums
  void (*activate)(const float* values, const float* bias, float* alive, void* to, Type type, int64_t n);
  void (*widen)(const void* from, Type type, float* to, int64_t n);
  // to = from + bias, rounded to nearest, ties to even; without a bias where that is null
  void (*finish)(const float* from, const float* bias, void* to, Type type, int64_t n);
};

// Of this CPU, best first; never empty: "generic" is plain C++.
extern const Kernels avx512_bf16_kernels, avx512_kernels, avx2_kernels, generic_kernels;
const Kernels* const* supported(int* count);

}  // namespace dejavu
