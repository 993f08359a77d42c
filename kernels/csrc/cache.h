// A layer's paged cache, through vLLM's own operators: they write it, and attend to all heads of it or to
// those that were selected.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "arguments.h"

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

  // What it returns, or None.
  c10::IValue operator()(std::initializer_list<c10::IValue> given) const {
    torch::jit::Stack stack = values_;
    size_t i = 0;
    for (const auto& value : given) stack[places_[i++]] = value;
    handle_->callBoxed(&stack);
    return stack.empty() ? c10::IValue() : stack.back();
  }

 private:
  std::optional<c10::OperatorHandle> handle_;
  std::vector<c10::IValue> values_;
  std::vector<int64_t> places_;
};

// Of a pass, as vLLM's metadata has them.
struct Sequences {
  Tensor query_start_loc, seq_lens, block_table, scheduler_metadata;
  bool causal;
};

// How a layer attends, as vLLM's implementation has it. numbers: scale, softcap, scales of keys and of
// values.
struct Attending {
  std::string isa, dtype;
  std::vector<double> numbers;
  int64_t window;
  MaybeTensor slopes, sinks;
  bool split;  // whether a long sequence may be shared by threads

  Operator attend() const {
    return {"_C::cpu_attention_with_kv_cache",
            {{"scale", numbers.at(0)},
             {"softcap", numbers.at(1)},
             {"k_scale", numbers.at(2)},
             {"v_scale", numbers.at(3)},
             {"kv_cache_dtype", dtype},
             {"sliding_window_size", window},
             {"alibi_slopes", slopes},
             {"s_aux", sinks},
             {"dynamic_causal", c10::IValue()}},
            {"query", "key_cache", "value_cache", "output", "query_start_loc", "seq_lens", "causal",
             "block_table", "scheduler_metadata"}};
  }
  Operator write() const {
    return {"_C::cpu_attn_reshape_and_cache",
            {{"isa", isa}, {"k_scale", numbers.at(2)}, {"v_scale", numbers.at(3)}, {"kv_cache_dtype", dtype}},
            {"key", "value", "key_cache", "value_cache", "slot_mapping"}};
  }
  // For so many query heads of one key and value. `causal`: how the operator spells that argument.
  Operator schedule(int64_t query_heads, int64_t head_size, const char* causal) const {
    return {"_C::get_scheduler_metadata",
            {{"num_heads_q", query_heads},
             {"num_heads_kv", int64_t{1}},
             {"head_dim", head_size},
             {"window_size", window},
             {"isa_hint", isa},
             {"enable_kv_split", split},
             {"dynamic_causal", c10::IValue()},
             {"kv_cache_dtype", dtype}},
            {"num_req", "seq_lens", "dtype", "query_start_loc", causal}};
  }
};

class PagedCache {
 public:
  // key, value: [blocks, kv_heads, block_size, head_size], as vLLM's operators take them.
  PagedCache(Tensor key, Tensor value, int64_t heads, const Attending& attending)
      : key_(key),
        value_(value),
        group_(heads / key.size(1)),
        write_(attending.write()),
        attend_(attending.attend()) {
    // What differs from head to head is told by a head's place, which a pair does not keep.
    if (attending.slopes || attending.sinks || key.stride(0) != key.size(1) * key.stride(1) ||
        value.stride(0) != value.size(1) * value.stride(1))
      return;
    schedule_ = attending.schedule(group_, key.size(3), "casual");
    if (!schedule_) schedule_ = attending.schedule(group_, key.size(3), "causal");
    one_key_ = by_head(key);
    one_value_ = by_head(value);
  }

  explicit operator bool() const { return write_ && attend_; }
  // Whether attend_selected can be called.
  bool selects() const { return static_cast<bool>(schedule_); }
  int64_t kv_heads() const { return key_.size(1); }

  void write(const Tensor& key, const Tensor& value, const Tensor& slots) const {
    write_({key, value, key_, value_, slots});
  }

