// Transposed weights, of which an input is a row: fc2 and out_proj. Rows of inputs that are 0 are skipped: of
// an MLP's second half, what is 0 for all tokens, or for a few of them that go through it together.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "products.h"

namespace dejavu {

namespace {

constexpr int64_t COLUMN_UNIT = WEIGHT_GROUP;  // columns that an accumulate tile takes at once, at most
constexpr int64_t LEAST_COLUMNS = 256;  // of a task of fc2: narrower pieces of rows would waste prefetches
constexpr int64_t LEAST_ROWS = 64;
constexpr int64_t SUMS_BYTES = 256 << 10;  // of fc2's columns at a time: in the second cache
// Tokens that share a list of neurons. The fewer, the fewer neurons some of them needs; the more, the more
// often a row that was read is multiplied.
constexpr int64_t TILE_TOKENS = 4;
// Tokens below which all of them share one list: a row is read from memory, once, and that takes longer than
// to multiply it. Of int8 more, whose rows cost more to bring into the order that they are multiplied in.
constexpr int64_t least_tiled(Type weights) { return weights == Type::i8 || weights == Type::u4 ? 128 : 40; }
// Of fc2 that all tiles go through before the next, in the second cache.
constexpr int64_t BLOCK_ROWS = 512, BLOCK_COLUMNS = 256;

// What is between fc1 and fc2: the values of n neurons.
struct Activations {
  Values values;
  int64_t tokens, n;
  const int32_t* list;  // the neurons' numbers; null: all
  int64_t tiles;
  float* alive;  // [tiles][n], of each neuron the sum over the tile's tokens: 0 where none is positive

  // Memory for the values of a type, to be multiplied with others, and for `alive`, which is to be cleared.
  Activations(Type type, Type weights, int64_t tokens, int64_t n, const int32_t* list)
      : tokens(tokens),
        n(n),
        list(list),
        tiles(tokens < least_tiled(weights) ? 1 : (tokens + TILE_TOKENS - 1) / TILE_TOKENS) {
    const int64_t width = (n + 15) / 16 * 16 + CACHE_LINE / 4;  // a line more, as in Inputs
    values = {scratch<HIDDEN, char>(tokens * width * size_of(type)), type, width};
    alive = scratch<ALIVE, float>(tiles * n);
  }

  int32_t number(int64_t i) const { return list ? list[i] : static_cast<int32_t>(i); }

  void clear(int64_t begin, int64_t end) {
    for (int64_t tile = 0; tile < tiles; ++tile)
      std::fill(alive + tile * n + begin, alive + tile * n + end, 0);
  }

  // Takes a token's products with neurons [begin, begin + mine): through the activation into `values`.
  void take(int64_t t, int64_t begin, int64_t mine, float* products, const float* scale, const float* bias,
            bool square) {
    float* any = alive + (tiles == 1 ? 0 : t / TILE_TOKENS * n) + begin;
    char* to = static_cast<char*>(const_cast<void*>(values.data)) +
               (t * values.stride + begin) * size_of(values.type);
    kernels().activate(products, scale, bias, any, to, values.type, mine, square);
  }

  int64_t positive() const {
    int64_t sum = 0;
    const auto count = [&](const auto* h) {
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < n; ++i) sum += h[t * values.stride + i] != 0;
    };
    if (values.type == Type::f32)
      count(static_cast<const float*>(values.data));
    else
      count(static_cast<const uint16_t*>(values.data));
    return sum;
  }
};

// Neurons that some token needs: their numbers, and their places among the n.
struct Survivors {
  const int32_t* numbers;
  int32_t* places;
  int64_t count;
};

// Tokens that go through fc2 together, with the neurons that some of them needs and their values.
struct Tile {
  int64_t first, tokens;
  Survivors neurons;
  Values values;

