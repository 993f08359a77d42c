// Products of weights of type u4, 0 to 15, with inputs rounded to 8 bits, four at a time (VPDPBUSD), at every
// number of tokens. Included after lanes.h and nibbles.h.

// A piece of a row as bytes, columns in order.
inline __m512i nibbles(const uint8_t* p) {
  const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i shift = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
  return _mm512_and_si512(_mm512_srlv_epi16(twice, shift), _mm512_set1_epi8(15));
}

// R rows by T tokens, group by group: both have a scale for each WEIGHT_GROUP columns, `scales`
// [T][R][groups] their products. `sums` hold what the weights' offsets add.
template <int R, int T, bool PREFETCH>
void nibble_tile(const uint8_t* const* w, const uint8_t* const* next, const float* scales, const int8_t* x,
                 int64_t ldx, int64_t groups, Vec (&sums)[T][R], float* out, int64_t ldo) {
  for (int64_t g = 0; g < groups; ++g) {
    __m512i first[R], second[R];  // more than these and the sums would not fit the registers
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      first[r] = nibbles(w[r] + g * (WEIGHT_GROUP / 2));
      second[r] = nibbles(w[r] + g * (WEIGHT_GROUP / 2) + PIECE / 2);
      if (PREFETCH) prefetch(next[r] + g * (WEIGHT_GROUP / 2));
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const int8_t* values = x + t * ldx + g * WEIGHT_GROUP;
      const __m512i some = _mm512_loadu_si512(values), others = _mm512_loadu_si512(values + PIECE);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512i half = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first[r], some);
        const Ints sum{_mm512_dpbusd_epi32(half, second[r], others)};
        sums[t][r] = Vec::fma(sum.floats(), Vec::set1(scales[(t * R + r) * groups + g]), sums[t][r]);
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    if (R == 4)
      Vec::sum4(sums[t][0], sums[t][R > 1 ? 1 : 0], sums[t][R > 2 ? 2 : 0], sums[t][R > 3 ? 3 : 0],
                out + t * ldo);
    else
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) out[t * ldo + r] = Vec::sum(sums[t][r]);
  }
}

constexpr int NIBBLE_TOKENS = 4;

template <int R, int T, bool PREFETCH>
void nibble_tokens(const uint8_t* const* w, const uint8_t* const* next, const float (*own)[MOST_SCALES],
                   const Values& x, int64_t t, int64_t groups, float* out, int64_t ldo) {
  alignas(64) float scales[NIBBLE_TOKENS * R * MOST_SCALES];
  Vec sums[T][R];
  for (int i = 0; i < T; ++i) {
    const float* steps = x.scales + (t + i) * x.groups;
    const int32_t* offsets = x.offsets + (t + i) * x.groups;
    for (int r = 0; r < R; ++r) sums[i][r] = Vec::zero();
    for (int64_t g = 0; g < groups; g += Vec::WIDTH) {
      const int64_t n = min(Vec::WIDTH, groups - g);
      const Vec step = Vec::load_n(steps + g, n);
      const Vec offset{_mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(Vec::first(n), offsets + g))};
      for (int r = 0; r < R; ++r) {
        const Vec both = Vec::fma(step, Vec::load_n(own[r] + g, n), Vec::zero());
        both.store_n(scales + (i * R + r) * groups + g, n);
        sums[i][r] = Vec::fma(both, offset, sums[i][r]);
      }
    }
  }
  const auto* values = static_cast<const int8_t*>(x.data) + t * x.stride;
  nibble_tile<R, T, PREFETCH>(w, next, scales, values, x.stride, groups, sums, out + t * ldo, ldo);
}

