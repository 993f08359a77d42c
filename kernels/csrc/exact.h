// The second half of an MLP whose first is vLLM's own, and of which no neuron was chosen.
#pragma once

#include <algorithm>

#include "mlp.h"

namespace dejavu {

namespace {

// x [tokens, ffn] through the activation, as values of a type, to be multiplied with weights.
Activations activated(const Tensor& x, Type type, Type weights, bool square) {
  const int64_t ffn = x.size(1);
  Activations h(type, weights, x.size(0), ffn, nullptr);
  share_out(ffn, COLUMN_UNIT, [&](int64_t first, int64_t last) {
    h.clear(first, last);
    float* row = scratch<TILE, float>(last - first);
    for (int64_t t = 0; t < h.tokens; ++t) {
      kernels().widen(at_element(x, t * x.stride(0) + first), type_of(x), row, last - first);
      h.take(t, first, last - first, row, nullptr, nullptr, square);
    }
  });
  return h;
}

// x [tokens, ffn], what fc1 gave, through the activation and fc2's rows of the neurons that came out
// positive: see `down`.
Tensor exact_down(const Tensor& x, const Tensor& fc2, const MaybeTensor& fc2_scale,
                  const MaybeTensor& fc2_output_scale, bool square, double crossover,
                  const MaybeTensor& counters) {
  const int64_t ffn = fc2.size(0), columns = width_of(fc2);
  check_matrix(x, -1, ffn, "x");
  check_matrix(fc2, x.size(1), columns, "fc2's transposed weight");
  check_weight(x, fc2, fc2_scale, columns, "fc2's transposed weight", true);
  check_output_scale(fc2, fc2_output_scale);
  check_counters(counters, ABOVE_CROSSOVER);
  Tensor out = at::empty({x.size(0), columns}, x.options());
  const int64_t all_tokens = x.size(0),
                chunks = std::max<int64_t>(1, (all_tokens + MLP_TOKENS - 1) / MLP_TOKENS);
  const Type from = type_of(x);
  const bool half = from == Type::bf16 && kernels().dot_input(type_of(fc2), from) != Type::f32;
  for (int64_t chunk = 0; chunk < chunks && all_tokens > 0; ++chunk) {
    const int64_t begin = all_tokens * chunk / chunks, tokens = all_tokens * (chunk + 1) / chunks - begin;
    Activations h =
        activated(x.narrow(0, begin, tokens), half ? Type::bf16 : Type::f32, type_of(fc2), square);
    const Needed needed =
        down({fc2, fc2_scale, fc2_output_scale}, h, from, crossover, out.narrow(0, begin, tokens));
    count(counters, STEPS, needed.tiles);
    count(counters, ROWS, tokens);
    if (counters) count(counters, SELECTED, tokens == 1 ? needed.survivors : h.positive());
    count(counters, READ, needed.read);
    count(counters, SURVIVED, needed.read);
    count(counters, ABOVE_CROSSOVER, h.tiles > 1 && needed.tiles == 1 ? 1 : 0);
  }
  return out;
}

}  // namespace

}  // namespace dejavu