  // Of its neurons, how many are below `row` of `rows`; in whole groups, where values have them, if these are
  // spread evenly.
  int64_t until(int64_t row, int64_t rows) const {
    if (row >= rows) return neurons.count;
    if (grouped(values.type)) return neurons.count * row / rows / ROW_GROUP * ROW_GROUP;
    return std::lower_bound(neurons.numbers, neurons.numbers + neurons.count, row) - neurons.numbers;
  }
};

// Those of n neurons that are alive, in memory for n of each.
Survivors compact(const Activations& h, const float* alive, int32_t* numbers, int32_t* places) {
  int64_t m = 0;
  for (int64_t i = 0; i < h.n; ++i) {
    numbers[m] = h.number(i);
    places[m] = static_cast<int32_t>(i);
    m += alive[i] != 0;
  }
  return {numbers, places, m};
}

// What any tile needs.
Survivors united(const Activations& h) {
  const float* any = h.alive;
  if (const int64_t tiles = h.tiles; tiles > 1) {
    float* sum = scratch<ALIVE_ANY, float>(h.n);
    share_out(h.n, COLUMN_UNIT, [&](int64_t begin, int64_t end) {
      std::copy(h.alive + begin, h.alive + end, sum + begin);
      for (int64_t tile = 1; tile < tiles; ++tile)
        for (int64_t i = begin; i < end; ++i) sum[i] += h.alive[tile * h.n + i];  // none is negative
    });
    any = sum;
  }
  auto* lists = scratch<ALIVE_LIST, int32_t>(2 * h.n);
  return compact(h, any, lists, lists + h.n);
}

// Tiles with their neurons.
std::vector<Tile> tiles_of(const Activations& h) {
  std::vector<Tile> tiles(h.tiles);
  auto* lists = scratch<TILE_LISTS, int32_t>(2 * h.n * h.tiles);
  share_out(h.tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * TILE_TOKENS;
      auto* numbers = lists + 2 * h.n * i;
      tiles[i] = {first,
                  std::min(TILE_TOKENS, h.tokens - first),
                  compact(h, h.alive + i * h.n, numbers, numbers + h.n),
                  {}};
    }
  });
  return tiles;
}

// What fc2 of int8 is multiplied with: ReLU leaves nothing negative.
Type activations_type(Type input, int64_t tokens) {
  const Type type = many_tokens(input, tokens);
  return type == Type::i8 ? Type::u8 : type;
}

// Gives each tile its neurons' values side by side, as they are multiplied: as they are, or rounded.
void gather_values(const Activations& h, Type type, std::vector<Tile>& tiles) {
  const int64_t size = size_of(h.values.type), n = static_cast<int64_t>(tiles.size());
  const auto stride_of = [](const Tile& tile) { return (tile.neurons.count + 31) / 32 * 32; };
  std::vector<int64_t> begins(n + 1);
  for (int64_t i = 0; i < n; ++i) begins[i + 1] = begins[i] + tiles[i].tokens * stride_of(tiles[i]);
  const bool round = type == Type::i16 || grouped(type);
  const int64_t most = grouped(type) ? groups_of(h.n, ROW_GROUP) : 1;  // groups of a token
  char* gathered = scratch<GATHERED, char>(begins[n] * size);
  char* integers = round ? scratch<ROUNDED, char>(begins[n] * size_of(type)) : nullptr;
  float* scales = scratch<ROUNDED_SCALES, float>(h.tokens * most);
  int32_t* offsets = scratch<ROUNDED_OFFSETS, int32_t>(h.tokens * most);
  share_out(n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Tile& tile = tiles[i];
      const int64_t stride = stride_of(tile), count = tile.neurons.count;
      const auto gather = [&](auto* to, const auto* from) {
        for (int64_t t = 0; t < tile.tokens; ++t)
          for (int64_t j = 0; j < count; ++j)
            to[t * stride + j] = from[(tile.first + t) * h.values.stride + tile.neurons.places[j]];
      };
      char* mine = gathered + begins[i] * size;
      if (size == 2)
        gather(reinterpret_cast<uint16_t*>(mine), static_cast<const uint16_t*>(h.values.data));
      else
        gather(reinterpret_cast<float*>(mine), static_cast<const float*>(h.values.data));
      tile.values = {mine, h.values.type, stride};
      tile.values.rounded = h.values.rounded;
      if (!round) continue;
      const int64_t groups = grouped(type) ? groups_of(count, ROW_GROUP) : 1, first = tile.first * most;
      tile.values = {
          integers + begins[i] * size_of(type), type, stride, scales + first, offsets + first, groups};
      for (int64_t t = 0; t < tile.tokens; ++t)
        kernels().round(mine + t * stride * size, h.values.type, count, type, ROW_GROUP, 128,
                        integers + (begins[i] + t * stride) * size_of(type), scales + first + t * groups,
                        offsets + first + t * groups);
    }
  });
}

