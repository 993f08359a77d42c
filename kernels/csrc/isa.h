// What an instruction set offers, as plain functions over pointers: no PyTorch type crosses this line,
// because the files that are compiled for AVX must not emit inline functions that the linker might then pick
// for every CPU.
#pragma once

#include <cstdint>

namespace dejavu {

// u4: weights alone, two in a byte, each 8 too large. In a piece of PIECE columns byte j holds the j-th
// column's in its lower half and that of column j + PIECE / 2 in the upper one.
enum class Type { f32, f16, bf16, i8, i16, u8, u4 };
constexpr int64_t PIECE = 64;

// A range of columns [begin, end) that a row is read at.
struct Segment {
  int64_t begin, end;
};

// Of weights of type u4, floats [.][stride]. Where `rows` is 1 every row has one for each WEIGHT_GROUP
// columns; else so many rows share one for each column.
struct Scales {
  const void* data = nullptr;
  Type type = Type::f32;
  int64_t stride = 0, rows = 1;
};
constexpr int64_t WEIGHT_GROUP = 128;
constexpr int64_t MOST_SCALES = 256;  // of a row: 32,768 columns

// Rows of a matrix, by number: row i is `data + (ids ? ids[i] : i) * stride`, in elements, in bytes of u4.
struct Rows {
  const void* data;
  int64_t stride;
  const int32_t* ids;
  Type type;
  Scales scales = {};
};

// What rows are multiplied with: `data + t * stride`, in elements, of a token. Of int8 weights, rounded, to
//   i16  a scale for each token, small enough for sums of products to fit into int32 in whatever order;
//   i8   a scale for each group of a token's values, scales[t * groups + i / size]; and `offsets`, -128
//        times the sum of a group's integers, or -8 times, make up for weights that are read as w + 128, or +
//        8;
//   u8   likewise, of values none of which is negative: half the rounding error, and int8 needs no offsets.
struct Values {
  const void* data;
  Type type;
  int64_t stride;
  const float* scales = nullptr;
  const int32_t* offsets = nullptr;
  int64_t groups = 1;
  // What accumulate rounds values to that meet u4: u8, where none is negative, i8, or f32: they stay as they
  // are.
  Type rounded = Type::f32;
};

// Sizes of groups: of inputs to rows (dot), and of values that rows are added up by (accumulate). INT8 raises
// the perplexity of opt-books-7m by 0.06%, with 128 for both by 0.16% (benchmarks/results/quality).
constexpr int64_t GROUP = 64;
constexpr int64_t ROW_GROUP = 128;
constexpr bool grouped(Type type) { return type == Type::i8 || type == Type::u8; }
constexpr int64_t groups_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Tokens of a block of dot_lanes: one lane each, in one or two vectors.
constexpr int64_t LANE_BLOCK = 32;
constexpr int64_t lane_width(int64_t tokens) { return tokens > 16 ? 32 : 16; }

// Of a block of tokens as pack_lanes leaves it: i8 with its scales and offsets behind it.
constexpr int64_t lane_bytes(Type type, int64_t columns) {
  return LANE_BLOCK * (type == Type::i8 ? columns + 8 * groups_of(columns, GROUP) : 2 * columns);
}

constexpr int64_t accumulate_scratch(int64_t tokens, int64_t columns) {
  constexpr int64_t MOST_COLUMNS = 64, MOST_ROWS = 128;  // of a tile; of a block
  const int64_t all = tokens * (columns + MOST_COLUMNS) + MOST_ROWS * MOST_COLUMNS + tokens * MOST_ROWS;
  // of u4: scales, and a block's values as they were rounded
  const int64_t rounded =
      MOST_ROWS * groups_of(columns, WEIGHT_GROUP) + tokens * (WEIGHT_GROUP + MOST_ROWS / 4 + 2);
  return 4 * (all + rounded + 64);
}

struct Kernels {
  const char* name;

  // Which type `dot` takes the other operand in, for weights and inputs of a type: bf16, i16 and i8 where
  // there are products of them, bf16 only with weights of bf16, i16 only with int8, i8 only with u4.
  Type (*dot_input)(Type weights, Type inputs);

  // out[t * ldo + i - begin] = sum over the segments' columns k of row_i[k] * x_t[k], for rows begin <= i <
  // end and t < tokens; x in dot_input's type; accumulated in fp32, of i16 in int32. Of u4 whole rows.
  void (*dot)(const Rows& rows, int64_t begin, int64_t end, const Values& x, int64_t tokens,
              const Segment* segments, int64_t num_segments, float* out, int64_t ldo);

  // out[t * ldo + c - column_begin] = sum over rows begin <= i < end of h_t[places[i]] * row_i[c], for
  // columns column_begin <= c < column_end; the order of the sum does not depend on the columns. h is in
  // dot_input's type; or i8 or u8 where there is dot_lanes for i8, and then places are 0, 1, ... and begin a
  // multiple of ROW_GROUP. With u4 in a float type, fp32 where they are not `rounded`; columns are whole
  // groups of WEIGHT_GROUP. `scratch`, aligned to 64 bytes, has accumulate_scratch(tokens, columns) bytes.
  // `add`: to what `out` holds.
  void (*accumulate)(const Rows& rows, int64_t begin, int64_t end, const Values& h, const int32_t* places,
                     int64_t tokens, int64_t column_begin, int64_t column_end, float* out, int64_t ldo,
                     char* scratch, bool add);

  // `dot` for many tokens, of which one block is multiplied, `x` as pack_lanes left it: bf16 with weights of
  // bf16, segments of even columns; i8 with int8 or u4, whole rows. Rows up to `last` are prefetched where
  // `prefetch` says so.
  void (*dot_lanes)(const Rows& rows, int64_t begin, int64_t end, int64_t last, const void* x,
                    int64_t columns, int64_t tokens, const Segment* segments, int64_t num_segments,
                    float* out, int64_t ldo, bool prefetch);
  // Whether dot_lanes takes inputs of a type, with so many columns.
  bool (*has_lanes)(Type type, int64_t columns);
  // A block of tokens for dot_lanes, lane_width(tokens) of them beside each other.
  void (*pack_lanes)(const Values& x, int64_t tokens, int64_t columns, void* to);

  // n values of a token to i16, i8 or u8, these in groups: scales and offsets as in Values, for weights that
  // are read `zero` too large; NaN where a value is not finite. Null where dot_input never says i16.
  void (*round)(const void* from, Type type, int64_t n, Type to_type, int64_t group, int32_t zero, void* to,
                float* scales, int32_t* offsets);

  // How many scores[i] + bias[i] are positive; any[i] becomes 1 where that one is.
  int64_t (*threshold)(const float* scores, const float* bias, int32_t* any, int64_t n);
  // to = ReLU(values * scale + bias), NaN as it is, of which `alive` gets the sums, squared where that is
  // asked for; a null scale is 1, a null bias 0
  void (*activate)(const float* values, const float* scale, const float* bias, float* alive, void* to,
                   Type type, int64_t n, bool square);
  void (*widen)(const void* from, Type type, float* to, int64_t n);
  // to = from * scale + bias, rounded to nearest, ties to even; a null scale is 1, a null bias 0
  void (*finish)(const float* from, const float* scale, const float* bias, void* to, Type type, int64_t n);
};

// Of this CPU, best first; never empty: "generic" is plain C++.
extern const Kernels avx512_bf16_kernels, avx512_vnni_kernels, avx512_kernels, avx2_kernels, generic_kernels;
const Kernels* const* supported(int* count);

}  // namespace dejavu
