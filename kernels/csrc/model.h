// The gated blocks of a model: a step goes through them without a line of Python, but for what only Python
// can do, for which they call its ops.
#pragma once

#include <ATen/record_function.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cache.h"
#include "heads.h"
#include "mlp.h"
#include "select.h"

namespace dejavu {

namespace {

struct GateOf {
  // What a pass that reads all adds to the counters: once, and for each row; one that selects rows of what it
  // does not read: for each row.
  Tensor counters, dense_step, dense_row, selected_row;
  int64_t most_tokens;  // of a batch that runs sparse; -1: any

  bool takes(int64_t tokens) const { return most_tokens < 0 || tokens <= most_tokens; }
};

// What is the same for all layers of a pass.
struct Pass {
  bool sparse;
  // Layers whose MLP, or attention, Python runs.
  std::vector<int64_t> mlps_aside, attentions_aside;
  Tensor row_lens;
  // Of vLLM's metadata, where all layers share one.
  MaybeTensor slot_mapping;
  Sequences sequences;
  int64_t num_tokens;    // that are not padding
  bool row_is_sequence;  // each of them
  int64_t cached;        // tokens of all sequences
};

struct MlpBlock {
  std::string name;
  GateOf gate;
  Tensor fc1, fc2, down, up, threshold;
  MaybeTensor fc1_scale, fc1_bias, fc2_scale, fc2_output_scale;
  bool square;       // what is positive, before fc2
  double crossover;  // of tiles of tokens, see `down`
  int64_t rider;     // layer whose head scores it computes on the way, or -1
};

struct AttentionBlock {
  std::string name;
  GateOf gate;
  Tensor qkv, out, predictor, threshold;
  MaybeTensor qkv_scale, qkv_bias, out_scale, out_output_scale;
  bool transposed;  // out
  int64_t heads, kv_heads, head_size;
  std::optional<Operator> rotate;   // queries and keys, by vLLM's operator
  std::optional<PagedCache> cache;  // none: Python attends
  int64_t least_cached;             // tokens of a pass from which on only selected heads are read of it

  // Whether heads are selected: for the projections, or for the cache.
  bool projects(const Pass& pass, int64_t rows) const { return pass.sparse && gate.takes(rows); }
  bool selects(const Pass& pass) const {
    return pass.sparse && cache && cache->selects() && pass.row_is_sequence && pass.cached >= least_cached;
  }
};

using Numbers = std::vector<double>;
using Tensors = std::vector<Tensor>;

// By the number of a layer in this pipeline stage.
struct Model : torch::CustomClassHolder {
  std::vector<std::optional<MlpBlock>> mlps;
  std::vector<std::optional<AttentionBlock>> attentions;
  bool row_exact;            // each row is restricted to its own neurons
  std::optional<Pass> pass;  // none: Python runs all

  Model(int64_t layers, bool row_exact) : mlps(layers), attentions(layers), row_exact(row_exact) {}

  // gate: its tensors, as GateOf has them. predictor: down, up, bias.
  void add_mlp(int64_t layer, std::string name, Tensors gate, int64_t most_tokens, Tensors predictor,
               Tensor fc1, MaybeTensor fc1_scale, MaybeTensor fc1_bias, Tensor fc2, MaybeTensor fc2_scale,
               MaybeTensor fc2_output_scale, bool square, double crossover, int64_t rider) {
    mlps.at(layer) = MlpBlock{std::move(name),
                              {gate.at(0), gate.at(1), gate.at(2), gate.at(3), most_tokens},
                              fc1,
                              fc2,
                              predictor.at(0),
                              predictor.at(1),
                              predictor.at(2),
                              fc1_scale,
                              fc1_bias,
                              fc2_scale,
                              fc2_output_scale,
                              square,
                              crossover,
                              rider};
  }

  // predictor: weight, bias. heads: queries' and keys', and the size of one. rotary: vLLM's cosines and
  // sines, and whether it turns halves of a head (neox), not neighbours.
  void add_attention(int64_t layer, std::string name, Tensors gate, int64_t most_tokens, Tensors predictor,
                     Tensor qkv, MaybeTensor qkv_scale, MaybeTensor qkv_bias, Tensor out,
                     MaybeTensor out_scale, MaybeTensor out_output_scale, bool transposed,
                     std::vector<int64_t> heads, MaybeTensor rotary, bool neox) {
    attentions.at(layer) = AttentionBlock{std::move(name),
                                          {gate.at(0), gate.at(1), gate.at(2), gate.at(3), most_tokens},
                                          qkv,
                                          out,
                                          predictor.at(0),
                                          predictor.at(1),
                                          qkv_scale,
                                          qkv_bias,
                                          out_scale,
                                          out_output_scale,
                                          transposed,
                                          heads.at(0),
                                          heads.at(1),
                                          heads.at(2)};
    if (!rotary) return;
    auto& rotate = attentions.at(layer)->rotate;
    rotate.emplace("_C::rotary_embedding",
                   std::initializer_list<Operator::Named>{
                       {"head_size", heads.at(2)}, {"cos_sin_cache", *rotary}, {"is_neox", neox}},
                   std::initializer_list<const char*>{"positions", "query", "key"});
    TORCH_CHECK(*rotate,
                "dejavu: vLLM's rotary_embedding takes other arguments than expected; this version of "
                "vLLM is not supported on a CPU (docs/compatibility.md)");
  }