// [inputs, outputs]; of integers with their scales, of 4 bits maybe another one for each output.
struct Transposed {
  const Tensor& weight;
  const MaybeTensor &scale, &output_scale;

  int64_t columns() const { return width_of(weight); }
  Rows rows(const int32_t* ids) const { return rows_of(weight, scale, ids); }
  int64_t units() const { return (columns() + COLUMN_UNIT - 1) / COLUMN_UNIT; }
  // Threads share the columns, as far as these are wide enough.
  int64_t column_tasks() const {
    return std::clamp<int64_t>(columns() / LEAST_COLUMNS, 1, at::get_num_threads());
  }
  std::pair<int64_t, int64_t> columns_of(int64_t place) const {
    const int64_t tasks = column_tasks();
    return {units() * place / tasks * COLUMN_UNIT,
            std::min(columns(), units() * (place + 1) / tasks * COLUMN_UNIT)};
  }
  // A token's sums, of columns from the begin-th on.
  void finish(const float* sums, int64_t t, int64_t begin, int64_t end, const Tensor& out) const {
    const float* each = output_scale ? output_scale->data_ptr<float>() : scale_of(weight, scale);
    kernels().finish(sums, each ? each + begin : nullptr, nullptr, at_element(out, t * columns() + begin),
                     type_of(out), end - begin);
  }
};

// Threads share the columns; where they are too few, the tiles too.
void multiply_tiles(const Transposed& matrix, const std::vector<Tile>& tiles, int64_t tokens,
                    const Tensor& out) {
  const int64_t ffn = matrix.weight.size(0), columns = matrix.columns(),
                n = static_cast<int64_t>(tiles.size());
  const int64_t column_tasks = matrix.column_tasks(),
                tile_tasks = std::clamp<int64_t>(at::get_num_threads() / column_tasks, 1, n);
  auto* places = scratch<TILE_PLACES, int32_t>(ffn);
  std::iota(places, places + ffn, 0);
  float* sums = scratch<PARTIALS, float>(tokens * columns);
  at::parallel_for(0, column_tasks * tile_tasks, 1, [&](int64_t first_task, int64_t last_task) {
    for (int64_t task = first_task; task < last_task; ++task) {
      const auto [begin, end] = matrix.columns_of(task % column_tasks);
      const int64_t part = task / column_tasks, from = n * part / tile_tasks,
                    to = n * (part + 1) / tile_tasks;
      char* memory = scratch<TILE, char>(accumulate_scratch(TILE_TOKENS, BLOCK_COLUMNS));
      for (int64_t column = begin; column < end; column += BLOCK_COLUMNS) {
        const int64_t stop = std::min(end, column + BLOCK_COLUMNS);
        for (int64_t row = 0; row < ffn; row += BLOCK_ROWS)
          for (int64_t i = from; i < to; ++i) {
            const Tile& tile = tiles[i];
            kernels().accumulate(matrix.rows(tile.neurons.numbers), tile.until(row, ffn),
                                 tile.until(row + BLOCK_ROWS, ffn), tile.values, places, tile.tokens, column,
                                 stop, sums + tile.first * columns + column, columns, memory, row > 0);
          }
        for (int64_t t = tiles[from].first; t < tiles[to - 1].first + tiles[to - 1].tokens; ++t)
          matrix.finish(sums + t * columns + column, t, column, stop, out);
      }
    }
  });
}

