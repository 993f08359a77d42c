// Projections of attention that read only the selected heads' weights.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "products.h"

namespace dejavu {

namespace {

std::vector<bool> read_heads(const Tensor& head_scores, int64_t& selected) {
  const int64_t tokens = head_scores.size(0), heads = head_scores.size(1);
  const auto* scores = head_scores.data_ptr<float>();
  std::vector<bool> read(heads);
  selected = 0;
  for (int64_t i = 0; i < tokens * heads; ++i)
    if (scores[i] > 0) {
      read[i % heads] = true;
      ++selected;
    }
  return read;
}

void check_scores(const Tensor& head_scores, int64_t tokens, int64_t heads) {
  check_matrix(head_scores, tokens, heads, "head_scores");
  TORCH_CHECK(head_scores.scalar_type() == at::kFloat && head_scores.is_contiguous(),
              "dejavu: head_scores must be contiguous float32, got ", head_scores.scalar_type());
}

Tensor sparse_qkv(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& head_scores,
                  const Tensor& row_lens, int64_t head_size, const MaybeTensor& counters) {
  const int64_t tokens = x.size(0), heads = head_scores.size(1), queries = heads * head_size,
                all = weight.size(0);
  check_matrix(x, -1, weight.size(1), "x");
  check_matrix(weight, -1, x.size(1), "weight");
  check_scores(head_scores, tokens, heads);
  check_vector(row_lens, tokens, at::kInt, "row_lens");
  check_counters(counters);
  TORCH_CHECK(x.scalar_type() == weight.scalar_type() && all >= queries,
              "dejavu: weight must have x's dtype ", x.scalar_type(), " and at least ", queries,
              " rows, got ", weight.scalar_type(), " and ", all);
  int64_t selected;
  const auto read = read_heads(head_scores, selected);
  const Tensor input = x.contiguous();
  Tensor out = at::empty({tokens, all}, x.options());
  auto* list = scratch<LIST, int32_t>(all);
  int64_t n = 0, number = 0;
  for (int64_t head = 0; head < heads; ++head) {
    number += read[head];
    for (int64_t row = head * head_size; row < (head + 1) * head_size && read[head]; ++row)
      list[n++] = static_cast<int32_t>(row);
    if (!read[head])
      for (int64_t t = 0; t < tokens; ++t)
        std::fill_n(at_element(out, t * all + head * head_size), head_size * out.element_size(), 0);
  }
  for (int64_t row = queries; row < all; ++row) list[n++] = static_cast<int32_t>(row);
  project(rows_of(weight, list), n, Inputs(input, type_of(weight)), {{0, x.size(1)}}, widened(bias, all),
          out);
  if (counters) {
    count(counters, STEPS, 1);
    count(counters, Counter::ROWS, static_cast<int64_t>(valid_rows(row_lens).size()));
    count(counters, SELECTED, selected);
    count(counters, READ, number);
  }
  return out;
}

Tensor mask_heads(const Tensor& attn, const Tensor& head_scores) {
  TORCH_CHECK(attn.dim() == 3 && attn.device().is_cpu(),
              "dejavu: attn must be a CPU tensor [num_tokens, heads, head_size], got ", attn.sizes());
  check_scores(head_scores, attn.size(0), attn.size(1));
  Tensor out = attn.clone(at::MemoryFormat::Contiguous);
  const auto* scores = head_scores.data_ptr<float>();
  const int64_t bytes = attn.size(2) * attn.element_size();
  for (int64_t i = 0; i < head_scores.numel(); ++i)
    if (!(scores[i] > 0)) std::memset(static_cast<char*>(out.data_ptr()) + i * bytes, 0, bytes);
  return out;
}

void sparse_out_proj(const Tensor& attn, const Tensor& weight, const Tensor& head_scores,
                     const Tensor& output) {
  const int64_t tokens = attn.size(0), heads = attn.size(1), head_size = attn.size(2);
  check_matrix(weight, -1, heads * head_size, "weight");
  check_scores(head_scores, tokens, heads);
  check_matrix(output, tokens, weight.size(0), "output");
  TORCH_CHECK(attn.scalar_type() == weight.scalar_type() && attn.scalar_type() == output.scalar_type() &&
                  output.is_contiguous(),
              "dejavu: attn, weight and output must have one dtype, and output must be contiguous; got ",
              attn.scalar_type(), ", ", weight.scalar_type(), ", ", output.scalar_type(),
              ", output's strides ", output.strides());
  int64_t selected;
  const auto read = read_heads(head_scores, selected);
  std::vector<Segment> segments;
  for (int64_t head = 0; head < heads; ++head) {
    if (!read[head]) continue;
    const int64_t begin = head * head_size;
    if (!segments.empty() && segments.back().end == begin)
      segments.back().end += head_size;
    else
      segments.push_back({begin, begin + head_size});
  }
  const Tensor input = attn.contiguous().view({tokens, heads * head_size});
  project(rows_of(weight), weight.size(0), Inputs(input, type_of(weight), head_size % 2 == 0), segments,
          nullptr, output);
}

}  // namespace

}  // namespace dejavu