template <int R>
void nibble_group(const Rows& rows, int64_t i, int64_t last, const Values& x, int64_t tokens, int64_t columns,
                  float* out, int64_t ldo) {
  const uint8_t *w[R], *next[R];
  float own[R][MOST_SCALES];
  const int64_t groups = columns / WEIGHT_GROUP;
  for (int r = 0; r < R; ++r) {
    const int64_t later = i + r + R < last ? i + r + R : last - 1;
    w[r] = row<uint8_t>(rows, i + r);
    next[r] = row<uint8_t>(rows, later);
    widen_scales(rows.scales, number(rows, i + r), 0, groups, own[r]);
    prefetch_scales(rows, later, 0, groups);
  }
  for (int64_t t = 0; t < tokens;) {
    const int count = share(tokens - t, NIBBLE_TOKENS);
    const auto run = [&](auto number) {
      constexpr int T = decltype(number)::value;
      if (t == 0)
        nibble_tokens<R, T, true>(w, next, own, x, t, groups, out, ldo);
      else
        nibble_tokens<R, T, false>(w, next, own, x, t, groups, out, ldo);
    };
    switch (count) {
      case 1: run(Number<1>()); break;
      case 2: run(Number<2>()); break;
      case 3: run(Number<3>()); break;
      default: run(Number<4>());
    }
    t += count;
  }
}

void dot_nibble_quads(const Rows& rows, int64_t begin, int64_t end, const Values& x, int64_t tokens,
                      int64_t columns, float* out, int64_t ldo) {
  int64_t i = begin;
  for (; i + ROWS <= end; i += ROWS)
    nibble_group<ROWS>(rows, i, end, x, tokens, columns, out + i - begin, ldo);
  for (; i < end; ++i) nibble_group<1>(rows, i, end, x, tokens, columns, out + i - begin, ldo);
}

// As quad_tile.
template <int R, int V>
void nibble_lanes_tile(const Rows& rows, int64_t i, const uint8_t* const* w, const uint8_t* const* next,
                       const int32_t* x, int64_t columns, int64_t tokens, float* out, int64_t ldo) {
  const auto* scales = reinterpret_cast<const float*>(x + LANE_BLOCK * columns / 4);
  const auto* offsets = reinterpret_cast<const int32_t*>(scales + LANE_BLOCK * groups_of(columns, GROUP));
  const __m512i low = _mm512_set1_epi8(15);
  float own[R][MOST_SCALES];
  for (int r = 0; r < R; ++r)
    widen_scales(rows.scales, number(rows, i + r), 0, columns / WEIGHT_GROUP, own[r]);
  Vec sums[V][R];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sums[v][r] = Vec::zero();
  for (int64_t g = 0; g < columns / PIECE; ++g) {
    __m512i acc[V][R];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[v][r] = _mm512_loadu_si512(offsets + (g * V + v) * 16);
    if (next != nullptr && g % 2 == 0)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) prefetch(next[r] + g * (PIECE / 2));
#pragma GCC unroll 2
    for (int64_t c = 0; c < PIECE / 2; c += 4) {
      __m512i first[V], second[V];
      const int32_t* of = x + (g * PIECE + c) / 4 * V * 16;
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        first[v] = _mm512_loadu_si512(of + v * 16);
        second[v] = _mm512_loadu_si512(of + (PIECE / 8 * V + v) * 16);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        int32_t eight;
        __builtin_memcpy(&eight, w[r] + g * (PIECE / 2) + c, 4);
        const __m512i packed = _mm512_set1_epi32(eight);
        const __m512i one = _mm512_and_si512(packed, low),
                      other = _mm512_and_si512(_mm512_srli_epi16(packed, 4), low);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v)
          acc[v][r] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(acc[v][r], one, first[v]), other, second[v]);
      }
    }
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(scales + (g * V + v) * 16),
                                           _mm512_set1_ps(own[r][g * PIECE / WEIGHT_GROUP]));
        sums[v][r] = Vec::fma(Ints{acc[v][r]}.floats(), {scale}, sums[v][r]);
      }
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) store_lanes<R>(sums[v], tokens - 16 * v, out + 16 * v * ldo, ldo);
}

template <int R, int V>
void nibble_lanes(const Rows& rows, int64_t begin, int64_t end, int64_t last, const void* x, int64_t columns,
                  int64_t tokens, float* out, int64_t ldo, bool prefetch) {
  lane_rows<uint8_t, R>(
      rows, begin, end, last, prefetch, [&](auto n, const auto* w, const auto* next, int64_t at) {
        nibble_lanes_tile<decltype(n)::value, V>(rows, begin + at, w, next, static_cast<const int32_t*>(x),
                                                 columns, tokens, out + at, ldo);
      });
}

