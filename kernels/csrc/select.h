// Predict and select: scores of heads; neurons, their union over the rows of a batch, and their list.
#pragma once

#include <algorithm>
#include <atomic>
#include <tuple>

#include "products.h"

namespace dejavu {

namespace {

Tensor score_heads(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& row_lens) {
  check_matrix(x, -1, weight.size(1), "x");
  check_matrix(weight, -1, x.size(1), "weight of the head predictor");
  check_vector(bias, weight.size(0), at::kFloat, "bias of the head predictor");
  check_vector(row_lens, x.size(0), at::kInt, "row_lens");
  const auto valid = valid_rows(row_lens);
  const Tensor some = rows_at(x, valid);
  Tensor scores = at::empty({some.size(0), weight.size(0)}, x.options().dtype(at::kFloat));
  // Predictors are multiplied in fp32 whatever their type: a selection must not depend on the instruction
  // set.
  const Tensor wide = some.to(at::kFloat);
  project(rows_of(weight, std::nullopt), weight.size(0), Inputs(wide, type_of(weight)), {{0, x.size(1)}},
          {nullptr, bias.data_ptr<float>()}, scores);
  if (some.size(0) == x.size(0)) return scores;
  return at::full({x.size(0), weight.size(0)}, -1.0, scores.options())
      .index_copy_(0, at::tensor(valid, at::kLong), scores);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select_neurons(
    const Tensor& x, const Tensor& down, const Tensor& up, const Tensor& bias, const Tensor& row_lens,
    bool with_row_mask, const MaybeTensor& head_x, const MaybeTensor& head_weight,
    const MaybeTensor& head_bias, const MaybeTensor& counters) {
  const int64_t ffn = up.size(0), rank = up.size(1), segments = (ffn + SEGMENT - 1) / SEGMENT;
  check_matrix(x, -1, down.size(1), "x");
  check_matrix(down, rank, x.size(1), "down");
  check_matrix(up, -1, rank, "up");
  check_vector(bias, ffn, at::kFloat, "bias of the MLP predictor");
  check_counters(counters);
  check_vector(row_lens, x.size(0), at::kInt, "row_lens");
  const auto valid = valid_rows(row_lens);
  const int64_t tokens = static_cast<int64_t>(valid.size());
  // Integers' sums are exact, and those of floats in fp32 whatever their type: a selection must not depend on
  // the instruction set.
  const Tensor some = rows_at(x, valid);
  const Tensor input =
      kernels().dot_input(type_of(down), type_of(x)) == Type::i16 ? some : some.to(at::kFloat);
  Tensor low = at::empty({tokens, rank}, x.options().dtype(at::kFloat));
  project(rows_of(down, std::nullopt), rank, Inputs(input, type_of(down), /*may_lanes=*/false),
          {{0, x.size(1)}}, {nullptr, nullptr}, low);
  Values values{low.data_ptr(), Type::f32, rank};
  if (kernels().dot_input(type_of(up), type_of(x)) == Type::i16)
    values = rounded<ROUNDED, ROUNDED_SCALES, ROUNDED_OFFSETS>(values, tokens, rank, Type::i16);

  Tensor ids = at::empty({ffn}, x.options().dtype(at::kInt)), counts = at::empty({segments}, ids.options());
  Tensor mask = at::zeros({with_row_mask ? x.size(0) : 0, ffn}, x.options().dtype(at::kBool));
  auto *id = ids.data_ptr<int32_t>(), *number = counts.data_ptr<int32_t>();
  auto* chosen_by = with_row_mask ? mask.data_ptr<bool>() : nullptr;
  const auto* threshold = bias.data_ptr<float>();
  const Rows rows = rows_of(up, std::nullopt);
  std::atomic<int64_t> selected{0};
  share_out(segments, 1, [&](int64_t first, int64_t last) {
    float* scores = scratch<TILE, float>(tokens * SEGMENT);
    const Segment all{0, rank};
    int64_t mine = 0;
    for (int64_t s = first; s < last; ++s) {
      const int64_t begin = s * SEGMENT, n = std::min(SEGMENT, ffn - begin);
      kernels().dot(rows, begin, begin + n, values, tokens, &all, 1, scores, SEGMENT);
      int32_t any[SEGMENT] = {};
      for (int64_t t = 0; t < tokens; ++t) {
        mine += kernels().threshold(scores + t * SEGMENT, threshold + begin, any, n);
        if (chosen_by)
          for (int64_t j = 0; j < n; ++j)
            chosen_by[valid[t] * ffn + begin + j] = scores[t * SEGMENT + j] + threshold[begin + j] > 0;
      }
      int32_t found = 0;
      for (int64_t j = 0; j < n; ++j) {
        id[begin + found] = static_cast<int32_t>(begin + j);
        found += any[j];
      }
      number[s] = found;
      std::fill(id + begin + found, id + begin + n, static_cast<int32_t>(ffn));
    }
    selected += mine;
  });
  if (counters) {
    int64_t read = 0;
    for (int64_t s = 0; s < segments; ++s) read += number[s];
    count(counters, STEPS, 1);
    count(counters, Counter::ROWS, tokens);
    count(counters, SELECTED, selected);
    count(counters, READ, read);
  }
  return {
      ids, counts, mask,
      head_x ? score_heads(*head_x, *head_weight, *head_bias, row_lens) : at::empty({0, 0}, low.options())};
}

}  // namespace

}  // namespace dejavu