  // The cache of a layer and how vLLM attends to it. Returns 0: vLLM's operators want something else, and
  // Python attends; 1: to all heads; 2: to those selected, where a pass has so many tokens in its sequences.
  int64_t use_cache(int64_t layer, Tensor key, Tensor value, std::string isa, std::string dtype,
                    Numbers numbers, int64_t window, MaybeTensor slopes, MaybeTensor sinks, bool split,
                    std::optional<int64_t> least_cached) {
    AttentionBlock& block = *attentions.at(layer);
    const Attending attending{isa, dtype, numbers, window, slopes, sinks, split};
    block.cache.emplace(key, value, block.heads, attending);
    block.least_cached = least_cached.value_or(std::numeric_limits<int64_t>::max());
    if (!*block.cache) block.cache.reset();
    return !block.cache ? 0 : block.cache->selects() && least_cached ? 2 : 1;
  }

  void begin(bool sparse, std::vector<int64_t> mlps_aside, std::vector<int64_t> attentions_aside,
             Tensor row_lens, MaybeTensor slot_mapping, Tensors metadata, int64_t num_tokens, bool causal,
             bool row_is_sequence);
  void begin_other();
  void end();

  // Python attends in all layers.
  void forget_caches() {
    for (auto& block : attentions)
      if (block) block->cache.reset();
  }
};

// Of this thread, during its forward pass: without references, which would outlive the engine.
thread_local Model* current = nullptr;

void Model::begin(bool sparse, std::vector<int64_t> mlps_aside, std::vector<int64_t> attentions_aside,
                  Tensor row_lens, MaybeTensor slot_mapping, Tensors metadata, int64_t num_tokens,
                  bool causal, bool row_is_sequence) {
  current = this;
  const Tensor& lens = metadata.at(1);
  const auto* of_rows = lens.data_ptr<int32_t>();
  const int64_t cached = row_is_sequence ? std::accumulate(of_rows, of_rows + num_tokens, int64_t{0}) : 0;
  pass = Pass{sparse,     mlps_aside,      attentions_aside,
              row_lens,   slot_mapping,    {metadata.at(0), lens, metadata.at(2), metadata.at(3), causal},
              num_tokens, row_is_sequence, cached};
}

void Model::begin_other() {
  current = this;
  pass.reset();
}

void Model::end() {
  current = nullptr;
  pass.reset();
}

bool among(const std::vector<int64_t>& layers, int64_t layer) {
  return std::find(layers.begin(), layers.end(), layer) != layers.end();
}

Model& running() {
  TORCH_CHECK(current != nullptr, "dejavu: a native block was called outside of its model's forward pass");
  return *current;
}

// f(), which a profile shows by this name.
template <class F>
auto recorded(const char* name, const F& f) {
  RECORD_FUNCTION(name, std::vector<c10::IValue>());
  return f();
}

std::tuple<Tensor, Tensor> mlp(const Tensor& x, const Tensor& gate_input, const Tensor& positions,
                               const MaybeTensor& previous, int64_t rider_units, int64_t layer) {
  const Model& model = running();
  const MlpBlock& block = *model.mlps.at(layer);
  const int64_t rows = x.size(0);
  if (!model.pass || model.pass->row_lens.size(0) != rows || among(model.pass->mlps_aside, layer)) {
    static const auto python =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("dejavu::python_mlp", "")
            .typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&,
                                              c10::SymInt, std::string_view)>();
    return python.call(x, gate_input, positions, previous, rider_units, block.name);
  }
  const Tensor& lens = model.pass->row_lens;
  const bool sparse_step = model.pass->sparse;
  const AttentionBlock* rider = block.rider >= 0 && previous ? &*model.attentions.at(block.rider) : nullptr;
  if (rider && !rider->projects(*model.pass, rows) && !rider->selects(*model.pass)) rider = nullptr;
  Tensor out, scores;
  if (sparse_step && block.gate.takes(rows)) {
    const auto [ids, counts, mask, riding] = recorded("dejavu_cpu::select_neurons", [&] {
      return select_neurons(gate_input, block.down, block.up, block.threshold, lens, model.row_exact,
                            rider ? previous : std::nullopt,
                            rider ? MaybeTensor(rider->predictor) : std::nullopt,
                            rider ? MaybeTensor(rider->threshold) : std::nullopt, block.gate.counters);
    });
    scores = riding;
    const MaybeTensor row_mask = model.row_exact ? MaybeTensor(mask) : std::nullopt;
    const Tensor &list = ids, &numbers = counts;
    out = recorded("dejavu_cpu::sparse_mlp", [&] {
      return sparse_mlp(x, block.fc1, block.fc1_scale, block.fc1_bias, block.fc2, block.fc2_scale,
                        block.fc2_output_scale, block.square, block.crossover, list, numbers, lens, row_mask,
                        block.gate.counters);
    });
  } else {
    if (sparse_step) count_dense(block.gate.counters, block.gate.dense_step, block.gate.dense_row, lens);
    out = recorded("dejavu_cpu::dense_mlp", [&] {
      return dense_mlp(x, block.fc1, block.fc1_scale, block.fc1_bias, block.fc2, block.fc2_scale,
                       block.fc2_output_scale, block.square, block.crossover);
    });
    if (rider) scores = score_heads(*previous, rider->predictor, rider->threshold, lens);
  }
  if (!rider) scores = at::empty({rows, rider_units}, x.options().dtype(at::kFloat));
  return {out, scores};
}

Tensor attention(const Tensor& x, const Tensor& gate_input, const Tensor& positions,
                 const MaybeTensor& head_scores, int64_t layer) {
  const Model& model = running();
  const AttentionBlock& block = *model.attentions.at(layer);
  const int64_t rows = x.size(0), size = block.head_size;
  if (!model.pass || model.pass->row_lens.size(0) != rows || !block.cache ||
      among(model.pass->attentions_aside, layer)) {
    static const auto python = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("dejavu::python_attention", "")
                                   .typed<Tensor(const Tensor&, const Tensor&, const Tensor&,
                                                 const MaybeTensor&, std::string_view)>();
    return python.call(x, gate_input, positions, head_scores, block.name);
  }
  const Pass& pass = *model.pass;
  const bool sparse = block.projects(pass, rows), selects = block.selects(pass);
  Tensor scores, qkv;
  if (sparse || selects)
    scores =
        head_scores ? *head_scores : score_heads(gate_input, block.predictor, block.threshold, pass.row_lens);
  if (sparse) {
    qkv = recorded("dejavu_cpu::sparse_qkv", [&] {
      return sparse_qkv(x, block.qkv, block.qkv_scale, block.qkv_bias, scores, pass.row_lens, size,
                        block.gate.counters);
    });
  } else {
    if (pass.sparse)
      count_dense(block.gate.counters, block.gate.dense_step,
                  selects ? block.gate.selected_row : block.gate.dense_row, pass.row_lens);
    if (selects) count(block.gate.counters, SELECTED, selected_heads(scores));
    qkv = at::empty({rows, block.qkv.size(0)}, x.options());
    recorded("dejavu_cpu::linear", [&] { linear(x, block.qkv, block.qkv_scale, block.qkv_bias, qkv); });
  }
  if (block.rotate)
    (*block.rotate)({positions, qkv.narrow(1, 0, block.heads * size),
                     qkv.narrow(1, block.heads * size, block.kv_heads * size)});
  const auto part = [&](int64_t first, int64_t n) {
    return qkv.narrow(1, first * size, n * size).view({rows, n, size});
  };
  const int64_t heads = block.heads, kv = block.kv_heads, real = pass.num_tokens;
  const Tensor query = part(0, heads), key = part(heads, kv), value = part(heads + kv, kv);
  if (pass.slot_mapping) {
    const int64_t written = std::min(rows, pass.slot_mapping->size(0));  // not what pads the batch
    block.cache->write(key.narrow(0, 0, written), value.narrow(0, 0, written), *pass.slot_mapping);
  }
  Tensor attn = at::empty({rows, heads, size}, x.options());
  if (real < rows) attn.narrow(0, real, rows - real).zero_();
  const Tensor asked = query.narrow(0, 0, real), answered = attn.narrow(0, 0, real);
  int64_t read = pass.cached * kv;
  if (selects) {
    read = recorded("dejavu_cpu::attend_selected",
                    [&] { return block.cache->attend_selected(asked, scores, pass.sequences, answered); });
  } else {
    block.cache->attend(asked, pass.sequences, answered);
    if (sparse) zero_heads(attn, scores);
  }
  if (pass.sparse) {
    count(block.gate.counters, CACHE_HELD, pass.cached * kv);
    count(block.gate.counters, CACHE_READ, read);
  }
  Tensor output = at::empty({rows, block.transposed ? width_of(block.out) : block.out.size(0)}, x.options());
  recorded("dejavu_cpu::out_proj", [&] {
    if (block.transposed)
      transposed_out_proj(attn, block.out, block.out_scale, block.out_output_scale,
                          sparse ? MaybeTensor(scores) : std::nullopt, output);
    else if (sparse)
      sparse_out_proj(attn, block.out, scores, output);
    else
      linear(attn.view({rows, heads * size}), block.out, block.out_scale, std::nullopt, output);
  });
  return output;
}

}  // namespace

}  // namespace dejavu