void dot_nibble_lanes(const Rows& rows, int64_t begin, int64_t end, int64_t last, const void* x,
                      int64_t columns, int64_t tokens, float* out, int64_t ldo, bool prefetch) {
  if (lane_width(tokens) == 16)
    nibble_lanes<12, 1>(rows, begin, end, last, x, columns, tokens, out, ldo, prefetch);
  else
    nibble_lanes<6, 2>(rows, begin, end, last, x, columns, tokens, out, ldo, prefetch);
}

// Four rows at a time, interleaved as they are packed: halves of the bytes are columns PIECE / 2 apart. Of
// one sign, h is what VPDPBUSD takes as unsigned: its steps are half as large.
template <class E>
struct NibbleAccumulate {
  using W = uint8_t;
  using H = E;
  static constexpr bool SIGNED = H(-1) < 0;
  using WVec = __m512i;
  using HVec = __m512i;
  using Acc = Ints;
  using Sum = float;
  static constexpr int GROUP = 4, VECTORS = 4;
  static constexpr bool GROUPED = true;
  static constexpr int64_t COLUMNS = PIECE;

  static constexpr int64_t bytes(int64_t columns) { return columns / 2; }
  static void load(const uint8_t* const* w, int64_t column, int64_t, WVec* to) {
    __m512i packed[2];
    const int64_t at = bytes(column);
    interleave_quads(two_rows(w[0] + at, w[2] + at), two_rows(w[1] + at, w[3] + at), packed);
    const __m512i low = _mm512_set1_epi8(15);
    to[0] = _mm512_and_si512(packed[0], low);
    to[1] = _mm512_and_si512(packed[1], low);
    to[2] = _mm512_and_si512(_mm512_srli_epi16(packed[0], 4), low);
    to[3] = _mm512_and_si512(_mm512_srli_epi16(packed[1], 4), low);
  }
  static HVec value(const H* h) {
    int32_t four;
    __builtin_memcpy(&four, h, 4);
    return _mm512_set1_epi32(four);
  }
  static Ints mad(Ints acc, WVec w, HVec value) {
    return {SIGNED ? _mm512_dpbusd_epi32(acc.v, w, value) : _mm512_dpbusd_epi32(acc.v, value, w)};
  }
  static Ints start(const Values& of, int64_t t) { return Ints::set1(of.offsets[t * of.groups]); }
};

// A block's values h [tokens][ROW_GROUP], 0 beyond n, each times its row's scale (null: 1), in 8 bits.
template <class H>
void round_block(const float* h, const float* scales, int64_t n, int64_t tokens, H* to, float* steps,
                 int32_t* offsets) {
  constexpr int MOST = ROW_GROUP / Vec::WIDTH;
  const int vectors = static_cast<int>(groups_of(n, Vec::WIDTH));
  for (int64_t t = 0; t < tokens; ++t) {
    Vec values[MOST], most = Vec::zero(), sum = Vec::zero();
#pragma GCC unroll 8
    for (int v = 0; v < MOST; ++v) {
      if (v >= vectors) break;
      values[v] = Vec::load(h + t * ROW_GROUP + v * Vec::WIDTH);
      if (scales != nullptr) values[v] = Vec::fma(values[v], Vec::load(scales + v * Vec::WIDTH), Vec::zero());
      most = Vec::max(most, NibbleAccumulate<H>::SIGNED ? Vec::abs(values[v]) : values[v]);
      sum = Vec::add(sum, values[v]);
    }
    const float step = _mm512_reduce_max_ps(most.v) / (NibbleAccumulate<H>::SIGNED ? 127 : 255);
    steps[t] = known(step, Vec::sum(sum));
    const Vec inverse = Vec::set1(step > 0 ? 1 / step : 0);
    Ints total = Ints::zero();
#pragma GCC unroll 8
    for (int v = 0; v < MOST; ++v) {
      if (v >= vectors) break;
      const Ints whole = Ints::nearest(Vec::fma(values[v], inverse, Vec::zero()));
      whole.narrow(to + t * ROW_GROUP + v * Vec::WIDTH);
      total = Ints::add(total, whole);
    }
    // unsigned: of what is not finite the sum is any number, and is not read
    offsets[t] = static_cast<int32_t>(0u - 8 * static_cast<uint32_t>(Ints::total(total)));
  }
}

