// The second half of an MLP, of which no neuron was chosen: fc2's rows of those that came out positive.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "mlp.h"

namespace dejavu {

namespace {

// Tokens that share a list of neurons. The fewer, the fewer neurons some of them needs; the more, the more
// often a row that was read is multiplied.
constexpr int64_t TILE_TOKENS = 4;
// Tokens below which all of them share one list: a row is read from memory, once, and that takes longer than
// to multiply it.
constexpr int64_t LEAST_TILED = 32;
// Of fc2 that all tiles go through before the next, in the second cache.
constexpr int64_t BLOCK_ROWS = 512, BLOCK_COLUMNS = 256;

// Tokens of a tile, and later the neurons that some of them needs, ascending, and their activations of these.
struct Tile {
  int64_t first, tokens, count;
  const int32_t* neurons;
  Values values;
};

// What tiles have in common.
struct Activated {
  Values values;            // of all neurons
  std::vector<Tile> tiles;  // without their values
  const float* alive;       // [tiles][ffn], 0: of no token of the tile
  int64_t read = 0;         // neurons of all tiles
};

// The activation of x [tokens, ffn], as values of a type.
Activated activated(const Tensor& x, Type type, bool square) {
  const int64_t tokens = x.size(0), ffn = x.size(1), size = size_of(type), from = x.element_size();
  const int64_t tiles = tokens < LEAST_TILED ? 1 : (tokens + TILE_TOKENS - 1) / TILE_TOKENS;
  const int64_t width = (ffn + 15) / 16 * 16 + CACHE_LINE / 4;  // a line more, as in Inputs
  Activated all;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = tokens * i / tiles;
    all.tiles.push_back({first, tokens * (i + 1) / tiles - first, 0, nullptr, {}});
  }
  char* h = scratch<HIDDEN, char>(tokens * width * size);
  float* alive = scratch<ALIVE, float>(tiles * ffn);
  share_out(ffn, COLUMN_UNIT, [&](int64_t first, int64_t last) {
    const int64_t mine = last - first;
    float* row = scratch<TILE, float>(mine);
    for (int64_t i = 0; i < tiles; ++i) {
      float* any = alive + i * ffn + first;
      std::fill_n(any, mine, 0);
      for (int64_t t = all.tiles[i].first; t < all.tiles[i].first + all.tiles[i].tokens; ++t) {
        const char* given = static_cast<const char*>(x.data_ptr()) + (t * x.stride(0) + first) * from;
        kernels().widen(given, type_of(x), row, mine);
        kernels().activate(row, nullptr, nullptr, any, h + (t * width + first) * size, type, mine, square);
      }
    }
  });
  all.values = {h, type, width};
  all.alive = alive;
  return all;
}

// Gives each tile its neurons.
void list_neurons(Activated& all, int64_t ffn) {
  const int64_t tiles = static_cast<int64_t>(all.tiles.size());
  auto* lists = scratch<ALIVE_LIST, int32_t>(tiles * ffn);
  share_out(tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* any = all.alive + i * ffn;
      int32_t* list = lists + i * ffn;
      int64_t n = 0;
      for (int64_t j = 0; j < ffn; ++j) {
        list[n] = static_cast<int32_t>(j);
        n += any[j] != 0;
      }
      all.tiles[i].neurons = list;
      all.tiles[i].count = n;
    }
  });
  for (const Tile& tile : all.tiles) all.read += tile.count;
}

// Neurons of tokens that came out positive.
int64_t positive(const Activated& all, int64_t tokens, int64_t ffn) {
  int64_t n = 0;
  const auto count = [&](const auto* h) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < ffn; ++i) n += h[t * all.values.stride + i] != 0;
  };
  if (all.values.type == Type::bf16)
    count(static_cast<const uint16_t*>(all.values.data));
  else
    count(static_cast<const float*>(all.values.data));
  return n;
}