// The rows of some inputs, times h's values at their places. Threads share the columns; where they are too
// few, the neurons too, whose partial sums are added in order.
void multiply(const Transposed& matrix, const Values& h, const Survivors& survivors, int64_t tokens,
              const Tensor& out) {
  const int64_t columns = matrix.columns(), m = survivors.count, column_tasks = matrix.column_tasks();
  const int64_t splits = std::clamp<int64_t>(m / LEAST_ROWS, 1, at::get_num_threads() / column_tasks);
  const auto share = [&](int64_t split) {
    return split == splits   ? m
           : grouped(h.type) ? m * split / splits / ROW_GROUP * ROW_GROUP
                             : m * split / splits;
  };
  float* partials = scratch<PARTIALS, float>(splits * tokens * columns);
  const Rows rows = matrix.rows(survivors.numbers);
  const int64_t panel =
      std::max(LEAST_COLUMNS, SUMS_BYTES / (4 * std::max<int64_t>(tokens, 1)) / COLUMN_UNIT * COLUMN_UNIT);
  at::parallel_for(0, column_tasks * splits, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t split = task / column_tasks;
      const auto [begin, end] = matrix.columns_of(task % column_tasks);
      if (begin >= end) continue;
      char* memory = scratch<TILE, char>(accumulate_scratch(tokens, panel));
      for (int64_t column = begin; column < end; column += panel) {
        const int64_t stop = std::min(end, column + panel);
        kernels().accumulate(rows, share(split), share(split + 1), h, survivors.places, tokens, column, stop,
                             partials + split * tokens * columns + column, columns, memory, false);
        if (splits == 1)
          for (int64_t t = 0; t < tokens; ++t)
            matrix.finish(partials + t * columns + column, t, column, stop, out);
      }
    }
  });
  if (splits > 1)
    share_out(tokens * matrix.units(), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t t = i / matrix.units(), begin = i % matrix.units() * COLUMN_UNIT,
                      end = std::min(columns, begin + COLUMN_UNIT);
        for (int64_t s = 1; s < splits; ++s)
          for (int64_t c = begin; c < end; ++c)
            partials[t * columns + c] += partials[(s * tokens + t) * columns + c];
        matrix.finish(partials + t * columns + begin, t, begin, end, out);
      }
    });
}

// What int8 weights are multiplied with, the survivors' values side by side.
Values rounded_survivors(const Activations& h, Survivors& survivors, Type type) {
  if (type == Type::f32) return h.values;
  Values values = h.values;
  if (survivors.count < h.n) {
    const int64_t m = survivors.count;
    const auto gather = [&](auto* to) {
      const auto* from = static_cast<decltype(to)>(const_cast<void*>(h.values.data));
      share_out(h.tokens, TOKEN_UNIT, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
          for (int64_t i = 0; i < m; ++i) to[t * m + i] = from[t * h.values.stride + survivors.places[i]];
      });
      values = {to, h.values.type, m};
    };
    if (h.values.type == Type::bf16)
      gather(scratch<GATHERED, at::BFloat16>(h.tokens * m));
    else
      gather(scratch<GATHERED, float>(h.tokens * m));
    std::iota(survivors.places, survivors.places + m, 0);
  }
  return rounded<ROUNDED, ROUNDED_SCALES, ROUNDED_OFFSETS>(values, h.tokens, survivors.count, type,
                                                           ROW_GROUP);
}

// Neurons that were needed, by any token; and that were read: of each tile's own, where `tiles` is not 1.
struct Needed {
  int64_t survivors, read, tiles;
};

// Activations of what was `from` through fc2. By tiles where these need at most the share `crossover` of what
// all tokens together do.
Needed down(const Transposed& fc2, Activations& h, Type from, double crossover, const Tensor& out) {
  const Type weights = type_of(fc2.weight), input = kernels().dot_input(weights, from);
  const Type type = activations_type(input, h.tokens);
  if (weights == Type::u4) h.values.rounded = type;
  Survivors survivors = united(h);
  if (h.tiles > 1) {
    std::vector<Tile> tiles = tiles_of(h);
    int64_t read = 0;
    for (const Tile& tile : tiles) read += tile.neurons.count;
    if (static_cast<double>(read) <= crossover * static_cast<double>(h.tiles * survivors.count)) {
      gather_values(h, weights == Type::i8 ? type : h.values.type, tiles);
      multiply_tiles(fc2, tiles, h.tokens, out);
      return {survivors.count, read, h.tiles};
    }
  }
  const Values values = weights == Type::i8 ? rounded_survivors(h, survivors, type) : h.values;
  multiply(fc2, values, survivors, h.tokens, out);
  return {survivors.count, survivors.count, 1};
}

}  // namespace

}  // namespace dejavu