// Of n <= ROW_GROUP rows, from the first-th on, scales [groups][ROW_GROUP], 0 beyond n.
inline void transposed_scales(const Rows& rows, int64_t first, int64_t n, int64_t at, int64_t groups,
                              float* to) {
  for (int64_t i = 0; i < n; i += 16)
    for (int64_t g = 0; g < groups; g += 16) {
      const int64_t some = min(16, groups - g);
      __m512i square[16];
      for (int64_t r = 0; r < 16; ++r) {
        if (i + r >= n) {
          square[r] = _mm512_setzero_si512();
          continue;
        }
        const auto widened = [&](auto value) {
          const auto* from = static_cast<const decltype(value)*>(rows.scales.data) +
                             number(rows, first + i + r) * rows.scales.stride + at + g;
          return _mm512_castps_si512(widen_n(from, some).v);
        };
        square[r] = rows.scales.type == Type::bf16  ? widened(BFloat())
                    : rows.scales.type == Type::f16 ? widened(Half())
                                                    : widened(float());
      }
      transpose(square);
      for (int64_t j = 0; j < some; ++j) _mm512_storeu_si512(to + (g + j) * ROW_GROUP + i, square[j]);
    }
}

// Block by block of rows, as accumulate_rows; h is rounded anew for every WEIGHT_GROUP columns, because a
// neuron's scale is part of what is rounded. Where rows share scales instead, a block ends with them, and its
// sums are scaled column by column.
template <class H>
void accumulate_nibble_rows(const Rows& rows, int64_t begin, int64_t end, const Values& h,
                            const int32_t* places, int64_t tokens, int64_t column_begin, int64_t column_end,
                            float* out, int64_t ldo, char* scratch, bool add) {
  using A = NibbleAccumulate<H>;
  const int64_t columns = column_end - column_begin, groups = columns / WEIGHT_GROUP;
  auto* sums = reinterpret_cast<float*>(scratch);
  auto* kept = reinterpret_cast<__m512i*>(sums + columns * tokens);
  auto* gathered = reinterpret_cast<float*>(kept + ROW_GROUP / A::GROUP * A::VECTORS);
  float* scales = gathered + tokens * ROW_GROUP;  // [groups][ROW_GROUP]
  float* scaled = scales + groups * ROW_GROUP;    // sums of a group of columns
  float* steps = scaled + tokens * WEIGHT_GROUP;
  auto* offsets = reinterpret_cast<int32_t*>(steps + tokens);
  auto* integers = reinterpret_cast<H*>(offsets + tokens);
  const bool shared = rows.scales.rows > 1;
  for (int64_t i = 0; i < columns * tokens; ++i) sums[i] = 0;
  const auto length = [&](int64_t first) {
    int64_t n = min(ROW_GROUP, end - first);
    if (!shared) return n;
    const int64_t mine = number(rows, first) / rows.scales.rows;
    for (int64_t i = 1; i < n; ++i)
      if (number(rows, first + i) / rows.scales.rows != mine) n = i;
    return n;
  };
  for (int64_t first = begin, n; first < end; first += n) {
    n = length(first);
    const Block<A> block(rows, first, n, first + n < end ? length(first + n) : 0, column_begin, columns,
                         kept);
    const int64_t whole = groups_of(n, Vec::WIDTH) * Vec::WIDTH;
    const bool neighbours = places[first + n - 1] - places[first] == n - 1;
    for (int64_t t = 0; t < tokens; ++t) {
      float* to = gathered + t * ROW_GROUP;
      const auto gather = [&](auto value) {
        const auto* from = static_cast<const decltype(value)*>(h.data) + t * h.stride;
        if (neighbours)
          for (int64_t i = 0; i < n; i += Vec::WIDTH)
            widen_n(from + places[first] + i, min(Vec::WIDTH, n - i)).store(to + i);
        else
          for (int64_t i = 0; i < n; ++i) to[i] = widen_one(from[places[first + i]]);
      };
      switch (h.type) {
        case Type::f16: gather(Half()); break;
        case Type::bf16: gather(BFloat()); break;
        default: gather(float());
      }
      for (int64_t i = n; i < whole; ++i) to[i] = 0;
    }
    if (!shared) {
      transposed_scales(rows, first, n, column_begin / WEIGHT_GROUP, groups, scales);
      for (int64_t i = 0; i < block.later; ++i)
        prefetch_scales(rows, first + n + i, column_begin / WEIGHT_GROUP, groups);
    }
    Values of = h;
    of.scales = steps;
    of.offsets = offsets;
    of.groups = 1;
    for (int64_t g = 0; g < groups; ++g) {
      if (!shared || g == 0)
        round_block(gathered, shared ? nullptr : scales + g * ROW_GROUP, n, tokens, integers, steps, offsets);
      const int64_t at = g * WEIGHT_GROUP, stop = at + WEIGHT_GROUP;
      float* base = sums;
      if (shared) {
        base = scaled - at * tokens;
        for (int64_t i = 0; i < WEIGHT_GROUP * tokens; ++i) scaled[i] = 0;
      }
      if (tokens <= MOST_TOKENS<A>) {
        int64_t done = few_tokens<A, 2>(block, at, stop, tokens, integers, ROW_GROUP, of, base);
        few_tokens<A, 1>(block, done, stop, tokens, integers, ROW_GROUP, of, base);
      } else {
        for (int64_t c = at; c < stop; c += A::COLUMNS)
          many_tokens<A, true>(block, c, 0, tokens, integers, ROW_GROUP, of, base);
      }
      if (!shared) continue;
      float own[WEIGHT_GROUP];
      widen_scales(rows.scales, number(rows, first) / rows.scales.rows, column_begin + at, WEIGHT_GROUP, own);
      for (int64_t c = 0; c < WEIGHT_GROUP; c += A::COLUMNS)
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t j = 0; j < A::COLUMNS; ++j)
            sums[(at + c) * tokens + t * A::COLUMNS + j] +=
                scaled[c * tokens + t * A::COLUMNS + j] * own[c + j];
    }
  }
  unroll_tiles<A>(sums, tokens, columns, nullptr, out, ldo, add);
}