// Neurons that any tile needs, for all tokens at once.
Survivors united(const Activated& all, int64_t ffn) {
  const int64_t tiles = static_cast<int64_t>(all.tiles.size());
  auto* numbers = scratch<LIST, int32_t>(2 * ffn);
  auto* places = numbers + ffn;
  share_out(ffn, COLUMN_UNIT, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) places[i] = 0;
    for (int64_t tile = 0; tile < tiles; ++tile)
      for (int64_t i = begin; i < end; ++i) places[i] |= all.alive[tile * ffn + i] != 0;
  });
  int64_t n = 0;
  for (int64_t i = 0; i < ffn; ++i) {
    const bool any = places[i] != 0;
    numbers[n] = places[n] = static_cast<int32_t>(i);
    n += any;
  }
  return {numbers, places, n};
}

// Gives each tile its values; `type`: that they are multiplied in.
void gather_values(Activated& all, Type type) {
  const int64_t size = size_of(all.values.type), n = static_cast<int64_t>(all.tiles.size());
  std::vector<int64_t> begins(n + 1);
  for (int64_t i = 0; i < n; ++i)
    begins[i + 1] = begins[i] + all.tiles[i].tokens * ((all.tiles[i].count + 31) / 32 * 32);
  char* gathered = scratch<GATHERED, char>(begins[n] * size);
  char* integers = scratch<ROUNDED, char>(begins[n] * size_of(type));
  float* scales = scratch<ROUNDED_SCALES, float>(n * TILE_TOKENS);
  share_out(n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Tile& tile = all.tiles[i];
      const int64_t stride = (tile.count + 31) / 32 * 32;
      const auto gather = [&](auto* to, const auto* from) {
        for (int64_t t = 0; t < tile.tokens; ++t)
          for (int64_t j = 0; j < tile.count; ++j)
            to[t * stride + j] = from[(tile.first + t) * all.values.stride + tile.neurons[j]];
      };
      char* mine = gathered + begins[i] * size;
      if (size == 2)
        gather(reinterpret_cast<uint16_t*>(mine), static_cast<const uint16_t*>(all.values.data));
      else
        gather(reinterpret_cast<float*>(mine), static_cast<const float*>(all.values.data));
      tile.values = {mine, all.values.type, stride};
      if (type != Type::i16) continue;
      char* to = integers + begins[i] * size_of(type);
      for (int64_t t = 0; t < tile.tokens; ++t)
        kernels().round(mine + t * stride * size, all.values.type, tile.count, type, tile.count,
                        to + t * stride * size_of(type), scales + i * TILE_TOKENS + t, nullptr);
      tile.values = {to, type, stride, scales + i * TILE_TOKENS};
    }
  });
}

// Threads share the columns; where they are too few, the tiles too.
void down_tiles(const Activated& all, int64_t tokens, const Tensor& fc2, const float* scale,
                const Tensor& out) {
  const int64_t ffn = fc2.size(0), columns = fc2.size(1), tiles = static_cast<int64_t>(all.tiles.size());
  const int64_t threads = at::get_num_threads(),
                column_tasks = std::clamp<int64_t>(columns / LEAST_COLUMNS, 1, threads),
                tile_tasks = std::clamp<int64_t>(threads / column_tasks, 1, tiles);
  const int64_t units = (columns + COLUMN_UNIT - 1) / COLUMN_UNIT;
  auto* places = scratch<LIST, int32_t>(ffn);
  std::iota(places, places + ffn, 0);
  float* sums = scratch<PARTIALS, float>(tokens * columns);
  const Type type = type_of(out);
  at::parallel_for(0, column_tasks * tile_tasks, 1, [&](int64_t first_task, int64_t last_task) {
    for (int64_t task = first_task; task < last_task; ++task) {
      const int64_t place = task % column_tasks, part = task / column_tasks;
      const int64_t begin = units * place / column_tasks * COLUMN_UNIT,
                    end = std::min(columns, units * (place + 1) / column_tasks * COLUMN_UNIT);
      const int64_t from = tiles * part / tile_tasks, to = tiles * (part + 1) / tile_tasks;
      char* memory = scratch<TILE, char>(accumulate_scratch(TILE_TOKENS, BLOCK_COLUMNS));
      for (int64_t column = begin; column < end; column += BLOCK_COLUMNS) {
        const int64_t stop = std::min(end, column + BLOCK_COLUMNS);
        for (int64_t row = 0; row < ffn; row += BLOCK_ROWS)
          for (int64_t i = from; i < to; ++i) {
            const Tile& tile = all.tiles[i];
            const auto* list_end = tile.neurons + tile.count;
            const auto* low = std::lower_bound(tile.neurons, list_end, row);
            const auto* high = std::lower_bound(low, list_end, row + BLOCK_ROWS);
            kernels().accumulate(rows_of(fc2, tile.neurons), low - tile.neurons, high - tile.neurons,
                                 tile.values, places, tile.tokens, column, stop,
                                 sums + tile.first * columns + column, columns, memory, row > 0);
          }
        for (int64_t t = all.tiles[from].first; t < all.tiles[to - 1].first + all.tiles[to - 1].tokens; ++t)
          kernels().finish(sums + t * columns + column, scale ? scale + column : nullptr, nullptr,
                           at_element(out, t * columns + column), type, stop - column);
      }
    }
  });
}

