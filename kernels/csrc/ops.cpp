// The native CPU kernels as PyTorch operations (torch.ops.dejavu_cpu), with the meaning of
// kernels/reference.py.
#include <sys/mman.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include "exact.h"
#include "heads.h"
#include "mlp.h"
#include "model.h"
#include "select.h"

namespace dejavu {

namespace {

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
  TORCH_CHECK(false, "dejavu: this CPU or build has no instruction set '", name, "'; it has:", all,
              " (VLLM_DEJAVU_CPU_ISA)");
}

std::string isa() { return kernels().name; }

void use_huge_pages(const Tensor& t) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t HUGE_PAGE = 2 << 20;
  const auto data = reinterpret_cast<uintptr_t>(t.data_ptr()),
             begin = (data + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const auto end = (data + t.nbytes()) / HUGE_PAGE * HUGE_PAGE;
  if (t.device().is_cpu() && begin < end)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: it may be refused
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
  m.def(
      "select_neurons(Tensor x, Tensor down, Tensor up, Tensor bias, Tensor row_lens, bool with_row_mask, "
      "Tensor? head_x, Tensor? head_weight, Tensor? head_bias, Tensor(a!)? counters) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def(
      "sparse_mlp(Tensor x, Tensor fc1_weight, Tensor? fc1_scale, Tensor? fc1_bias, Tensor fc2_weight_t, "
      "Tensor? fc2_scale, Tensor? fc2_output_scale, bool square, float crossover, Tensor neuron_ids, Tensor "
      "counts, Tensor row_lens, "
      "Tensor? row_mask, Tensor(a!)? counters) -> Tensor");
  m.def(
      "dense_mlp(Tensor x, Tensor fc1_weight, Tensor? fc1_scale, Tensor? fc1_bias, Tensor fc2_weight_t, "
      "Tensor? fc2_scale, Tensor? fc2_output_scale, bool square, float crossover) -> Tensor");
  m.def(
      "exact_down(Tensor x, Tensor fc2_weight_t, Tensor? fc2_scale, Tensor? fc2_output_scale, bool square, "
      "float crossover, "
      "Tensor(a!)? counters) -> Tensor");
  m.def(
      "sparse_qkv(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor head_scores, Tensor row_lens, "
      "int head_size, Tensor(a!)? counters) -> Tensor");
  m.def("sparse_out_proj(Tensor attn, Tensor weight, Tensor head_scores, Tensor(a!) output) -> ()");
  m.def(
      "transposed_out_proj(Tensor attn, Tensor weight_t, Tensor? scale, Tensor? output_scale, "
      "Tensor? head_scores, Tensor(a!) "
      "output) "
      "-> ()");
  m.def("mask_heads(Tensor attn, Tensor head_scores) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor(a!) output) -> ()");
}

// A model's blocks, and its passes (model.h).
TORCH_LIBRARY_FRAGMENT(dejavu_cpu, m) {
  m.class_<Model>("Model")
      .def(torch::init<int64_t, bool>())
      .def("add_mlp", &Model::add_mlp)
      .def("add_attention", &Model::add_attention)
      .def("use_cache", &Model::use_cache)
      .def("forget_caches", &Model::forget_caches)
      .def("begin", &Model::begin)
      .def("begin_other", &Model::begin_other)
      .def("end", &Model::end);
  m.def(
      "mlp(Tensor x, Tensor gate_input, Tensor positions, Tensor? previous, int rider_units, int layer) -> "
      "(Tensor, Tensor)");
  m.def("attention(Tensor x, Tensor gate_input, Tensor positions, Tensor? head_scores, int layer) -> Tensor");
}

TORCH_LIBRARY_IMPL(dejavu_cpu, CPU, m) {
  m.impl("mlp", mlp);
  m.impl("attention", attention);
  m.impl("count_dense", count_dense);
  m.impl("score_heads", score_heads);
  m.impl("select_neurons", select_neurons);
  m.impl("sparse_mlp", sparse_mlp);
  m.impl("dense_mlp", dense_mlp);
  m.impl("exact_down", exact_down);
  m.impl("sparse_qkv", sparse_qkv);
  m.impl("sparse_out_proj", sparse_out_proj);
  m.impl("transposed_out_proj", transposed_out_proj);
  m.impl("mask_heads", mask_heads);
  m.impl("linear", linear);
}

}  // namespace dejavu
