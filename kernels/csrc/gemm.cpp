// Dense linear layers for many tokens (prefill, large batches), from weights as they lie: no packed copy is kept.
//
// oneDNN's small matrix product (brgemm, through ATen) takes its first operand row by row and its second one in pairs of
// rows. So where a layer's outputs are the weight's rows (fc1, qkv, out_proj), the weight is the first operand as it is,
// and the tokens are transposed into pairs once; fc2's rows are paired panel by panel on the way. A packed copy, as vLLM
// keeps of its own linears, could not be gathered from.
#include <ATen/native/CPUBlas.h>

#include "common.h"

namespace dejavu {
namespace {

using at::BFloat16;
namespace blas = at::native::cpublas;

constexpr int64_t TOKEN_BLOCK = 64;
constexpr int64_t ROW_BLOCK_BYTES = 256 << 10;  // of the weight, in the second cache beside a block of tokens
constexpr int64_t PANEL_ROWS = 512, PANEL_COLUMNS = 128;
constexpr int64_t AHEAD_ROWS = 32;  // prefetched while a panel is filled
constexpr int64_t PANEL_TOKENS = 1024;  // whose sums are kept while panels pass by

}  // namespace

bool has_gemm(const at::Tensor& x, const at::Tensor& weight) {
  return weight.scalar_type() == at::kBFloat16 && x.scalar_type() == at::kBFloat16 && kernels().interleave != nullptr &&
         x.size(1) % 32 == 0 && weight.size(1) % 16 == 0;
}

bool gemm(const at::Tensor& x, const at::Tensor& weight, const float* bias, bool relu, const at::Tensor& out) {
  const int64_t tokens = x.size(0), hidden = x.size(1), rows = weight.size(0), stride = weight.stride(0);
  if (!has_gemm(x, weight) || rows % 16) return false;
  const Kernels& isa = kernels();
  const Type type = type_of(out);
  const int64_t pairs = hidden / 2, blocks = (tokens + TOKEN_BLOCK - 1) / TOKEN_BLOCK;
  const auto* input = static_cast<const uint32_t*>(x.data_ptr());
  auto* packed = scratch<PACKED, uint32_t>(blocks * pairs * TOKEN_BLOCK);  // [block][pairs][TOKEN_BLOCK]
  share_out(blocks * (pairs / 16), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / (pairs / 16), pair = i % (pairs / 16) * 16;
      for (int64_t t = 0; t < TOKEN_BLOCK; t += 16) {
        uint32_t* to = packed + (block * pairs + pair) * TOKEN_BLOCK + t;
        const int64_t first = block * TOKEN_BLOCK + t;
        if (first + 16 <= tokens) {
          isa.transpose16(input + first * pairs + pair, pairs, to, TOKEN_BLOCK);
        } else {
          uint32_t some[16 * 16] = {};
          for (int64_t j = 0; first + j < tokens; ++j) std::copy_n(input + (first + j) * pairs + pair, 16, some + 16 * j);
          isa.transpose16(some, 16, to, TOKEN_BLOCK);
        }
      }
    }
  });
  const auto* w = static_cast<const BFloat16*>(weight.data_ptr());
  int64_t row_block = ROW_BLOCK_BYTES / (2 * hidden) / 16 * 16;
  row_block = std::clamp<int64_t>(row_block, 16, 128);
  share_out(rows, 16, [&](int64_t begin, int64_t end) {
    auto* sums = scratch<PANEL, float>(row_block * TOKEN_BLOCK);        // [rows][tokens]
    auto* turned = scratch<TURNED, float>(16 * row_block);          // [16 tokens][rows]
    for (int64_t row = begin; row < end; row += row_block) {
      const int64_t n = std::min(row_block, end - row);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * TOKEN_BLOCK, these = std::min(TOKEN_BLOCK, tokens - first), padded = (these + 15) / 16 * 16;
        blas::brgemm(n, padded, hidden, stride, TOKEN_BLOCK, TOKEN_BLOCK, false, w + row * stride,
                     reinterpret_cast<const BFloat16*>(packed + block * pairs * TOKEN_BLOCK), sums, true);
        for (int64_t t = 0; t < these; t += 16) {
          for (int64_t r = 0; r < n; r += 16)
            isa.transpose16(reinterpret_cast<const uint32_t*>(sums + r * TOKEN_BLOCK + t), TOKEN_BLOCK,
                            reinterpret_cast<uint32_t*>(turned + r), row_block);
          for (int64_t j = 0; j < 16 && t + j < these; ++j)
            isa.finish(turned + j * row_block, bias ? bias + row : bias, relu, at_element(out, (first + t + j) * rows + row), type, n);
        }
      }
    }
    blas::brgemm_release();
  });
  return true;
}

bool gemm_transposed(const at::Tensor& h, const at::Tensor& weight, const int32_t* ids, const at::Tensor& out) {
  const int64_t tokens = h.size(0), rows = h.size(1), columns = weight.size(1), stride = weight.stride(0);
  if (!has_gemm(h, weight)) return false;
  const Kernels& isa = kernels();
  const auto* input = static_cast<const BFloat16*>(h.data_ptr());
  const auto* w = static_cast<const uint16_t*>(weight.data_ptr());
  share_out(columns, 16, [&](int64_t begin, int64_t end) {
    auto* sums = scratch<PANEL, float>(std::min(tokens, PANEL_TOKENS) * PANEL_COLUMNS);
    auto* panel = scratch<PACKED, uint16_t>(PANEL_ROWS * PANEL_COLUMNS);
    for (int64_t column = begin; column < end; column += PANEL_COLUMNS) {
      const int64_t n = std::min(PANEL_COLUMNS, end - column);
      for (int64_t first = 0; first < tokens; first += PANEL_TOKENS) {
        const int64_t these = std::min(PANEL_TOKENS, tokens - first);
        for (int64_t row = 0; row < rows; row += PANEL_ROWS) {
          const int64_t k = std::min(PANEL_ROWS, rows - row);
          const auto at = [&](int64_t j) { return w + (ids ? ids[row + j] : row + j) * stride + column; };
          for (int64_t j = 0; j < k; j += 2) {
            if (row + j + AHEAD_ROWS + 1 < rows)
              for (int64_t c = 0; c < n; c += 32) {
                __builtin_prefetch(at(j + AHEAD_ROWS) + c, 0, 2);
                __builtin_prefetch(at(j + AHEAD_ROWS + 1) + c, 0, 2);
              }
            isa.interleave(at(j), at(j + 1), panel + j * n, n);
          }
          for (int64_t t = 0; t < these; t += TOKEN_BLOCK)
            blas::brgemm(std::min(TOKEN_BLOCK, these - t), n, k, rows, n, n, row > 0, input + (first + t) * rows + row,
                         reinterpret_cast<const BFloat16*>(panel), sums + t * n, true);
        }
        for (int64_t t = 0; t < these; ++t) isa.finish(sums + t * n, nullptr, false, at_element(out, (first + t) * columns + column), Type::bf16, n);
      }
    }
    blas::brgemm_release();
  });
  return true;
}

}  // namespace dejavu
