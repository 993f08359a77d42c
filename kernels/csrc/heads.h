// Projections of attention that read only the selected heads' weights.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "mlp.h"

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

int64_t selected_heads(const Tensor& head_scores) {
  const auto* scores = head_scores.data_ptr<float>();
  return std::count_if(scores, scores + head_scores.numel(), [](float score) { return score > 0; });
}

void check_scores(const Tensor& head_scores, int64_t tokens, int64_t heads) {
  check_matrix(head_scores, tokens, heads, "head_scores");
  TORCH_CHECK(head_scores.scalar_type() == at::kFloat && head_scores.is_contiguous(),
              "dejavu: head_scores must be contiguous float32, got ", head_scores.scalar_type());
}

Tensor sparse_qkv(const Tensor& x, const Tensor& weight, const MaybeTensor& scale, const MaybeTensor& bias,
                  const Tensor& head_scores, const Tensor& row_lens, int64_t head_size,
                  const MaybeTensor& counters) {
  const int64_t tokens = x.size(0), heads = head_scores.size(1), queries = heads * head_size,
                all = weight.size(0);
  check_matrix(x, -1, width_of(weight), "x");
  check_matrix(weight, -1, x.size(1), "weight");
  check_scores(head_scores, tokens, heads);
  check_vector(row_lens, tokens, at::kInt, "row_lens");
  check_counters(counters);
  check_weight(x, weight, scale, all, "weight");
  TORCH_CHECK(all >= queries, "dejavu: weight must have at least ", queries, " rows, got ", all);
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
  project(rows_of(weight, scale, list), n, Inputs(input, type_of(weight)), {{0, x.size(1)}},
          {scale_of(weight, scale), widened(bias, all)}, out);
  if (counters) {
    count(counters, STEPS, 1);
    count(counters, Counter::ROWS, static_cast<int64_t>(valid_rows(row_lens).size()));
    count(counters, SELECTED, selected);
    count(counters, READ, number);
  }
  return out;
}

// In place, where `attn` is contiguous.
void zero_heads(const Tensor& attn, const Tensor& head_scores) {
  const auto* scores = head_scores.data_ptr<float>();
  const int64_t bytes = attn.size(2) * attn.element_size();
  for (int64_t i = 0; i < head_scores.numel(); ++i)
    if (!(scores[i] > 0)) std::memset(static_cast<char*>(attn.data_ptr()) + i * bytes, 0, bytes);
}

Tensor mask_heads(const Tensor& attn, const Tensor& head_scores) {
  TORCH_CHECK(attn.dim() == 3 && attn.device().is_cpu(),
              "dejavu: attn must be a CPU tensor [num_tokens, heads, head_size], got ", attn.sizes());
  check_scores(head_scores, attn.size(0), attn.size(1));
  Tensor out = attn.clone(at::MemoryFormat::Contiguous);
  zero_heads(out, head_scores);
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
  project(rows_of(weight, std::nullopt), weight.size(0), Inputs(input, type_of(weight), head_size % 2 == 0),
          segments, {nullptr, nullptr}, output);
}

// The columns of some heads, n of them, side by side: [tokens, n].
Tensor heads_of(const Tensor& attn, const std::vector<bool>& read, int64_t n) {
  const int64_t tokens = attn.size(0), heads = attn.size(1), bytes = attn.size(2) * attn.element_size();
  if (n == heads * attn.size(2)) return attn.view({tokens, n});
  Tensor out = at::empty({tokens, n}, attn.options());
  auto* to = static_cast<char*>(out.data_ptr());
  for (int64_t i = 0; i < tokens * heads; ++i)
    if (read[i % heads]) {
      std::memcpy(to, static_cast<const char*>(attn.data_ptr()) + i * bytes, bytes);
      to += bytes;
    }
  return out;
}

// Inputs of a transposed weight.
Values as_activations(const Tensor& x, const Tensor& weight) {
  const int64_t tokens = x.size(0), n = x.size(1);
  const Type from = type_of(x), type = many_tokens(kernels().dot_input(type_of(weight), from), tokens);
  if (type_of(weight) == Type::u4 && type == Type::i8) {
    Values values{x.data_ptr(), from, n};
    values.rounded = type;
    return values;
  }
  if (type != Type::i16 && type != Type::i8)
    return type == from ? Values{x.data_ptr(), from, n}
                        : Inputs::copied(x, type, apart(n, size_of(type), tokens));
  return rounded<INPUT, INPUT_SCALES, INPUT_OFFSETS>({x.data_ptr(), from, n}, tokens, n, type, ROW_GROUP);
}

// The same with a transposed weight [heads * head_size, hidden], of which a head is whole rows; a head that
// no token selected may hold anything. head_scores: none: all heads.
void transposed_out_proj(const Tensor& attn, const Tensor& weight, const MaybeTensor& scale,
                         const MaybeTensor& output_scale, const MaybeTensor& head_scores,
                         const Tensor& output) {
  TORCH_CHECK(attn.dim() == 3, "dejavu: attn must be [num_tokens, heads, head_size], got ", attn.sizes());
  const int64_t tokens = attn.size(0), heads = attn.size(1), head_size = attn.size(2),
                all = heads * head_size;
  const int64_t hidden = width_of(weight);
  check_matrix(weight, all, hidden, "transposed weight");
  check_weight(attn, weight, scale, hidden, "transposed weight", true);
  check_output_scale(weight, output_scale);
  if (head_scores) check_scores(*head_scores, tokens, heads);
  check_matrix(output, tokens, hidden, "output");
  TORCH_CHECK(attn.scalar_type() == output.scalar_type() && output.is_contiguous(),
              "dejavu: output must have attn's dtype ", attn.scalar_type(), " and be contiguous; got ",
              output.scalar_type(), ", strides ", output.strides());
  if (!head_scores && better_plain(attn, tokens, weight)) {
    output.copy_(plain_linear(attn.reshape({tokens, all}), weight, scale, std::nullopt, true, output_scale));
    return;
  }
  int64_t selected;
  const auto read = head_scores ? read_heads(*head_scores, selected) : std::vector<bool>(heads, true);
  auto* list = scratch<LIST, int32_t>(all);
  int64_t n = 0;
  for (int64_t row = 0; row < all; ++row)
    if (read[row / head_size]) list[n++] = static_cast<int32_t>(row);
  const Tensor input = heads_of(attn.contiguous(), read, n);
  auto* places = scratch<ALIVE_LIST, int32_t>(n);
  std::iota(places, places + n, 0);
  for (int64_t begin = 0; begin < tokens; begin += MLP_TOKENS) {
    const int64_t some = std::min(MLP_TOKENS, tokens - begin);
    const Tensor part = input.narrow(0, begin, some);
    multiply({weight, scale, output_scale}, as_activations(part, weight), {list, places, n}, some,
             output.narrow(0, begin, some));
  }
}

}  // namespace

}  // namespace dejavu
