// The gated blocks of a model: a step goes through them without a line of Python, but for what only Python
// can do, for which they call its ops.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "heads.h"
#include "mlp.h"
#include "select.h"

namespace dejavu {

namespace {

// One of vLLM's operators, called with arguments by name: those that it has and we do not know keep their
// defaults, so that versions may add some.
class Operator {
 public:
  using Named = std::pair<const char*, c10::IValue>;

  Operator() = default;
  // fixed: the same in each call, where the operator has it. given: the names of what `operator()` gets, in
  // its order. An operator that lacks one of these, or wants more, is none.
  Operator(const char* name, std::initializer_list<Named> fixed, std::initializer_list<const char*> given) {
    const auto found = c10::Dispatcher::singleton().findSchema({name, ""});
    if (!found) return;
    const auto& arguments = found->schema().arguments();
    std::vector<bool> known(arguments.size());
    const auto place = [&](const char* argument) {
      for (size_t i = 0; i < arguments.size(); ++i)
        if (arguments[i].name() == argument) {
          known[i] = true;
          return static_cast<int64_t>(i);
        }
      return int64_t{-1};
    };
    for (const auto& argument : arguments)
      values_.push_back(argument.default_value().value_or(c10::IValue()));
    for (const auto& [argument, value] : fixed) {
      const int64_t i = place(argument);
      if (i >= 0) values_[i] = value;
    }
    bool whole = true;
    for (const char* argument : given) {
      places_.push_back(place(argument));
      whole = whole && places_.back() >= 0;
    }
    for (size_t i = 0; i < arguments.size(); ++i) whole = whole && (known[i] || arguments[i].default_value());
    if (whole) handle_ = found;
  }

  explicit operator bool() const { return handle_.has_value(); }

  void operator()(std::initializer_list<c10::IValue> given) const {
    torch::jit::Stack stack = values_;
    size_t i = 0;
    for (const auto& value : given) stack[places_[i++]] = value;
    handle_->callBoxed(&stack);
  }

 private:
  std::optional<c10::OperatorHandle> handle_;
  std::vector<c10::IValue> values_;
  std::vector<int64_t> places_;
};

struct GateOf {
  Tensor counters, dense_step, dense_row;
  int64_t most_tokens;  // of a batch that runs sparse; -1: any

  bool takes(int64_t tokens) const { return most_tokens < 0 || tokens <= most_tokens; }
};

struct MlpBlock {
  std::string name;
  GateOf gate;
  Tensor fc1, fc2, down, up, threshold;
  MaybeTensor fc1_scale, fc1_bias, fc2_scale;
  int64_t rider;  // layer whose head scores it computes on the way, or -1
};

struct AttentionBlock {
  std::string name;
  GateOf gate;
  Tensor qkv, out, predictor, threshold;
  MaybeTensor qkv_scale, qkv_bias, out_scale;
  bool transposed;  // out
  int64_t heads, kv_heads, head_size;
  Tensor key_cache, value_cache;  // as vLLM's operators take them
  Operator write, attend;         // none: Python attends
};

// What is the same for all layers of a pass.
struct Pass {
  bool sparse;
  // Layers whose MLP, or attention, Python runs.
  std::vector<int64_t> mlps_aside, attentions_aside;
  Tensor row_lens;
  // Of vLLM's metadata, where all layers share one.
  MaybeTensor slot_mapping;
  Tensor query_start_loc, seq_lens, block_table, scheduler_metadata;
  int64_t num_tokens;  // that are not padding
  bool causal;
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

  // gate: counters, what a dense pass adds to them once and for each row. predictor: down, up, bias.
  void add_mlp(int64_t layer, std::string name, Tensors gate, int64_t most_tokens, Tensors predictor,
               Tensor fc1, MaybeTensor fc1_scale, MaybeTensor fc1_bias, Tensor fc2, MaybeTensor fc2_scale,
               int64_t rider) {
    mlps.at(layer) = MlpBlock{std::move(name),
                              {gate.at(0), gate.at(1), gate.at(2), most_tokens},
                              fc1,
                              fc2,
                              predictor.at(0),
                              predictor.at(1),
                              predictor.at(2),
                              fc1_scale,
                              fc1_bias,
                              fc2_scale,
                              rider};
  }

  // predictor: weight, bias. heads: queries' and keys', and the size of one.
  void add_attention(int64_t layer, std::string name, Tensors gate, int64_t most_tokens, Tensors predictor,
                     Tensor qkv, MaybeTensor qkv_scale, MaybeTensor qkv_bias, Tensor out,
                     MaybeTensor out_scale, bool transposed, std::vector<int64_t> heads) {
    attentions.at(layer) = AttentionBlock{std::move(name),
                                          {gate.at(0), gate.at(1), gate.at(2), most_tokens},
                                          qkv,
                                          out,
                                          predictor.at(0),
                                          predictor.at(1),
                                          qkv_scale,
                                          qkv_bias,
                                          out_scale,
                                          transposed,
                                          heads.at(0),
                                          heads.at(1),
                                          heads.at(2)};
  }

