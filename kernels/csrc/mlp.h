// The MLP of selected neurons, and of all of them; dense linears.
#pragma once

#include <algorithm>
#include <cmath>

#include "transposed.h"

namespace dejavu {

namespace {

constexpr int64_t MLP_TOKENS = 256;  // at once: what is between fc1 and fc2 stays in the caches
// Tokens from which on PyTorch's linears overtake ours where there are no lanes.
constexpr int64_t PLAIN_TOKENS = 16;
// With int8, all of which PyTorch would have widened each time: not measured.
constexpr int64_t PLAIN_INT8_TOKENS = 64;

// x through fc1's rows of the list (null: all of n) and ReLU, maybe squared, as values of a type, to be
// multiplied with fc2's weights; row_mask [tokens, ffn] may restrict a token to its own.
Activations up(const Inputs& x, const Tensor& fc1, const MaybeTensor& fc1_scale, const float* bias,
               const int32_t* list, int64_t n, const bool* row_mask, Type type, Type weights, bool square) {
  const int64_t ffn = fc1.size(0);
  const Rows rows = rows_of(fc1, fc1_scale, list);
  const Affine affine{scale_of(fc1, fc1_scale), bias};
  Activations h(type, weights, x.tokens, n, list);
  share_out(n, ROW_UNIT, [&](int64_t first, int64_t last) {
    const Segment all{0, x.columns};
    h.clear(first, last);
    const int64_t chunk = x.chunk(last - first);
    float *added = scratch<ADDED, float>(chunk),
          *scaled = affine.scale ? scratch<SCALED, float>(chunk) : nullptr;
    float* values = scratch<TILE, float>(x.block_tokens(0) * chunk);
    for (int64_t begin = first; begin < last; begin += chunk) {
      const int64_t end = std::min(last, begin + chunk), mine = end - begin;
      for (int64_t i = 0; i < mine; ++i) added[i] = affine.bias ? affine.bias[h.number(begin + i)] : 0;
      for (int64_t i = 0; i < mine && scaled; ++i) scaled[i] = affine.scale[h.number(begin + i)];
      for (int64_t block = 0; block < x.blocks(); ++block) {
        x.multiply(rows, begin, end, last, block, &all, 1, values, mine);
        for (int64_t i = 0; i < x.block_tokens(block); ++i) {
          const int64_t t = block * LANE_BLOCK + i;
          if (row_mask)
            for (int64_t j = 0; j < mine; ++j)
              if (!row_mask[t * ffn + h.number(begin + j)]) values[i * mine + j] = -INFINITY;
          h.take(t, begin, mine, values + i * mine, scaled, added, square);
        }
      }
    }
  });
  return h;
}

// h's type: fc2's own input; of int8 weights, whose inputs are rounded when all of a token's are known, fp32,
// or bf16 for many tokens, where h passes through memory.
Type between(const Inputs& x, Type from) {
  const Type type = x.values.type;
  if (type == Type::i16) return Type::f32;
  return type == Type::i8 ? (from == Type::bf16 ? Type::bf16 : Type::f32) : type;
}

// Weights of an MLP as they come from Python: fc1 [ffn, hidden], fc2 transposed [ffn, hidden]; in int8 with a
// scale for each output, fc1's rows and fc2's columns.
struct Mlp {
  const Tensor& fc1;
  const MaybeTensor &fc1_scale, &fc1_bias;
  const Tensor& fc2;
  const MaybeTensor &fc2_scale, &fc2_output_scale;
  bool square;  // what is positive, before fc2

  int64_t ffn() const { return fc1.size(0); }
  int64_t outputs() const { return width_of(fc2); }

