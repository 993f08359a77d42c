// What the PyTorch-facing files share: the chosen instruction set, types, scratch memory, threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <memory>

#include "isa.h"

namespace dejavu {

const Kernels& kernels();

inline Type type_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Type::f32;
    case at::kHalf: return Type::f16;
    case at::kBFloat16: return Type::bf16;
    case at::kChar: return Type::i8;
    case at::kByte: return Type::u4;
    default:
      TORCH_CHECK(false,
                  "dejavu: expected float32, float16, bfloat16, int8 or uint8 (of 4-bit weights), got ",
                  t.scalar_type());
  }
}

inline int64_t size_of(Type type) { return type == Type::f32 ? 4 : grouped(type) ? 1 : 2; }

// Of a weight.
inline int64_t width_of(const at::Tensor& weight) {
  return weight.size(1) * (weight.scalar_type() == at::kByte ? 2 : 1);
}

inline char* at_element(const at::Tensor& t, int64_t element) {
  return static_cast<char*>(t.data_ptr()) + element * t.element_size();
}

// Memory that is kept from call to call and only grows: fresh pages would cost more than the work done in
// them. One per thread and purpose; what it held before is lost when it grows.
template <int PURPOSE, class T>
T* scratch(int64_t count) {
  static thread_local std::unique_ptr<char[]> memory;
  static thread_local int64_t bytes = 0;
  const int64_t needed = count * static_cast<int64_t>(sizeof(T)) + 64;
  if (needed > bytes) {
    memory.reset(new char[needed]);
    bytes = needed;
  }
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
}

enum Purpose {
  INPUT,
  INPUT_SCALES,
  INPUT_OFFSETS,
  PACKED,
  BIAS,
  LIST,
  HIDDEN,
  GATHERED,
  ROUNDED,
  ROUNDED_SCALES,
  ROUNDED_OFFSETS,
  ALIVE,
  ALIVE_ANY,
  ALIVE_LIST,
  TILE_LISTS,
  TILE_PLACES,
  PARTIALS,
  TILE,
  ADDED,
  SCALED
};

// f(begin, end) for even shares of [0, n), in multiples of `unit`, on PyTorch's own threads: those that vLLM
// has bound to cores.
template <class F>
void share_out(int64_t n, int64_t unit, const F& f) {
  const int64_t units = (n + unit - 1) / unit;
  const int64_t tasks = std::min<int64_t>(units, at::get_num_threads());
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = units * task / tasks * unit, end = std::min(n, units * (task + 1) / tasks * unit);
      if (begin < end) f(begin, end);
    }
  });
}

}  // namespace dejavu