  // The cache of a layer and how vLLM attends to it. numbers: scale, softcap, scales of keys and of values.
  // False: vLLM's operators want something else, and Python attends.
  bool use_cache(int64_t layer, Tensor key_cache, Tensor value_cache, const std::string& isa,
                 const std::string& dtype, Numbers numbers, int64_t window, MaybeTensor slopes,
                 MaybeTensor sinks) {
    AttentionBlock& block = *attentions.at(layer);
    block.key_cache = key_cache;
    block.value_cache = value_cache;
    block.write = Operator(
        "_C::cpu_attn_reshape_and_cache",
        {{"isa", isa}, {"k_scale", numbers.at(2)}, {"v_scale", numbers.at(3)}, {"kv_cache_dtype", dtype}},
        {"key", "value", "key_cache", "value_cache", "slot_mapping"});
    block.attend = Operator("_C::cpu_attention_with_kv_cache",
                            {{"scale", numbers.at(0)},
                             {"softcap", numbers.at(1)},
                             {"k_scale", numbers.at(2)},
                             {"v_scale", numbers.at(3)},
                             {"kv_cache_dtype", dtype},
                             {"sliding_window_size", window},
                             {"alibi_slopes", slopes},
                             {"s_aux", sinks},
                             {"dynamic_causal", c10::IValue()}},
                            {"query", "key_cache", "value_cache", "output", "query_start_loc", "seq_lens",
                             "causal", "block_table", "scheduler_metadata"});
    if (!block.write || !block.attend) block.attend = Operator();
    return static_cast<bool>(block.attend);
  }

  void begin(bool sparse, std::vector<int64_t> mlps_aside, std::vector<int64_t> attentions_aside,
             Tensor row_lens, MaybeTensor slot_mapping, Tensors metadata, int64_t num_tokens, bool causal);
  void begin_other();
  void end();

  // Python attends in all layers.
  void forget_caches() {
    for (auto& block : attentions)
      if (block) block->attend = Operator();
  }
};

// Of this thread, during its forward pass: without references, which would outlive the engine.
thread_local Model* current = nullptr;

void Model::begin(bool sparse, std::vector<int64_t> mlps_aside, std::vector<int64_t> attentions_aside,
                  Tensor row_lens, MaybeTensor slot_mapping, Tensors metadata, int64_t num_tokens,
                  bool causal) {
  current = this;
  pass = Pass{sparse,         mlps_aside,     attentions_aside, row_lens,   slot_mapping, metadata.at(0),
              metadata.at(1), metadata.at(2), metadata.at(3),   num_tokens, causal};
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
  if (rider && !(sparse_step && rider->gate.takes(rows))) rider = nullptr;
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
      return sparse_mlp(x, block.fc1, block.fc1_scale, block.fc1_bias, block.fc2, block.fc2_scale, list,
                        numbers, lens, row_mask, block.gate.counters);
    });
  } else {
    if (sparse_step) count_dense(block.gate.counters, block.gate.dense_step, block.gate.dense_row, lens);
    out = recorded("dejavu_cpu::dense_mlp", [&] {
      return dense_mlp(x, block.fc1, block.fc1_scale, block.fc1_bias, block.fc2, block.fc2_scale);
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
  if (!model.pass || model.pass->row_lens.size(0) != rows || !block.attend ||
      among(model.pass->attentions_aside, layer)) {
    static const auto python = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("dejavu::python_attention", "")
                                   .typed<Tensor(const Tensor&, const Tensor&, const Tensor&,
                                                 const MaybeTensor&, std::string_view)>();
    return python.call(x, gate_input, positions, head_scores, block.name);
  }
  const Pass& pass = *model.pass;
  const bool sparse = pass.sparse && block.gate.takes(rows);
  Tensor scores, qkv;
  if (sparse) {
    scores =
        head_scores ? *head_scores : score_heads(gate_input, block.predictor, block.threshold, pass.row_lens);
    qkv = recorded("dejavu_cpu::sparse_qkv", [&] {
      return sparse_qkv(x, block.qkv, block.qkv_scale, block.qkv_bias, scores, pass.row_lens, size,
                        block.gate.counters);
    });
  } else {
    if (pass.sparse)
      count_dense(block.gate.counters, block.gate.dense_step, block.gate.dense_row, pass.row_lens);
    qkv = at::empty({rows, block.qkv.size(0)}, x.options());
    recorded("dejavu_cpu::linear", [&] { linear(x, block.qkv, block.qkv_scale, block.qkv_bias, qkv); });
  }
  const auto part = [&](int64_t first, int64_t n) {
    return qkv.narrow(1, first * size, n * size).view({rows, n, size});
  };
  const int64_t heads = block.heads, kv = block.kv_heads;
  const Tensor query = part(0, heads), key = part(heads, kv), value = part(heads + kv, kv);
  if (pass.slot_mapping) block.write({key, value, block.key_cache, block.value_cache, *pass.slot_mapping});
  Tensor attn = at::empty({rows, heads, size}, x.options());
  const int64_t real = pass.num_tokens;
  if (real < rows) attn.narrow(0, real, rows - real).zero_();
  block.attend({query.narrow(0, 0, real), block.key_cache, block.value_cache, attn.narrow(0, 0, real),
                pass.query_start_loc, pass.seq_lens, pass.causal, pass.block_table, pass.scheduler_metadata});
  Tensor output = at::empty({rows, block.out.size(block.transposed ? 1 : 0)}, x.options());
  if (sparse) zero_heads(attn, scores);
  recorded("dejavu_cpu::out_proj", [&] {
    if (block.transposed)
      transposed_out_proj(attn, block.out, block.out_scale, sparse ? MaybeTensor(scores) : std::nullopt,
                          output);
    else if (sparse)
      sparse_out_proj(attn, block.out, scores, output);
    else
      linear(attn.view({rows, heads * size}), block.out, block.out_scale, std::nullopt, output);
  });
  return output;
}

}  // namespace

}  // namespace dejavu
