// The native CPU kernels as PyTorch operations (torch.ops.dejavu_cpu), with the meaning of kernels/reference.py.
#include <sys/mman.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common.h"

namespace dejavu {

namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t SEGMENT = 128;  // of a neuron list; as in kernels/reference.py
enum Counter { STEPS, ROWS, SELECTED, READ, SURVIVED };
constexpr int64_t ROW_UNIT = 8;         // rows that a tile takes at once, at most
constexpr int64_t COLUMN_UNIT = 64;     // columns that an accumulate tile takes at once
constexpr int64_t LEAST_COLUMNS = 256;  // of a task of fc2: narrower pieces of rows would waste prefetches
constexpr int64_t LEAST_ROWS = 64;
constexpr int64_t CACHE_LINE = 64, ALIASING_BYTES = 1024;
constexpr int64_t LANES_TOKENS = 13;        // from which on dot_lanes overtakes dot (Zen 4, OPT-125M's and 1.3B's layers)
constexpr int64_t CHUNK_BYTES = 256 << 10;  // of rows that all blocks of tokens are multiplied with: in the second cache beside a block
constexpr int64_t SUMS_BYTES = 256 << 10;   // of fc2's columns at a time: likewise
constexpr int64_t MLP_TOKENS = 256;         // at once: what is between fc1 and fc2 stays in the caches
constexpr int64_t PLAIN_TOKENS = 16;        // from which on PyTorch's linears overtake ours where bf16 products are not native

std::atomic<const Kernels*> chosen{nullptr};

std::vector<std::string> isas() {
  int count;
  const Kernels* const* list = supported(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(list[i]->name);
  return names;
}

void use_isa(std::string name) {
  int count;
  const Kernels* const* list = supported(&count);
  for (int i = 0; i < count; ++i)
    if (name.empty() || name == list[i]->name) {
      chosen = list[i];
      return;
    }
  std::string all;
  for (const auto& n : isas()) all += " " + n;
  TORCH_CHECK(false, "dejavu: this CPU or build has no instruction set '", name, "'; it has:", all, " (VLLM_DEJAVU_CPU_ISA)");
}

std::string isa() { return kernels().name; }

void check_matrix(const Tensor& t, int64_t rows, int64_t columns, const char* name) {
  TORCH_CHECK(t.device().is_cpu() && t.dim() == 2 && (rows < 0 || t.size(0) == rows) && t.size(1) == columns, "dejavu: ", name,
              " must be a CPU tensor [", rows < 0 ? "rows" : std::to_string(rows), ", ", columns, "], got ", t.sizes(), " on ", t.device());
  TORCH_CHECK(t.stride(1) == 1, "dejavu: rows of ", name, " must be contiguous, strides are ", t.strides());
}

void check_vector(const Tensor& t, int64_t size, at::ScalarType type, const char* name) {
  TORCH_CHECK(t.device().is_cpu() && t.dim() == 1 && t.size(0) == size && t.scalar_type() == type && t.is_contiguous(), "dejavu: ", name,
              " must be a contiguous CPU tensor [", size, "] of ", type, ", got ", t.sizes(), " of ", t.scalar_type(), " on ", t.device());
}

Rows rows_of(const Tensor& weight, const int32_t* ids = nullptr) { return {weight.data_ptr(), weight.stride(0), ids, type_of(weight)}; }

void check_counters(const MaybeTensor& counters) {
  if (!counters) return;
  TORCH_CHECK(counters->device().is_cpu() && counters->scalar_type() == at::kLong && counters->is_contiguous() && counters->numel() > SURVIVED,
              "dejavu: counters must be a contiguous CPU tensor of int64 with at least ", SURVIVED + 1, " elements, got ", counters->sizes(), " of ",
              counters->scalar_type(), " on ", counters->device());
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
  for (int64_t i = 0; i < counters.numel(); ++i) counter[i] += once.data_ptr<int64_t>()[i] + rows * per_row.data_ptr<int64_t>()[i];
}

// Inputs as products with weights of a type take them, in scratch memory where that is not as they are: many tokens for
// dot_lanes; else in dot's type. There, rows of a power of two of bytes would fall into the same few sets of the first cache:
// one line more sets them apart.
struct Inputs {
  const void* data;
  Type type;
  int64_t stride, tokens, columns;
  bool lanes;

  // even: rows are read from even columns on only
  Inputs(const Tensor& x, Type weights, bool even = true) : stride(x.size(1)), tokens(x.size(0)), columns(x.size(1)) {
    const Kernels& isa = kernels();
    const Type from = type_of(x);
    type = isa.dot_input(weights, from);
    data = x.data_ptr();
    const int64_t size = size_of(type);
    lanes = isa.dot_lanes != nullptr && type == Type::bf16 && tokens >= LANES_TOKENS && columns % 32 == 0 && even;
    if (lanes) {
      char* packed = scratch<INPUT, char>(blocks() * block_bytes());
      share_out(blocks(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          kernels().pack_lanes(at_element(x, i * LANE_BLOCK * columns), columns, block_tokens(i), columns, packed + i * block_bytes());
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
      if (type == from) std::memcpy(to, at_element(x, t * columns), columns * size);
      else isa.widen(at_element(x, t * columns), from, reinterpret_cast<float*>(to), columns);
    }
    data = copy;
  }

  // Blocks of tokens that are multiplied one after the other: one where dot is used.
  int64_t blocks() const { return lanes ? (tokens + LANE_BLOCK - 1) / LANE_BLOCK : 1; }
  int64_t block_tokens(int64_t i) const { return lanes ? std::min(LANE_BLOCK, tokens - i * LANE_BLOCK) : tokens; }
  int64_t block_bytes() const { return LANE_BLOCK * columns * 2; }
  // Rows of weights that are multiplied with all blocks before the next.
  int64_t chunk(int64_t rows, int64_t row_bytes) const {
    return lanes ? std::clamp<int64_t>(CHUNK_BYTES / row_bytes / ROW_UNIT * ROW_UNIT, ROW_UNIT, 128) : std::max<int64_t>(rows, 1);
  }

  // As Kernels::dot, for the tokens of a block; rows up to `last` come next.
  void multiply(const Rows& rows, int64_t begin, int64_t end, int64_t last, int64_t block, const Segment* segments, int64_t num_segments, float* out, int64_t ldo) const {
    if (lanes)
      kernels().dot_lanes(rows, begin, end, last, static_cast<const char*>(data) + block * block_bytes(), block_tokens(block), segments, num_segments,
                          out, ldo, block == 0);
    else kernels().dot(rows, begin, end, data, type, stride, tokens, segments, num_segments, out, ldo);
  }
};

const float* widened(const MaybeTensor& bias, int64_t size) {
  if (!bias) return nullptr;
  TORCH_CHECK(bias->numel() == size && bias->is_contiguous(), "dejavu: bias must have ", size, " contiguous elements, got ", bias->sizes());
  auto* wide = scratch<BIAS, float>(size);
  kernels().widen(bias->data_ptr(), type_of(*bias), wide, size);
  return wide;
}

// out[t, id of row i] = dot of row i with x[t] over the segments + bias[id], for rows i < n, ids of which ascend.
void project(const Rows& rows, int64_t n, const Inputs& x, const std::vector<Segment>& segments, const float* bias, const Tensor& out) {
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
        x.multiply(rows, begin, end, last, block, segments.data(), static_cast<int64_t>(segments.size()), values, mine);
        for (int64_t i = begin, next; i < end; i = next) {  // runs of consecutive rows
          next = i + 1;
          while (next < end && id(next) == id(next - 1) + 1) ++next;
          for (int64_t t = 0; t < x.block_tokens(block); ++t)
            isa.finish(values + t * mine + i - begin, bias ? bias + id(i) : bias, to + ((block * LANE_BLOCK + t) * width + id(i)) * size, type,
                       next - i);
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
  return static_cast<int64_t>(valid.size()) == x.size(0) ? x.contiguous() : x.index_select(0, at::tensor(valid, at::kLong));
}

Tensor score_heads(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& row_lens) {
  check_matrix(x, -1, weight.size(1), "x");
  check_matrix(weight, -1, x.size(1), "weight of the head predictor");
  check_vector(bias, weight.size(0), at::kFloat, "bias of the head predictor");
  check_vector(row_lens, x.size(0), at::kInt, "row_lens");
  const auto valid = valid_rows(row_lens);
  const Tensor some = rows_at(x, valid);
  Tensor scores = at::empty({some.size(0), weight.size(0)}, x.options().dtype(at::kFloat));
  // Predictors are multiplied in fp32 whatever their type: a selection must not depend on the instruction set.
  const Tensor wide = some.to(at::kFloat);
  project(rows_of(weight), weight.size(0), Inputs(wide, type_of(weight)), {{0, x.size(1)}}, bias.data_ptr<float>(), scores);
  if (some.size(0) == x.size(0)) return scores;
  return at::full({x.size(0), weight.size(0)}, -1.0, scores.options()).index_copy_(0, at::tensor(valid, at::kLong), scores);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select_neurons(const Tensor& x, const Tensor& down, const Tensor& up, const Tensor& bias,
                                                          const Tensor& row_lens, bool with_row_mask, const MaybeTensor& head_x,
                                                          const MaybeTensor& head_weight, const MaybeTensor& head_bias, const MaybeTensor& counters) {
  const int64_t ffn = up.size(0), rank = up.size(1), segments = (ffn + SEGMENT - 1) / SEGMENT;
  check_matrix(x, -1, down.size(1), "x");
  check_matrix(down, rank, x.size(1), "down");
  check_matrix(up, -1, rank, "up");
  check_vector(bias, ffn, at::kFloat, "bias of the MLP predictor");
  check_counters(counters);
  check_vector(row_lens, x.size(0), at::kInt, "row_lens");
  const auto valid = valid_rows(row_lens);
  const int64_t tokens = static_cast<int64_t>(valid.size());
  const Tensor wide = rows_at(x, valid).to(at::kFloat);
  Tensor low = at::empty({tokens, rank}, wide.options());
  project(rows_of(down), rank, Inputs(wide, type_of(down)), {{0, x.size(1)}}, nullptr, low);

  Tensor ids = at::empty({ffn}, x.options().dtype(at::kInt)), counts = at::empty({segments}, ids.options());
  Tensor mask = at::zeros({with_row_mask ? x.size(0) : 0, ffn}, x.options().dtype(at::kBool));
  auto *id = ids.data_ptr<int32_t>(), *number = counts.data_ptr<int32_t>();
  auto* chosen_by = with_row_mask ? mask.data_ptr<bool>() : nullptr;
  const auto *scores_in = low.data_ptr<float>(), *threshold = bias.data_ptr<float>();
  const Rows rows = rows_of(up);
  std::atomic<int64_t> selected{0};
  share_out(segments, 1, [&](int64_t first, int64_t last) {
    float* scores = scratch<TILE, float>(tokens * SEGMENT);
    const Segment all{0, rank};
    int64_t mine = 0;
    for (int64_t s = first; s < last; ++s) {
      const int64_t begin = s * SEGMENT, n = std::min(SEGMENT, ffn - begin);
      kernels().dot(rows, begin, begin + n, scores_in, Type::f32, rank, tokens, &all, 1, scores, SEGMENT);
      int32_t any[SEGMENT] = {};
      for (int64_t t = 0; t < tokens; ++t) {
        mine += kernels().threshold(scores + t * SEGMENT, threshold + begin, any, n);
        if (chosen_by)
          for (int64_t j = 0; j < n; ++j) chosen_by[valid[t] * ffn + begin + j] = scores[t * SEGMENT + j] + threshold[begin + j] > 0;
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
  return {ids, counts, mask, head_x ? score_heads(*head_x, *head_weight, *head_bias, row_lens) : at::empty({0, 0}, wide.options())};
}

// x [tokens, hidden] through fc1's rows of the list, ReLU, and fc2's rows of the neurons that came out positive.
void mlp_rows(const Tensor& x, const Tensor& fc1, const float* bias, const Tensor& fc2, const int32_t* list, int64_t n,
              const bool* row_mask, const MaybeTensor& counters, const Tensor& out) {
  const int64_t tokens = x.size(0), hidden = x.size(1), ffn = fc1.size(0), columns = fc2.size(1);
  const Inputs inputs(x, type_of(fc1));
  const Rows rows = rows_of(fc1, list);
  const int64_t width = (n + 15) / 16 * 16 + CACHE_LINE / 4;  // a line more, as in Inputs
  const int64_t h_size = size_of(inputs.type);
  char* h = scratch<HIDDEN, char>(tokens * width * h_size);  // [tokens][width]
  float* alive = scratch<ALIVE, float>(n);                   // sums over tokens: 0 where none is positive
  share_out(n, ROW_UNIT, [&](int64_t first, int64_t last) {
    const Segment all{0, hidden};
    const auto id = [&](int64_t i) { return list ? static_cast<int64_t>(list[i]) : i; };
    const int64_t chunk = inputs.chunk(last - first, rows.stride * size_of(rows.type));
    float* added = scratch<ADDED, float>(chunk);
    float* values = scratch<TILE, float>(inputs.block_tokens(0) * chunk);
    for (int64_t begin = first; begin < last; begin += chunk) {
      const int64_t end = std::min(last, begin + chunk), mine = end - begin;
      for (int64_t i = 0; i < mine; ++i) added[i] = bias ? bias[id(begin + i)] : 0;
      std::fill_n(alive + begin, mine, 0);
      for (int64_t block = 0; block < inputs.blocks(); ++block) {
        inputs.multiply(rows, begin, end, last, block, &all, 1, values, mine);
        for (int64_t i = 0; i < inputs.block_tokens(block); ++i) {
          const int64_t t = block * LANE_BLOCK + i;
          if (row_mask)
            for (int64_t j = 0; j < mine; ++j)
              if (!row_mask[t * ffn + id(begin + j)]) values[i * mine + j] = -INFINITY;
          kernels().activate(values + i * mine, added, alive + begin, h + (t * width + begin) * h_size, inputs.type, mine);
        }
      }
    }
  });
  auto* survivors = scratch<ALIVE_LIST, int32_t>(2 * n);  // their numbers, then their places among the n
  auto* places = survivors + n;
  int64_t m = 0;
  for (int64_t i = 0; i < n; ++i) {
    survivors[m] = list ? list[i] : static_cast<int32_t>(i);
    places[m] = static_cast<int32_t>(i);
    m += alive[i] != 0;
  }
  count(counters, SURVIVED, m);

  // Threads share the columns; where they are too few, the neurons too, whose partial sums are added in order.
  const int64_t threads = at::get_num_threads(), column_tasks = std::clamp<int64_t>(columns / LEAST_COLUMNS, 1, threads);
  const int64_t splits = std::clamp<int64_t>(m / LEAST_ROWS, 1, threads / column_tasks);
  float* partials = scratch<PARTIALS, float>(splits * tokens * columns);
  const Rows rows2 = rows_of(fc2, survivors);
  const int64_t units = (columns + COLUMN_UNIT - 1) / COLUMN_UNIT;
  const Type type = type_of(out);
  const auto finish = [&](int64_t t, int64_t begin, int64_t end) {
    kernels().finish(partials + t * columns + begin, nullptr, at_element(out, t * columns + begin), type, end - begin);
  };
  const int64_t panel = std::max(LEAST_COLUMNS, SUMS_BYTES / (4 * std::max<int64_t>(tokens, 1)) / COLUMN_UNIT * COLUMN_UNIT);
  at::parallel_for(0, column_tasks * splits, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t split = task / column_tasks, place = task % column_tasks;
      const int64_t begin = units * place / column_tasks * COLUMN_UNIT, end = std::min(columns, units * (place + 1) / column_tasks * COLUMN_UNIT);
      if (begin >= end) continue;
      char* memory = scratch<TILE, char>(accumulate_scratch(tokens, panel));
      for (int64_t column = begin; column < end; column += panel) {
        const int64_t stop = std::min(end, column + panel);
        kernels().accumulate(rows2, m * split / splits, m * (split + 1) / splits, h, inputs.type, width, places, tokens, column, stop,
                             partials + split * tokens * columns + column, columns, memory);
        if (splits == 1)
          for (int64_t t = 0; t < tokens; ++t) finish(t, column, stop);
      }
    }
  });
  if (splits > 1)
    share_out(tokens * units, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t t = i / units, begin = i % units * COLUMN_UNIT, end = std::min(columns, begin + COLUMN_UNIT);
        for (int64_t s = 1; s < splits; ++s)
          for (int64_t c = begin; c < end; ++c) partials[t * columns + c] += partials[(s * tokens + t) * columns + c];
        finish(t, begin, end);
      }
    });
}

void check_mlp(const Tensor& x, const Tensor& fc1, const Tensor& fc2) {
  check_matrix(x, -1, fc1.size(1), "x");
  check_matrix(fc1, -1, x.size(1), "fc1's weight");
  check_matrix(fc2, fc1.size(0), fc2.size(1), "fc2's transposed weight");
  TORCH_CHECK(x.scalar_type() == fc1.scalar_type() && x.scalar_type() == fc2.scalar_type(), "dejavu: x, fc1 and fc2 must have one dtype, got ",
              x.scalar_type(), ", ", fc1.scalar_type(), ", ", fc2.scalar_type());
}

Tensor sparse_mlp(const Tensor& x, const Tensor& fc1, const MaybeTensor& fc1_bias, const Tensor& fc2, const Tensor& neuron_ids, const Tensor& counts,
                  const Tensor& row_lens, const MaybeTensor& row_mask, const MaybeTensor& counters) {
  check_mlp(x, fc1, fc2);
  const int64_t ffn = fc1.size(0), segments = (ffn + SEGMENT - 1) / SEGMENT;
  check_vector(neuron_ids, ffn, at::kInt, "neuron_ids");
  check_vector(counts, segments, at::kInt, "counts");
  check_vector(row_lens, x.size(0), at::kInt, "row_lens");
  if (row_mask) check_matrix(*row_mask, x.size(0), ffn, "row_mask");
  check_counters(counters);
  const auto valid = valid_rows(row_lens);
  const Tensor some = rows_at(x, valid), mask = row_mask ? rows_at(*row_mask, valid) : Tensor();
  Tensor out = at::empty({some.size(0), fc2.size(1)}, x.options());

  const auto *ids = neuron_ids.data_ptr<int32_t>(), *number = counts.data_ptr<int32_t>();
  auto* list = scratch<LIST, int32_t>(ffn);
  int64_t n = 0;
  for (int64_t s = 0; s < segments; ++s) n = std::copy_n(ids + s * SEGMENT, number[s], list + n) - list;
  mlp_rows(some, fc1, widened(fc1_bias, ffn), fc2, list, n, row_mask ? mask.data_ptr<bool>() : nullptr, counters, out);
  if (some.size(0) == x.size(0)) return out;
  return at::zeros({x.size(0), fc2.size(1)}, x.options()).index_copy_(0, at::tensor(valid, at::kLong), out);
}

// Whether PyTorch's own linears are faster.
bool better_plain(const Tensor& x, const Tensor& weight) {
  return x.size(0) >= PLAIN_TOKENS && (kernels().dot_lanes == nullptr || weight.scalar_type() != at::kBFloat16);
}

void linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& output) {
  check_matrix(x, -1, weight.size(1), "x");
  check_matrix(weight, -1, x.size(1), "weight");
  check_matrix(output, x.size(0), weight.size(0), "output");
  TORCH_CHECK(x.scalar_type() == weight.scalar_type() && x.scalar_type() == output.scalar_type() && output.is_contiguous(),
              "dejavu: x, weight and output must have one dtype, and output must be contiguous; got ", x.scalar_type(), ", ",
              weight.scalar_type(), ", ", output.scalar_type(), ", output's strides ", output.strides());
  const float* wide = widened(bias, weight.size(0));
  if (better_plain(x, weight)) {
    Tensor out = output;
    at::linear_out(out, x, weight, bias);
    return;
  }
  const Tensor input = x.contiguous();
  project(rows_of(weight), weight.size(0), Inputs(input, type_of(weight)), {{0, x.size(1)}}, wide, output);
}

// The MLP over all neurons, but fc2's rows of neurons that came out 0 for all tokens of a chunk: that changes nothing but the time.
Tensor dense_mlp(const Tensor& x, const Tensor& fc1, const MaybeTensor& fc1_bias, const Tensor& fc2) {
  check_mlp(x, fc1, fc2);
  const float* bias = widened(fc1_bias, fc1.size(0));
  if (better_plain(x, fc1)) return at::mm(at::linear(x, fc1, fc1_bias).relu_(), fc2);
  const Tensor input = x.contiguous();
  const int64_t tokens = x.size(0), chunks = std::max<int64_t>(1, (tokens + MLP_TOKENS - 1) / MLP_TOKENS);
  Tensor out = at::empty({tokens, fc2.size(1)}, x.options());
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t begin = tokens * i / chunks, count = tokens * (i + 1) / chunks - begin;
    mlp_rows(input.narrow(0, begin, count), fc1, bias, fc2, nullptr, fc1.size(0), nullptr, std::nullopt, out.narrow(0, begin, count));
  }
  return out;
}

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
  TORCH_CHECK(head_scores.scalar_type() == at::kFloat && head_scores.is_contiguous(), "dejavu: head_scores must be contiguous float32, got ", head_scores.scalar_type());
}

Tensor sparse_qkv(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& head_scores, const Tensor& row_lens,
                  int64_t head_size, const MaybeTensor& counters) {
  const int64_t tokens = x.size(0), heads = head_scores.size(1), queries = heads * head_size, all = weight.size(0);
  check_matrix(x, -1, weight.size(1), "x");
  check_matrix(weight, -1, x.size(1), "weight");
  check_scores(head_scores, tokens, heads);
  check_vector(row_lens, tokens, at::kInt, "row_lens");
  check_counters(counters);
  TORCH_CHECK(x.scalar_type() == weight.scalar_type() && all >= queries, "dejavu: weight must have x's dtype ", x.scalar_type(), " and at least ", queries,
              " rows, got ", weight.scalar_type(), " and ", all);
  int64_t selected;
  const auto read = read_heads(head_scores, selected);
  const Tensor input = x.contiguous();
  Tensor out = at::empty({tokens, all}, x.options());
  auto* list = scratch<LIST, int32_t>(all);
  int64_t n = 0, number = 0;
  for (int64_t head = 0; head < heads; ++head) {
    number += read[head];
    for (int64_t row = head * head_size; row < (head + 1) * head_size && read[head]; ++row) list[n++] = static_cast<int32_t>(row);
    if (!read[head])
      for (int64_t t = 0; t < tokens; ++t) std::fill_n(at_element(out, t * all + head * head_size), head_size * out.element_size(), 0);
  }
  for (int64_t row = queries; row < all; ++row) list[n++] = static_cast<int32_t>(row);
  project(rows_of(weight, list), n, Inputs(input, type_of(weight)), {{0, x.size(1)}}, widened(bias, all), out);
  if (counters) {
    count(counters, STEPS, 1);
    count(counters, Counter::ROWS, static_cast<int64_t>(valid_rows(row_lens).size()));
    count(counters, SELECTED, selected);
    count(counters, READ, number);
  }
  return out;
}

Tensor mask_heads(const Tensor& attn, const Tensor& head_scores) {
  TORCH_CHECK(attn.dim() == 3 && attn.device().is_cpu(), "dejavu: attn must be a CPU tensor [num_tokens, heads, head_size], got ", attn.sizes());
  check_scores(head_scores, attn.size(0), attn.size(1));
  Tensor out = attn.clone(at::MemoryFormat::Contiguous);
  const auto* scores = head_scores.data_ptr<float>();
  const int64_t bytes = attn.size(2) * attn.element_size();
  for (int64_t i = 0; i < head_scores.numel(); ++i)
    if (!(scores[i] > 0)) std::memset(static_cast<char*>(out.data_ptr()) + i * bytes, 0, bytes);
  return out;
}

void sparse_out_proj(const Tensor& attn, const Tensor& weight, const Tensor& head_scores, const Tensor& output) {
  const int64_t tokens = attn.size(0), heads = attn.size(1), head_size = attn.size(2);
  check_matrix(weight, -1, heads * head_size, "weight");
  check_scores(head_scores, tokens, heads);
  check_matrix(output, tokens, weight.size(0), "output");
  TORCH_CHECK(attn.scalar_type() == weight.scalar_type() && attn.scalar_type() == output.scalar_type() && output.is_contiguous(),
              "dejavu: attn, weight and output must have one dtype, and output must be contiguous; got ", attn.scalar_type(), ", ",
              weight.scalar_type(), ", ", output.scalar_type(), ", output's strides ", output.strides());
  int64_t selected;
  const auto read = read_heads(head_scores, selected);
  std::vector<Segment> segments;
  for (int64_t head = 0; head < heads; ++head) {
    if (!read[head]) continue;
    const int64_t begin = head * head_size;
    if (!segments.empty() && segments.back().end == begin) segments.back().end += head_size;
    else segments.push_back({begin, begin + head_size});
  }
  const Tensor input = attn.contiguous().view({tokens, heads * head_size});
  project(rows_of(weight), weight.size(0), Inputs(input, type_of(weight), head_size % 2 == 0), segments, nullptr, output);
}

void use_huge_pages(const Tensor& t) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t HUGE_PAGE = 2 << 20;
  const auto data = reinterpret_cast<uintptr_t>(t.data_ptr()), begin = (data + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const auto end = (data + t.nbytes()) / HUGE_PAGE * HUGE_PAGE;
  if (t.device().is_cpu() && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: it may be refused
#endif
}

}  // namespace

const Kernels& kernels() {
  if (chosen.load() == nullptr) {
    const char* name = std::getenv("VLLM_DEJAVU_CPU_ISA");
    use_isa(name ? name : "");
  }
  return *chosen.load();
}

TORCH_LIBRARY(dejavu_cpu, m) {
  m.def("isas() -> str[]", isas);
  m.def("isa() -> str", isa);
  m.def("use_isa(str name) -> ()", use_isa);
  m.def("use_huge_pages(Tensor t) -> ()", use_huge_pages);
  m.def("count_dense(Tensor(a!) counters, Tensor once, Tensor per_row, Tensor row_lens) -> ()");
  m.def("score_heads(Tensor x, Tensor weight, Tensor bias, Tensor row_lens) -> Tensor");
  m.def("select_neurons(Tensor x, Tensor down, Tensor up, Tensor bias, Tensor row_lens, bool with_row_mask, "
        "Tensor? head_x, Tensor? head_weight, Tensor? head_bias, Tensor(a!)? counters) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("sparse_mlp(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight_t, Tensor neuron_ids, Tensor counts, Tensor row_lens, Tensor? row_mask, Tensor(a!)? counters) -> Tensor");
  m.def("dense_mlp(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight_t) -> Tensor");
  m.def("sparse_qkv(Tensor x, Tensor weight, Tensor? bias, Tensor head_scores, Tensor row_lens, int head_size, Tensor(a!)? counters) -> Tensor");
  m.def("sparse_out_proj(Tensor attn, Tensor weight, Tensor head_scores, Tensor(a!) output) -> ()");
  m.def("mask_heads(Tensor attn, Tensor head_scores) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) output) -> ()");
}

TORCH_LIBRARY_IMPL(dejavu_cpu, CPU, m) {
  m.impl("count_dense", count_dense);
  m.impl("score_heads", score_heads);
  m.impl("select_neurons", select_neurons);
  m.impl("sparse_mlp", sparse_mlp);
  m.impl("dense_mlp", dense_mlp);
  m.impl("sparse_qkv", sparse_qkv);
  m.impl("sparse_out_proj", sparse_out_proj);
  m.impl("mask_heads", mask_heads);
  m.impl("linear", linear);
}

}  // namespace dejavu
