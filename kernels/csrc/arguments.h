// What an operation asks of its tensors, and the counters of a gate. Included by ops.cpp alone.
#pragma once

#include <algorithm>
#include <optional>
#include <string>

#include "common.h"

namespace dejavu {

namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t SEGMENT = 128;  // of a neuron list; as in kernels/interface.py
// As in vllm_dejavu/metrics.py.
enum Counter { STEPS, ROWS, SELECTED, READ, SURVIVED, CACHE_HELD, CACHE_READ, ACTIVE, HIT, ABOVE_CROSSOVER };

void check_matrix(const Tensor& t, int64_t rows, int64_t columns, const char* name) {
  TORCH_CHECK(
      t.device().is_cpu() && t.dim() == 2 && (rows < 0 || t.size(0) == rows) && width_of(t) == columns,
      "dejavu: ", name, " must be a CPU tensor [", rows < 0 ? "rows" : std::to_string(rows), ", ", columns,
      "], got ", t.sizes(), " on ", t.device());
  TORCH_CHECK(t.stride(1) == 1, "dejavu: rows of ", name, " must be contiguous, strides are ", t.strides());
}

void check_vector(const Tensor& t, int64_t size, at::ScalarType type, const char* name) {
  TORCH_CHECK(t.device().is_cpu() && t.dim() == 1 && t.size(0) == size && t.scalar_type() == type &&
                  t.is_contiguous(),
              "dejavu: ", name, " must be a contiguous CPU tensor [", size, "] of ", type, ", got ",
              t.sizes(), " of ", t.scalar_type(), " on ", t.device());
}

// A weight for inputs x: of x's dtype, int8 with a scale for each output, or uint8, two weights of 4 bits
// each, with floats for WEIGHT_GROUP columns of a row or, of a transposed one, for each column of so many
// rows.
void check_weight(const Tensor& x, const Tensor& weight, const MaybeTensor& scale, int64_t outputs,
                  const char* name, bool transposed = false) {
  if (weight.scalar_type() == at::kByte) {
    const int64_t rows = weight.size(0), columns = width_of(weight);
    TORCH_CHECK(columns % WEIGHT_GROUP == 0, "dejavu: ", name, " in 4 bits must have a multiple of ",
                WEIGHT_GROUP, " columns, got ", columns);
    TORCH_CHECK(columns <= MOST_SCALES * WEIGHT_GROUP, "dejavu: ", name, " in 4 bits has ", columns,
                " columns, more than ", MOST_SCALES * WEIGHT_GROUP);
    const bool own =
        scale && scale->dim() == 2 && scale->size(0) == rows && scale->size(1) == columns / WEIGHT_GROUP;
    const bool shared = scale && scale->dim() == 2 && transposed && scale->size(0) > 0 &&
                        rows % scale->size(0) == 0 && scale->size(1) == columns;
    TORCH_CHECK(scale && scale->device().is_cpu() && scale->is_floating_point() && scale->stride(1) == 1 &&
                    (own || shared),
                "dejavu: ", name, " in 4 bits needs floats [", rows, ", ", columns / WEIGHT_GROUP,
                "] as its scale, or, transposed, [a divisor of ", rows, ", ", columns, "], got ",
                scale ? c10::str(scale->sizes(), " of ", scale->scalar_type()) : std::string("none"));
    return;
  }
  if (weight.scalar_type() != at::kChar) {
    TORCH_CHECK(weight.scalar_type() == x.scalar_type() && !scale, "dejavu: ", name, " must have x's dtype ",
                x.scalar_type(), " and no scale, or be int8, got ", weight.scalar_type(),
                scale ? " and a scale" : "");
    return;
  }
  TORCH_CHECK(scale, "dejavu: ", name, " is int8 and needs a scale for each of its ", outputs, " outputs");
  check_vector(*scale, outputs, at::kFloat, "its scale");
}

// A scale for each output, beside those of groups of a transposed weight of 4 bits.
void check_output_scale(const Tensor& weight, const MaybeTensor& scale) {
  if (!scale) return;
  TORCH_CHECK(weight.scalar_type() == at::kByte, "dejavu: only weights of 4 bits have an output_scale, not ",
              weight.scalar_type());
  check_vector(*scale, width_of(weight), at::kFloat, "output_scale");
}

// Of its outputs; a weight of 4 bits has its own (rows_of).
const float* scale_of(const Tensor& weight, const MaybeTensor& scale) {
  return scale && weight.scalar_type() == at::kChar ? scale->data_ptr<float>() : nullptr;
}

void check_counters(const MaybeTensor& counters, Counter least = SURVIVED) {
  if (!counters) return;
  TORCH_CHECK(counters->device().is_cpu() && counters->scalar_type() == at::kLong &&
                  counters->is_contiguous() && counters->numel() > least,
              "dejavu: counters must be a contiguous CPU tensor of int64 with at least ", least + 1,
              " elements, got ", counters->sizes(), " of ", counters->scalar_type(), " on ",
              counters->device());
}

void count(const MaybeTensor& counters, Counter which, int64_t amount) {
  if (counters) counters->data_ptr<int64_t>()[which] += amount;
}

void count_dense(const Tensor& counters, const Tensor& once, const Tensor& per_row, const Tensor& row_lens) {
  check_counters(counters);
  check_vector(once, counters.numel(), at::kLong, "once");
  check_vector(per_row, counters.numel(), at::kLong, "per_row");
  check_vector(row_lens, row_lens.numel(), at::kInt, "row_lens");
  const auto* lens = row_lens.data_ptr<int32_t>();
  const int64_t rows = std::count_if(lens, lens + row_lens.numel(), [](int32_t len) { return len > 0; });
  auto* counter = counters.data_ptr<int64_t>();
  for (int64_t i = 0; i < counters.numel(); ++i)
    counter[i] += once.data_ptr<int64_t>()[i] + rows * per_row.data_ptr<int64_t>()[i];
}

}  // namespace

}  // namespace dejavu
