// Products of gathered rows with the tokens of a batch, whatever the number of tokens and the types.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "arguments.h"

namespace dejavu {

namespace {

constexpr int64_t ROW_UNIT = 8;  // rows that a tile takes at once, at most
constexpr int64_t CACHE_LINE = 64, ALIASING_BYTES = 1024;
// Tokens from which on dot_lanes overtakes dot (Zen 4, OPT-125M's and 1.3B's layers).
constexpr int64_t LANES_TOKENS = 13;
// Of rows that all blocks of tokens are multiplied with: in the second cache beside a block.
constexpr int64_t CHUNK_BYTES = 256 << 10, MOST_CHUNK = 128;
// A multiple of the rows of a tile of dot_lanes.
constexpr int64_t chunk_unit(Type type) { return type == Type::i8 ? 24 : ROW_UNIT; }
constexpr int64_t TOKEN_UNIT = 8;  // that one thread rounds

Rows rows_of(const Tensor& weight, const MaybeTensor& scale, const int32_t* ids = nullptr) {
  Rows rows{weight.data_ptr(), weight.stride(0), ids, type_of(weight)};
  if (rows.type == Type::u4)
    rows.scales = {scale->data_ptr(), type_of(*scale), scale->stride(0), weight.size(0) / scale->size(0)};
  return rows;
}

// What int8 weights are multiplied with: i8 for many tokens, where products decide, if there are such; more
// exact for few.
Type many_tokens(Type type, int64_t tokens) {
  const bool quads = kernels().has_lanes != nullptr && kernels().has_lanes(Type::i8, 4);
  return type == Type::i16 && quads && tokens >= LANES_TOKENS ? Type::i8 : type;
}

Values from_token(Values x, int64_t t) {
  x.data = static_cast<const char*>(x.data) + t * x.stride * size_of(x.type);
  x.scales += t * x.groups;
  x.offsets += t * x.groups;
  return x;
}

// Rows of inputs of a power of two of bytes would fall into the same few sets of the first cache: one line
// more sets them apart.
int64_t apart(int64_t columns, int64_t size, int64_t tokens) {
  return tokens > 1 && columns * size % ALIASING_BYTES == 0 ? columns + CACHE_LINE / size : columns;
}

// Tokens' values, of n columns each, rounded to i16, i8 or u8 in scratch memory.
template <Purpose DATA, Purpose SCALES, Purpose OFFSETS>
Values rounded(const Values& from, int64_t tokens, int64_t n, Type type, int64_t group = GROUP,
               int32_t zero = 128) {
  const int64_t stride = apart(n, size_of(type), tokens), groups = grouped(type) ? groups_of(n, group) : 1;
  char* to = scratch<DATA, char>(tokens * stride * size_of(type));
  float* scales = scratch<SCALES, float>(tokens * groups);
  int32_t* offsets = scratch<OFFSETS, int32_t>(tokens * groups);
  share_out(tokens, TOKEN_UNIT, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      kernels().round(static_cast<const char*>(from.data) + t * from.stride * size_of(from.type), from.type,
                      n, type, group, zero, to + t * stride * size_of(type), scales + t * groups,
                      offsets + t * groups);
  });
  return {to, type, stride, scales, offsets, groups};
}

// Inputs as products with weights of a type take them, in scratch memory where that is not as they are: many
// tokens for dot_lanes, to int8 weights in i8; else in dot's type.
struct Inputs {
  Values values;
  int64_t tokens, columns;
  bool lanes;

  // may_lanes: false where rows are read from odd columns on, or values are not to be rounded to i8.
  Inputs(const Tensor& x, Type weights, bool may_lanes = true) : tokens(x.size(0)), columns(x.size(1)) {
    const Kernels& isa = kernels();
    const Type from = type_of(x);
    Type type = isa.dot_input(weights, from);
    values = {x.data_ptr(), from, columns};
    const Type many = many_tokens(type, tokens);
    lanes = isa.has_lanes != nullptr && may_lanes && tokens >= LANES_TOKENS && isa.has_lanes(many, columns);
    if (lanes) type = many;
    if (type == Type::i16 || type == Type::i8)
      values = rounded<INPUT, INPUT_SCALES, INPUT_OFFSETS>(
          values, tokens, columns, type, weights == Type::u4 && !lanes ? WEIGHT_GROUP : GROUP,
          weights == Type::u4 ? 8 : 128);
    else if (const int64_t stride = apart(columns, size_of(type), tokens);
             type != from || (!lanes && stride != columns))
      values = copied(x, type, stride);
    if (!lanes) return;
    char* packed = scratch<PACKED, char>(blocks() * block_bytes());
    share_out(blocks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        isa.pack_lanes(from_token(values, i * LANE_BLOCK), block_tokens(i), columns,
                       packed + i * block_bytes());
    });
    values.data = packed;
  }