// x [tokens, ffn], what fc1 gave, through the activation and fc2's rows of the neurons that came out
// positive: for a token of a tile; or for any token, where a tile needs more than `crossover` of these, or
// where tokens are few.
Tensor exact_down(const Tensor& x, const Tensor& fc2, const MaybeTensor& fc2_scale, bool square,
                  double crossover, const MaybeTensor& counters) {
  const int64_t ffn = fc2.size(0), columns = fc2.size(1);
  check_matrix(x, -1, ffn, "x");
  check_matrix(fc2, x.size(1), columns, "fc2's transposed weight");
  check_weight(x, fc2, fc2_scale, columns, "fc2's transposed weight");
  check_counters(counters, ABOVE_CROSSOVER);
  const float* scale = scale_of(fc2_scale);
  Tensor out = at::empty({x.size(0), columns}, x.options());
  const int64_t all_tokens = x.size(0),
                chunks = std::max<int64_t>(1, (all_tokens + MLP_TOKENS - 1) / MLP_TOKENS);
  const Type input = kernels().dot_input(type_of(fc2), type_of(x));
  for (int64_t chunk = 0; chunk < chunks && all_tokens > 0; ++chunk) {
    const int64_t begin = all_tokens * chunk / chunks, tokens = all_tokens * (chunk + 1) / chunks - begin;
    const Tensor part = x.narrow(0, begin, tokens), result = out.narrow(0, begin, tokens);
    Activated all =
        activated(part, type_of(x) == Type::bf16 && input != Type::f32 ? Type::bf16 : Type::f32, square);
    const int64_t tiles = static_cast<int64_t>(all.tiles.size());
    Survivors survivors = united(all, ffn);
    if (tiles > 1) list_neurons(all, ffn);
    const double most = crossover * static_cast<double>(tiles * survivors.count);
    const bool tiled = tiles > 1 && static_cast<double>(all.read) <= most;
    const int64_t read = tiled ? all.read : survivors.count;
    count(counters, STEPS, tiled ? tiles : 1);
    count(counters, ROWS, tokens);
    if (counters) count(counters, SELECTED, tokens == 1 ? survivors.count : positive(all, tokens, ffn));
    count(counters, READ, read);
    count(counters, SURVIVED, read);
    count(counters, ABOVE_CROSSOVER, tiles > 1 && !tiled ? 1 : 0);
    if (tiled) {
      gather_values(all, input);
      down_tiles(all, tokens, fc2, scale, result);
      continue;
    }
    Values values = all.values;
    if (type_of(fc2) == Type::i8)
      values = rounded_survivors(values, survivors, tokens, ffn, activations_type(input, tokens));
    down(values, survivors, tokens, fc2, scale, result);
  }
  return out;
}

}  // namespace

}  // namespace dejavu