  // Into attn [tokens, heads, head_size].
  void attend(const Tensor& query, const Sequences& of, const Tensor& attn) const {
    attend_({query, key_, value_, attn, of.query_start_loc, of.seq_lens, of.causal, of.block_table,
             of.scheduler_metadata});
  }

  // Where a row is a sequence. A selected head of a row (of several queries with one key and value: these)
  // becomes a sequence of its own, of a model with one head, in a cache whose blocks are those of one head:
  // nothing of the others is read. Heads that a row did not select become 0. Returns how many keys were read.
  int64_t attend_selected(const Tensor& query, const Tensor& head_scores, const Sequences& of,
                          const Tensor& attn) const {
    const int64_t rows = query.size(0), heads = query.size(1), size = query.size(2), kv = kv_heads(),
                  bytes = size * query.element_size();
    const auto* scores = head_scores.data_ptr<float>();
    const auto* lens = of.seq_lens.data_ptr<int32_t>();
    std::vector<std::pair<int64_t, int64_t>> pairs;  // row, key and value
    int64_t longest = 0, read = 0;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t head = 0; head < kv; ++head) {
        const auto* of_group = scores + row * heads + head * group_;
        if (!std::any_of(of_group, of_group + group_, [](float score) { return score > 0; })) continue;
        pairs.emplace_back(row, head);
        longest = std::max<int64_t>(longest, lens[row]);
        read += lens[row];
      }
    const auto at = [&](const Tensor& t, int64_t row, int64_t head) {
      return static_cast<char*>(t.data_ptr()) + (row * t.stride(0) + head * t.stride(1)) * t.element_size();
    };
    for (int64_t row = 0; row < rows; ++row) std::memset(at(attn, row, 0), 0, heads * bytes);
    const auto n = static_cast<int64_t>(pairs.size());
    if (n == 0) return 0;
    const int64_t blocks = (longest + key_.size(2) - 1) / key_.size(2);
    const auto ints = of.seq_lens.options();
    const Tensor some = at::empty({n, group_, size}, query.options()), result = at::empty_like(some),
                 starts = at::empty({n + 1}, ints), some_lens = at::empty({n}, ints),
                 table = at::empty({n, blocks}, ints);
    auto* start = starts.data_ptr<int32_t>();
    std::iota(start, start + n + 1, 0);
    for (int64_t i = 0; i < n; ++i) {
      const auto [row, head] = pairs[i];
      std::memcpy(at(some, i, 0), at(query, row, head * group_), group_ * bytes);
      some_lens.data_ptr<int32_t>()[i] = lens[row];
      const int32_t* from = of.block_table.data_ptr<int32_t>() + row * of.block_table.stride(0);
      int32_t* to = table.data_ptr<int32_t>() + i * blocks;
      const int64_t used = (lens[row] + key_.size(2) - 1) / key_.size(2);
      for (int64_t block = 0; block < blocks; ++block)
        to[block] = block < used ? static_cast<int32_t>(from[block] * kv + head) : 0;
    }
    const Tensor schedule =
        schedule_({n, some_lens, static_cast<int64_t>(query.scalar_type()), starts, of.causal}).toTensor();
    attend_({some, one_key_, one_value_, result, starts, some_lens, of.causal, table, schedule});
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < group_; ++j) {
        const auto [row, head] = pairs[i];
        if (scores[row * heads + head * group_ + j] > 0)
          std::memcpy(at(attn, row, head * group_ + j), at(result, i, j), bytes);
      }
    return read;
  }

 private:
  static Tensor by_head(const Tensor& t) {
    return t.as_strided({t.size(0) * t.size(1), 1, t.size(2), t.size(3)},
                        {t.stride(1), t.stride(1), t.stride(2), t.stride(3)});
  }

  Tensor key_, value_, one_key_, one_value_;
  int64_t group_;  // query heads of a key and value
  Operator write_, attend_, schedule_;
};

}  // namespace

}  // namespace dejavu
