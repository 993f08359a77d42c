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
constexpr int64_t CHUNK_BYTES = 256 << 10;

Rows rows_of(const Tensor& weight, const int32_t* ids = nullptr) {
  return {weight.data_ptr(), weight.stride(0), ids, type_of(weight)};
}

// Inputs as products with weights of a type take them, in scratch memory where that is not as they are: many
// tokens for dot_lanes; else in dot's type. There, rows of a power of two of bytes would fall into the same
// few sets of the first cache: one line more sets them apart.
struct Inputs {
  const void* data;
  Type type;
  int64_t stride, tokens, columns;
  bool lanes;

  // even: rows are read from even columns on only
  Inputs(const Tensor& x, Type weights, bool even = true)
      : stride(x.size(1)), tokens(x.size(0)), columns(x.size(1)) {
    const Kernels& isa = kernels();
    const Type from = type_of(x);
    type = isa.dot_input(weights, from);
    data = x.data_ptr();
    const int64_t size = size_of(type);
    lanes =
        isa.dot_lanes != nullptr && type == Type::bf16 && tokens >= LANES_TOKENS && columns % 32 == 0 && even;
    if (lanes) {
      char* packed = scratch<INPUT, char>(blocks() * block_bytes());
      share_out(blocks(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          kernels().pack_lanes(at_element(x, i * LANE_BLOCK * columns), columns, block_tokens(i), columns,
                               packed + i * block_bytes());
      });
      data = packed;
      return;
    }
    const bool aliased = tokens > 1 && columns * size % ALIASING_BYTES == 0;
    if (type == from && !aliased) return;
    if (aliased) stride += CACHE_LINE / size;
    char* copy = scratch<INPUT, char>(tokens * stride * size);
    for (int64_t t = 0; t < tokens; ++t) {
      char* to = copy + t * stride * size;
      if (type == from)
        std::memcpy(to, at_element(x, t * columns), columns * size);
      else
        isa.widen(at_element(x, t * columns), from, reinterpret_cast<float*>(to), columns);
    }
    data = copy;
  }

  // Blocks of tokens that are multiplied one after the other: one where dot is used.
  int64_t blocks() const { return lanes ? (tokens + LANE_BLOCK - 1) / LANE_BLOCK : 1; }
  int64_t block_tokens(int64_t i) const {
    return lanes ? std::min(LANE_BLOCK, tokens - i * LANE_BLOCK) : tokens;
  }
  int64_t block_bytes() const { return LANE_BLOCK * columns * 2; }
  // Rows of weights that are multiplied with all blocks before the next.
  int64_t chunk(int64_t rows, int64_t row_bytes) const {
    return lanes ? std::clamp<int64_t>(CHUNK_BYTES / row_bytes / ROW_UNIT * ROW_UNIT, ROW_UNIT, 128)
                 : std::max<int64_t>(rows, 1);
  }

  // As Kernels::dot, for the tokens of a block; rows up to `last` come next.
  void multiply(const Rows& rows, int64_t begin, int64_t end, int64_t last, int64_t block,
                const Segment* segments, int64_t num_segments, float* out, int64_t ldo) const {
    if (lanes)
      kernels().dot_lanes(rows, begin, end, last, static_cast<const char*>(data) + block * block_bytes(),
                          block_tokens(block), segments, num_segments, out, ldo, block == 0);
    else
      kernels().dot(rows, begin, end, data, type, stride, tokens, segments, num_segments, out, ldo);
  }
};

const float* widened(const MaybeTensor& bias, int64_t size) {
  if (!bias) return nullptr;
  TORCH_CHECK(bias->numel() == size && bias->is_contiguous(), "dejavu: bias must have ", size,
              " contiguous elements, got ", bias->sizes());
  auto* wide = scratch<BIAS, float>(size);
  kernels().widen(bias->data_ptr(), type_of(*bias), wide, size);
  return wide;
}

// out[t, id of row i] = dot of row i with x[t] over the segments + bias[id], for rows i < n, ids of which
// ascend.
void project(const Rows& rows, int64_t n, const Inputs& x, const std::vector<Segment>& segments,
             const float* bias, const Tensor& out) {
  const Type type = type_of(out);
  const int64_t width = out.size(1), size = out.element_size();
  char* to = static_cast<char*>(out.data_ptr());
  share_out(n, ROW_UNIT, [&](int64_t first, int64_t last) {
    const Kernels& isa = kernels();
    const auto id = [&](int64_t i) { return rows.ids ? static_cast<int64_t>(rows.ids[i]) : i; };
    const int64_t chunk = x.chunk(last - first, rows.stride * size_of(rows.type));
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
            isa.finish(values + t * mine + i - begin, bias ? bias + id(i) : bias,
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