  void check(const Tensor& x) const {
    check_matrix(x, -1, width_of(fc1), "x");
    check_matrix(fc1, -1, x.size(1), "fc1's weight");
    check_matrix(fc2, ffn(), outputs(), "fc2's transposed weight");
    check_weight(x, fc1, fc1_scale, ffn(), "fc1's weight");
    check_weight(x, fc2, fc2_scale, outputs(), "fc2's transposed weight", true);
    check_output_scale(fc2, fc2_output_scale);
    TORCH_CHECK(fc1.scalar_type() == fc2.scalar_type(), "dejavu: fc1 and fc2 must have one dtype, got ",
                fc1.scalar_type(), ", ", fc2.scalar_type());
  }
};

// x [tokens, hidden] through fc1's rows of the list, ReLU, and fc2's rows of the neurons that came out
// positive: see `down`. `bias`: fc1's, as fp32.
void mlp_rows(const Tensor& x, const Mlp& mlp, const float* bias, const int32_t* list, int64_t n,
              const bool* row_mask, double crossover, const MaybeTensor& counters, const Tensor& out) {
  const Inputs inputs(x, type_of(mlp.fc1));
  Activations h = up(inputs, mlp.fc1, mlp.fc1_scale, bias, list, n, row_mask, between(inputs, type_of(x)),
                     type_of(mlp.fc2), mlp.square);
  const Needed needed = down({mlp.fc2, mlp.fc2_scale, mlp.fc2_output_scale}, h, type_of(x), crossover, out);
  count(counters, SURVIVED, needed.survivors);
}

Tensor sparse_mlp(const Tensor& x, const Tensor& fc1, const MaybeTensor& fc1_scale,
                  const MaybeTensor& fc1_bias, const Tensor& fc2, const MaybeTensor& fc2_scale,
                  const MaybeTensor& fc2_output_scale, bool square, double crossover,
                  const Tensor& neuron_ids, const Tensor& counts, const Tensor& row_lens,
                  const MaybeTensor& row_mask, const MaybeTensor& counters) {
  const Mlp mlp{fc1, fc1_scale, fc1_bias, fc2, fc2_scale, fc2_output_scale, square};
  mlp.check(x);
  const int64_t ffn = mlp.ffn(), segments = (ffn + SEGMENT - 1) / SEGMENT;
  check_vector(neuron_ids, ffn, at::kInt, "neuron_ids");
  check_vector(counts, segments, at::kInt, "counts");
  check_vector(row_lens, x.size(0), at::kInt, "row_lens");
  if (row_mask) check_matrix(*row_mask, x.size(0), ffn, "row_mask");
  check_counters(counters);
  const auto valid = valid_rows(row_lens);
  const Tensor some = rows_at(x, valid), mask = row_mask ? rows_at(*row_mask, valid) : Tensor();
  Tensor out = at::empty({some.size(0), mlp.outputs()}, x.options());

  const auto *ids = neuron_ids.data_ptr<int32_t>(), *number = counts.data_ptr<int32_t>();
  auto* list = scratch<LIST, int32_t>(ffn);
  int64_t n = 0;
  for (int64_t s = 0; s < segments; ++s) n = std::copy_n(ids + s * SEGMENT, number[s], list + n) - list;
  mlp_rows(some, mlp, widened(fc1_bias, ffn), list, n, row_mask ? mask.data_ptr<bool>() : nullptr, crossover,
           counters, out);
  if (some.size(0) == x.size(0)) return out;
  return at::zeros({x.size(0), mlp.outputs()}, x.options()).index_copy_(0, at::tensor(valid, at::kLong), out);
}

// Whether PyTorch's own linears are faster.
bool better_plain(const Tensor& x, int64_t tokens, const Tensor& weight) {
  const Type type = many_tokens(kernels().dot_input(type_of(weight), type_of(x)), tokens);
  if (type == Type::bf16 || type == Type::i8) return false;
  return tokens >= (type == Type::i16 ? PLAIN_INT8_TOKENS : PLAIN_TOKENS);
}

// The weights of 4 bits as floats.
Tensor floats_of(const Tensor& weight, const Tensor& scale, const MaybeTensor& output_scale,
                 at::ScalarType type) {
  const int64_t rows = weight.size(0), columns = width_of(weight);
  const Tensor pieces = weight.view({rows, columns / PIECE, PIECE / 2});
  const Tensor integers = at::stack({pieces.bitwise_and(15), pieces.bitwise_right_shift(4)}, 2)
                              .view({rows, columns})
                              .to(at::kFloat)
                              .sub_(8);
  const Tensor scales = scale.to(at::kFloat).repeat_interleave(rows / scale.size(0), 0);
  const Tensor wide = integers * scales.repeat_interleave(columns / scale.size(1), 1);
  return (output_scale ? wide * *output_scale : wide).to(type);
}

// PyTorch's products with a weight [outputs, inputs], or transposed; integers are widened, which many tokens
// share.
Tensor plain_linear(const Tensor& x, const Tensor& weight, const MaybeTensor& scale, const MaybeTensor& bias,
                    bool transposed = false, const MaybeTensor& output_scale = std::nullopt) {
  const auto as_stored = [&](const Tensor& wide) { return transposed ? wide.t() : wide; };
  if (!scale) return at::linear(x, as_stored(weight), bias);
  if (type_of(weight) == Type::u4)
    return at::linear(x, as_stored(floats_of(weight, *scale, output_scale, x.scalar_type())), bias);
  Tensor out = at::linear(x, as_stored(weight.to(x.scalar_type()))).to(at::kFloat).mul_(*scale);
  return (bias ? out.add_(*bias) : out).to(x.scalar_type());
}

void linear(const Tensor& x, const Tensor& weight, const MaybeTensor& scale, const MaybeTensor& bias,
            const Tensor& output) {
  check_matrix(x, -1, width_of(weight), "x");
  check_matrix(weight, -1, x.size(1), "weight");
  check_weight(x, weight, scale, weight.size(0), "weight");
  check_matrix(output, x.size(0), weight.size(0), "output");
  TORCH_CHECK(x.scalar_type() == output.scalar_type() && output.is_contiguous(),
              "dejavu: output must have x's dtype ", x.scalar_type(), " and be contiguous; got ",
              output.scalar_type(), ", strides ", output.strides());
  const float* wide = widened(bias, weight.size(0));
  if (better_plain(x, x.size(0), weight)) {
    output.copy_(plain_linear(x, weight, scale, bias));
    return;
  }
  const Tensor input = x.contiguous();
  project(rows_of(weight, scale), weight.size(0), Inputs(input, type_of(weight)), {{0, x.size(1)}},
          {scale_of(weight, scale), wide}, output);
}

// The MLP over all neurons, but fc2's rows of neurons that came out 0 for the tokens of a tile: that changes
// nothing but the time.
Tensor dense_mlp(const Tensor& x, const Tensor& fc1, const MaybeTensor& fc1_scale,
                 const MaybeTensor& fc1_bias, const Tensor& fc2, const MaybeTensor& fc2_scale,
                 const MaybeTensor& fc2_output_scale, bool square, double crossover) {
  const Mlp mlp{fc1, fc1_scale, fc1_bias, fc2, fc2_scale, fc2_output_scale, square};
  mlp.check(x);
  const float* bias = widened(fc1_bias, fc1.size(0));
  if (better_plain(x, x.size(0), fc1)) {
    Tensor h = plain_linear(x, fc1, fc1_scale, fc1_bias).relu_();
    if (square) h.square_();
    return plain_linear(h, fc2, fc2_scale, std::nullopt, true, fc2_output_scale);
  }
  const Tensor input = x.contiguous();
  const int64_t tokens = x.size(0), chunks = std::max<int64_t>(1, (tokens + MLP_TOKENS - 1) / MLP_TOKENS);
  Tensor out = at::empty({tokens, mlp.outputs()}, x.options());
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t begin = tokens * i / chunks, count = tokens * (i + 1) / chunks - begin;
    mlp_rows(input.narrow(0, begin, count), mlp, bias, nullptr, fc1.size(0), nullptr, crossover, std::nullopt,
             out.narrow(0, begin, count));
  }
  return out;
}

}  // namespace

}  // namespace dejavu