// Of integer weights, whatever their width.

inline Type input_integers(Type weights, Type inputs) {
  return weights == Type::u4 && inputs != Type::f32 ? Type::i8 : input_rounded(weights, inputs);
}

void dot_integers(const Rows& rows, int64_t begin, int64_t end, const Values& x, int64_t tokens,
                  const Segment* segments, int64_t num_segments, float* out, int64_t ldo) {
  if (rows.type == Type::u4 && x.type == Type::i8)
    dot_nibble_quads(rows, begin, end, x, tokens, segments[0].end, out, ldo);
  else
    dot_rounded(rows, begin, end, x, tokens, segments, num_segments, out, ldo);
}

void accumulate_integers(const Rows& rows, int64_t begin, int64_t end, const Values& h, const int32_t* places,
                         int64_t tokens, int64_t column_begin, int64_t column_end, float* out, int64_t ldo,
                         char* scratch, bool add) {
  if (rows.type == Type::u4 && h.rounded == Type::u8)
    accumulate_nibble_rows<uint8_t>(rows, begin, end, h, places, tokens, column_begin, column_end, out, ldo,
                                    scratch, add);
  else if (rows.type == Type::u4 && h.rounded == Type::i8)
    accumulate_nibble_rows<int8_t>(rows, begin, end, h, places, tokens, column_begin, column_end, out, ldo,
                                   scratch, add);
  else
    accumulate_quads(rows, begin, end, h, places, tokens, column_begin, column_end, out, ldo, scratch, add);
}

void lanes_integers(const Rows& rows, int64_t begin, int64_t end, int64_t last, const void* x,
                    int64_t columns, int64_t tokens, const Segment* segments, int64_t num_segments,
                    float* out, int64_t ldo, bool prefetch) {
  if (rows.type == Type::u4)
    dot_nibble_lanes(rows, begin, end, last, x, columns, tokens, out, ldo, prefetch);
  else
    dot_quads(rows, begin, end, last, x, columns, tokens, segments, num_segments, out, ldo, prefetch);
}