  static Values copied(const Tensor& x, Type type, int64_t stride) {
    const int64_t columns = x.size(1), size = size_of(type);
    const Type from = type_of(x);
    char* copy = scratch<INPUT, char>(x.size(0) * stride * size);
    for (int64_t t = 0; t < x.size(0); ++t) {
      char* to = copy + t * stride * size;
      if (type == from)
        std::memcpy(to, at_element(x, t * columns), columns * size);
      else
        kernels().widen(at_element(x, t * columns), from, reinterpret_cast<float*>(to), columns);
    }
    return {copy, type, stride};
  }

  // Blocks of tokens that are multiplied one after the other: one where dot is used.
  int64_t blocks() const { return lanes ? (tokens + LANE_BLOCK - 1) / LANE_BLOCK : 1; }
  int64_t block_tokens(int64_t i) const {
    return lanes ? std::min(LANE_BLOCK, tokens - i * LANE_BLOCK) : tokens;
  }
  int64_t block_bytes() const { return lane_bytes(values.type, columns); }
  // Rows of weights that are multiplied with all blocks before the next.
  int64_t chunk(int64_t rows) const {
    if (!lanes) return std::max<int64_t>(rows, 1);
    const int64_t unit = chunk_unit(values.type), row_bytes = lane_bytes(values.type, columns) / LANE_BLOCK;
    return std::clamp<int64_t>(CHUNK_BYTES / row_bytes, unit, MOST_CHUNK) / unit * unit;
  }

  // As Kernels::dot, for the tokens of a block; rows up to `last` come next.
  void multiply(const Rows& rows, int64_t begin, int64_t end, int64_t last, int64_t block,
                const Segment* segments, int64_t num_segments, float* out, int64_t ldo) const {
    if (lanes)
      kernels().dot_lanes(rows, begin, end, last,
                          static_cast<const char*>(values.data) + block * block_bytes(), columns,
                          block_tokens(block), segments, num_segments, out, ldo, block == 0);
    else
      kernels().dot(rows, begin, end, values, tokens, segments, num_segments, out, ldo);
  }
};

// What is done to a sum of products before it is an output: a scale and a bias for each output, or null.
struct Affine {
  const float *scale, *bias;
};

const float* widened(const MaybeTensor& bias, int64_t size) {
  if (!bias) return nullptr;
  TORCH_CHECK(bias->numel() == size && bias->is_contiguous(), "dejavu: bias must have ", size,
              " contiguous elements, got ", bias->sizes());
  auto* wide = scratch<BIAS, float>(size);
  kernels().widen(bias->data_ptr(), type_of(*bias), wide, size);
  return wide;
}

// out[t, id of row i] = dot of row i with x[t] over the segments * scale[id] + bias[id], for rows i < n, ids
// of which ascend.
void project(const Rows& rows, int64_t n, const Inputs& x, const std::vector<Segment>& segments,
             const Affine& affine, const Tensor& out) {
  const Type type = type_of(out);
  const int64_t width = out.size(1), size = out.element_size();
  char* to = static_cast<char*>(out.data_ptr());
  share_out(n, ROW_UNIT, [&](int64_t first, int64_t last) {
    const Kernels& isa = kernels();
    const auto id = [&](int64_t i) { return rows.ids ? static_cast<int64_t>(rows.ids[i]) : i; };
    const int64_t chunk = x.chunk(last - first);
    float* values = scratch<TILE, float>(x.block_tokens(0) * chunk);
    for (int64_t begin = first; begin < last; begin += chunk) {
      const int64_t end = std::min(last, begin + chunk), mine = end - begin;
      for (int64_t block = 0; block < x.blocks(); ++block) {
        x.multiply(rows, begin, end, last, block, segments.data(), static_cast<int64_t>(segments.size()),
                   values, mine);
        for (int64_t i = begin, next; i < end; i = next) {  // runs of consecutive rows
          next = i + 1;
          while (next < end && id(next) == id(next - 1) + 1) ++next;
          for (int64_t t = 0; t < x.block_tokens(block); ++t)
            isa.finish(values + t * mine + i - begin, affine.scale ? affine.scale + id(i) : nullptr,
                       affine.bias ? affine.bias + id(i) : nullptr,
                       to + ((block * LANE_BLOCK + t) * width + id(i)) * size, type, next - i);
        }
      }
    }
  });
}

std::vector<int64_t> valid_rows(const Tensor& row_lens) {
  std::vector<int64_t> valid;
  const auto* lens = row_lens.data_ptr<int32_t>();
  for (int64_t t = 0; t < row_lens.numel(); ++t)
    if (lens[t] > 0) valid.push_back(t);
  return valid;
}

// Of the rows that hold a token; `x` itself when all do.
Tensor rows_at(const Tensor& x, const std::vector<int64_t>& valid) {
  return static_cast<int64_t>(valid.size()) == x.size(0) ? x.contiguous()
                                                         : x.index_select(0, at::tensor(valid, at::kLong));
}

}  // namespace

}  // namespace dejavu
