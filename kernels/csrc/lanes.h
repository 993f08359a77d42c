// Many tokens, one a lane of 16: a pair of bf16 weights, or four of int8, is broadcast to them. Included
// after integers.h.

// 16 rows of 16 32-bit elements become 16 columns.
inline void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// [tokens][bytes] of 32-bit elements -> [elements][width tokens]
void transposed(const char* from, int64_t row_bytes, int64_t tokens, int64_t bytes, int32_t* out) {
  const int64_t width = lane_width(tokens);
  for (int64_t first = 0; first < width; first += 16)
    for (int64_t at = 0; at < bytes; at += 64) {
      const int64_t elements = bytes - at < 64 ? (bytes - at) / 4 : 16;
      __m512i rows[16];
      for (int64_t t = 0; t < 16; ++t)
        rows[t] = first + t < tokens
                      ? _mm512_maskz_loadu_epi32(Vec::first(elements), from + (first + t) * row_bytes + at)
                      : _mm512_setzero_si512();
      transpose(rows);
      for (int64_t i = 0; i < elements; ++i) _mm512_storeu_si512(out + (at / 4 + i) * width + first, rows[i]);
    }
}

// Behind 4 * LANE_BLOCK bytes for each four columns: scales and offsets [groups][width].
void pack_lanes(const Values& x, int64_t tokens, int64_t columns, void* to) {
  const int64_t size = x.type == Type::i8 ? 1 : 2, width = lane_width(tokens);
  transposed(static_cast<const char*>(x.data), x.stride * size, tokens, columns * size,
             static_cast<int32_t*>(to));
  if (x.type != Type::i8) return;
  const int64_t groups = groups_of(columns, GROUP);
  auto* scales = reinterpret_cast<float*>(static_cast<char*>(to) + LANE_BLOCK * columns);
  auto* offsets = reinterpret_cast<int32_t*>(scales + LANE_BLOCK * groups);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t t = 0; t < width; ++t) {
      scales[g * width + t] = t < tokens ? x.scales[t * x.groups + g] : 0;
      offsets[g * width + t] = t < tokens ? x.offsets[t * x.groups + g] : 0;
    }
}

// R <= 16 rows' sums, a vector of 16 tokens each, as [tokens][ldo].
template <int R>
void store_lanes(const Vec* sums, int64_t tokens, float* out, int64_t ldo) {
  __m512i lanes[16];
  for (int r = 0; r < 16; ++r)
    lanes[r] = r < R ? _mm512_castps_si512(sums[r < R ? r : 0].v) : _mm512_setzero_si512();
  transpose(lanes);
  for (int t = 0; t < 16 && t < tokens; ++t) _mm512_mask_storeu_epi32(out + t * ldo, Vec::first(R), lanes[t]);
}

// tile(w, next) of R rows at a time, then of one; `next` is null where nothing is to be prefetched.
template <class E, int R, class Tile>
void lane_rows(const Rows& rows, int64_t begin, int64_t end, int64_t last, bool prefetch, const Tile& tile) {
  const auto group = [&](int64_t i, auto number) {
    constexpr int N = decltype(number)::value;
    const E *w[N], *next[N];
    for (int r = 0; r < N; ++r) {
      w[r] = row<E>(rows, i + r);
      next[r] = row<E>(rows, i + r + N < last ? i + r + N : last - 1);
    }
    tile(number, w, prefetch ? next : nullptr, i - begin);
  };
  int64_t i = begin;
  for (; i + R <= end; i += R) group(i, Number<R>());
  for (; i < end; ++i) group(i, Number<1>());
}

// R rows of int8 by V vectors of tokens, group by group: sums of four products each in int32, of groups in
// fp32.
template <int R, int V>
void quad_tile(const int8_t* const* w, const int8_t* const* next, const int32_t* x, int64_t columns,
               int64_t tokens, float* out, int64_t ldo) {
  const auto* scales = reinterpret_cast<const float*>(x + LANE_BLOCK * columns / 4);
  const auto* offsets = reinterpret_cast<const int32_t*>(scales + LANE_BLOCK * groups_of(columns, GROUP));
  const __m512i flip = _mm512_set1_epi8(-128);
  Vec sums[V][R];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sums[v][r] = Vec::zero();
  for (int64_t first = 0; first < columns; first += GROUP) {
    const int64_t end = columns - first < GROUP ? columns : first + GROUP, at = first / GROUP * V * 16;
    __m512i acc[V][R];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[v][r] = _mm512_loadu_si512(offsets + at + v * 16);
    if (next != nullptr)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        for (int64_t c = first; c < end; c += LINE) prefetch(next[r] + c);
#pragma GCC unroll 4
    for (int64_t c = first; c < end; c += 4) {
      __m512i values[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) values[v] = _mm512_loadu_si512(x + (c / 4 * V + v) * 16);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        int32_t four;
        __builtin_memcpy(&four, w[r] + c, 4);
        const __m512i weights = _mm512_xor_si512(_mm512_set1_epi32(four), flip);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) acc[v][r] = _mm512_dpbusd_epi32(acc[v][r], weights, values[v]);
      }
    }
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        sums[v][r] = Vec::fma(Ints{acc[v][r]}.floats(), Vec::load(scales + at + v * 16), sums[v][r]);
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) store_lanes<R>(sums[v], tokens - 16 * v, out + 16 * v * ldo, ldo);
}

template <int R, int V>
void quad_rows(const Rows& rows, int64_t begin, int64_t end, int64_t last, const void* x, int64_t columns,
               int64_t tokens, float* out, int64_t ldo, bool prefetch) {
  lane_rows<int8_t, R>(rows, begin, end, last, prefetch,
                       [&](auto n, const auto* w, const auto* next, int64_t at) {
                         quad_tile<decltype(n)::value, V>(w, next, static_cast<const int32_t*>(x), columns,
                                                          tokens, out + at, ldo);
                       });
}

void dot_quads(const Rows& rows, int64_t begin, int64_t end, int64_t last, const void* x, int64_t columns,
               int64_t tokens, const Segment*, int64_t, float* out, int64_t ldo, bool prefetch) {
  if (lane_width(tokens) == 16)
    quad_rows<12, 1>(rows, begin, end, last, x, columns, tokens, out, ldo, prefetch);
  else
    quad_rows<6, 2>(rows, begin, end, last, x, columns, tokens, out, ldo, prefetch);
}

inline bool has_quads(Type type, int64_t columns) { return type == Type::i8 && columns % 4 == 0; }

// Which pairs of interleave_quads make columns 0 to 15, and 16 to 31.
#define PAIRS(i) i, 16 + i
#define EIGHT_PAIRS(i) \
  PAIRS(i), PAIRS(i + 1), PAIRS(i + 2), PAIRS(i + 3), PAIRS(i + 4), PAIRS(i + 5), PAIRS(i + 6), PAIRS(i + 7)
alignas(64) constexpr int16_t FIRST_PAIRS[32] = {EIGHT_PAIRS(0), EIGHT_PAIRS(32)}, LAST_PAIRS[32] = {
                                                                                       EIGHT_PAIRS(8),
                                                                                       EIGHT_PAIRS(40)};
#undef EIGHT_PAIRS
#undef PAIRS

// The first of each of four rows' 32 bytes, then the second ...: of the first 16, and of the last.
inline __m512i two_rows(const void* a, const void* b) {
  const __m256i low = _mm256_loadu_si256(static_cast<const __m256i*>(a));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_loadu_si256(static_cast<const __m256i*>(b)),
                            1);
}

inline __m512i two_rows(const void* a, const void* b, __mmask32 some) {
  const __m256i low = _mm256_maskz_loadu_epi8(some, a), high = _mm256_maskz_loadu_epi8(some, b);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Of rows 0 and 2, and of 1 and 3.
inline void interleave_quads(__m512i a, __m512i b, __m512i* to) {
  // Pairs of rows 0 and 1 in the lower half, of 2 and 3 in the upper one, within quarters: columns 0 to 7
  // and 16 to 23, then the others.
  const __m512i pairs = _mm512_unpacklo_epi8(a, b), others = _mm512_unpackhi_epi8(a, b);
  to[0] = _mm512_permutex2var_epi16(pairs, _mm512_load_si512(FIRST_PAIRS), others);
  to[1] = _mm512_permutex2var_epi16(pairs, _mm512_load_si512(LAST_PAIRS), others);
}

// Four rows at a time, interleaved. VPDPBUSD multiplies unsigned with signed: values of one sign are the
// unsigned ones, those of both meet rows as w + 128.
template <class E>
struct QuadAccumulate {
  using W = int8_t;
  using H = E;
  static constexpr bool FLIP = H(-1) < 0;
  using WVec = __m512i;
  using HVec = __m512i;
  using Acc = Ints;
  using Sum = float;
  static constexpr int GROUP = 4, VECTORS = 2;
  static constexpr bool GROUPED = true;
  static constexpr int64_t COLUMNS = 32;

  static constexpr int64_t bytes(int64_t columns) { return columns * int64_t(sizeof(W)); }
  static void load(const int8_t* const* w, int64_t column, int64_t width, WVec* to) {
    const __mmask32 some = Ints::first(width);
    interleave_quads(two_rows(w[0] + column, w[2] + column, some),
                     two_rows(w[1] + column, w[3] + column, some), to);
    const __m512i flip = _mm512_set1_epi8(FLIP ? -128 : 0);
    to[0] = _mm512_xor_si512(flip, to[0]);
    to[1] = _mm512_xor_si512(flip, to[1]);
  }
  static HVec value(const H* h) {
    int32_t four;
    __builtin_memcpy(&four, h, 4);
    return _mm512_set1_epi32(four);
  }
  static Ints mad(Ints acc, WVec w, HVec value) {
    return {FLIP ? _mm512_dpbusd_epi32(acc.v, w, value) : _mm512_dpbusd_epi32(acc.v, value, w)};
  }
  static Ints start(const Values& of, int64_t t) {
    return FLIP ? Ints::set1(of.offsets[t * of.groups]) : Ints::zero();
  }
};

void accumulate_quads(const Rows& rows, int64_t begin, int64_t end, const Values& h, const int32_t* places,
                      int64_t tokens, int64_t column_begin, int64_t column_end, float* out, int64_t ldo,
                      char* scratch, bool add) {
  if (h.type == Type::i8)
    accumulate_rows<QuadAccumulate<int8_t>>(rows, begin, end, h, places, tokens, column_begin, column_end,
                                            out, ldo, scratch, add);
  else if (h.type == Type::u8)
    accumulate_rows<QuadAccumulate<uint8_t>>(rows, begin, end, h, places, tokens, column_begin, column_end,
                                             out, ldo, scratch, add);
  else
    accumulate_rounded(rows, begin, end, h, places, tokens, column_begin, column_end, out, ldo, scratch, add);
}
