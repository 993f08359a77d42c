// The loops over rows, columns and tokens, written once for every instruction set. Included once by each ISA
// file, in its anonymous namespace, after its vector types:
//   Vec               WIDTH fp32 lanes: zero, load, load_n, store, store_n, set1, fma, relu, sum4 (of four
//                     vectors), sum
//   widen, widen_n    WIDTH elements of a type as a Vec; the first n, then zeros
//   MAX_TOKENS        tokens whose accumulators fit the registers beside four rows
//   ACCUMULATE_TOKENS likewise, two vectors of columns each, beside these of a row; MANY_TOKENS: of a tile
//                     when there are more

constexpr int ROWS = 4;  // of a dot tile: enough independent chains to hide the latency of a multiply-add
constexpr int64_t FEW_ROWS = 32,
                  MANY_ROWS = 128;  // of accumulate at once: up to ACCUMULATE_TOKENS, and beyond
static_assert(ROW_GROUP <= MANY_ROWS);
constexpr int64_t LINE = 64;

template <int N>
struct Number {
  static constexpr int value = N;
};

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t number(const Rows& rows, int64_t i) { return rows.ids ? rows.ids[i] : i; }

template <class E>
inline const E* row(const Rows& rows, int64_t i) {
  return static_cast<const E*>(rows.data) + number(rows, i) * rows.stride;
}

// Into the second cache: in the first one it would drive out what is in use (20 to 30% slower on Zen 4).
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// `D`: how weights W and inputs X are multiplied, STEP of them into a vector of sums Acc: load_w, load_x (and
// _n), mad. While a group of rows is multiplied the next one is prefetched: rows of a list lie too far apart
// for the hardware's own prefetcher, and each is only a few KB long.
template <class D, int R, int T, bool PREFETCH>
void dot_tile(const typename D::W* const* w, const typename D::W* const* next, const typename D::X* x,
              int64_t ldx, const Segment* segments, int64_t num_segments, float* out, int64_t ldo) {
  using Acc = typename D::Acc;
  Acc acc[T][R];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[t][r] = Acc::zero();
  for (int64_t s = 0; s < num_segments; ++s) {
    int64_t k = segments[s].begin;
    const int64_t end = segments[s].end;
    for (; k + D::STEP <= end; k += D::STEP) {
      typename D::WVec weights[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        weights[r] = D::load_w(w[r] + k);
        if (PREFETCH) prefetch(next[r] + k);
      }
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        const auto value = D::load_x(x + t * ldx + k);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) acc[t][r] = D::mad(acc[t][r], weights[r], value);
      }
    }
    if (k < end) {
      typename D::WVec weights[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) weights[r] = D::load_w_n(w[r] + k, end - k);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        const auto value = D::load_x_n(x + t * ldx + k, end - k);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) acc[t][r] = D::mad(acc[t][r], weights[r], value);
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    if (R == 4)
      Acc::sum4(acc[t][0], acc[t][R > 1 ? 1 : 0], acc[t][R > 2 ? 2 : 0], acc[t][R > 3 ? 3 : 0],
                out + t * ldo);
    else
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) out[t * ldo + r] = Acc::sum(acc[t][r]);
  }
}

template <class D, int R, bool PREFETCH>
void dot_tokens(int tokens, const typename D::W* const* w, const typename D::W* const* next,
                const typename D::X* x, int64_t ldx, const Segment* segments, int64_t num_segments,
                float* out, int64_t ldo) {
  switch (tokens) {
    case 1: return dot_tile<D, R, 1, PREFETCH>(w, next, x, ldx, segments, num_segments, out, ldo);
    case 2: return dot_tile<D, R, 2, PREFETCH>(w, next, x, ldx, segments, num_segments, out, ldo);
    case 3:
      if constexpr (D::TOKENS >= 3)
        return dot_tile<D, R, 3, PREFETCH>(w, next, x, ldx, segments, num_segments, out, ldo);
    case 4:
      if constexpr (D::TOKENS >= 4)
        return dot_tile<D, R, 4, PREFETCH>(w, next, x, ldx, segments, num_segments, out, ldo);
    case 5:
      if constexpr (D::TOKENS >= 5)
        return dot_tile<D, R, 5, PREFETCH>(w, next, x, ldx, segments, num_segments, out, ldo);
    case 6:
      if constexpr (D::TOKENS >= 6)
        return dot_tile<D, R, 6, PREFETCH>(w, next, x, ldx, segments, num_segments, out, ldo);
  }
}

// Tokens of the next tile when `left` are left: even shares, so that no tile is left with one token alone.
inline int share(int64_t left, int64_t most) {
  const int64_t tiles = (left + most - 1) / most;
  return static_cast<int>((left + tiles - 1) / tiles);
}

template <class D, int R>
void dot_group(const Rows& rows, int64_t i, int64_t last, const typename D::X* x, int64_t ldx, int64_t tokens,
               const Segment* segments, int64_t num_segments, float* out, int64_t ldo) {
  const typename D::W *w[R], *next[R];
  for (int r = 0; r < R; ++r) {
    w[r] = row<typename D::W>(rows, i + r);
    next[r] = row<typename D::W>(rows, i + r + R < last ? i + r + R : last - 1);
  }
  for (int64_t t = 0; t < tokens;) {
    const int count = share(tokens - t, D::TOKENS);
    if (t == 0)
      dot_tokens<D, R, true>(count, w, next, x, ldx, segments, num_segments, out, ldo);
    else
      dot_tokens<D, R, false>(count, w, next, x + t * ldx, ldx, segments, num_segments, out + t * ldo, ldo);
    t += count;
  }
}

// What i16's integers count.
inline void scale_tokens(const Values& x, int64_t tokens, int64_t n, float* out, int64_t ldo) {
  if (x.scales == nullptr) return;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < n; ++i) out[t * ldo + i] *= x.scales[t];
}

template <class D>
void dot_rows(const Rows& rows, int64_t begin, int64_t end, const Values& x, int64_t tokens,
              const Segment* segments, int64_t num_segments, float* out, int64_t ldo) {
  const auto* input = static_cast<const typename D::X*>(x.data);
  int64_t i = begin;
  for (; i + ROWS <= end; i += ROWS)
    dot_group<D, ROWS>(rows, i, end, input, x.stride, tokens, segments, num_segments, out + i - begin, ldo);
  for (; i < end; ++i)
    dot_group<D, 1>(rows, i, end, input, x.stride, tokens, segments, num_segments, out + i - begin, ldo);
  scale_tokens(x, tokens, end - begin, out, ldo);
}

template <class E>
void widen_all(const void* from, float* to, int64_t n) {
  const E* p = static_cast<const E*>(from);
  int64_t i = 0;
  for (; i + Vec::WIDTH <= n; i += Vec::WIDTH) widen(p + i).store(to + i);
  if (i < n) widen_n(p + i, n - i).store_n(to + i, n - i);
}

inline Vec some(const float* p, int64_t n) { return n < Vec::WIDTH ? Vec::load_n(p, n) : Vec::load(p); }

// values * scale + bias from the i-th on, n of them at most
inline Vec scaled(const float* values, const float* scale, const float* bias, int64_t i, int64_t n) {
  const Vec value = some(values + i, n - i);
  if (!scale && !bias) return value;
  return Vec::fma(scale ? some(scale + i, n - i) : Vec::set1(1), value,
                  bias ? some(bias + i, n - i) : Vec::zero());
}

template <class E>
void finish_all(const float* from, const float* scale, const float* bias, void* to, int64_t n) {
  E* p = static_cast<E*>(to);
  int64_t i = 0;
  for (; i + Vec::WIDTH <= n; i += Vec::WIDTH) store_as(scaled(from, scale, bias, i, n), p + i);
  if (i < n) {
    E last[Vec::WIDTH];
    store_as(scaled(from, scale, bias, i, n), last);
    for (int64_t j = 0; i + j < n; ++j) p[i + j] = last[j];
  }
}

int64_t threshold(const float* scores, const float* bias, int32_t* any, int64_t n) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) {  // which the compiler makes vectors of
    const int32_t yes = scores[i] + bias[i] > 0 ? 1 : 0;
    any[i] |= yes;
    count += yes;
  }
  return count;
}

template <class E>
void activate_all(const float* values, const float* scale, const float* bias, float* alive, void* to,
                  int64_t n, bool square) {
  const Vec one = Vec::set1(1);
  const auto activated = [square](Vec value) { return square ? Vec::fma(value, value, Vec::zero()) : value; };
  E* p = static_cast<E*>(to);
  int64_t i = 0;
  for (; i + Vec::WIDTH <= n; i += Vec::WIDTH) {
    const Vec value = Vec::relu(scaled(values, scale, bias, i, n));
    Vec::fma(one, value, Vec::load(alive + i)).store(alive + i);
    store_as(activated(value), p + i);
  }
  if (i < n) {
    const Vec value = Vec::relu(scaled(values, scale, bias, i, n));
    Vec::fma(one, value, Vec::load_n(alive + i, n - i)).store_n(alive + i, n - i);
    E last[Vec::WIDTH];
    store_as(activated(value), last);
    for (int64_t j = 0; i + j < n; ++j) p[i + j] = last[j];
  }
}

void activate(const float* values, const float* scale, const float* bias, float* alive, void* to, Type type,
              int64_t n, bool square) {
  if (type == Type::bf16)
    activate_all<BFloat>(values, scale, bias, alive, to, n, square);
  else
    activate_all<float>(values, scale, bias, alive, to, n, square);
}

void widen_any(const void* from, Type type, float* to, int64_t n) {
  switch (type) {
    case Type::f32: return widen_all<float>(from, to, n);
    case Type::f16: return widen_all<Half>(from, to, n);
    case Type::bf16: return widen_all<BFloat>(from, to, n);
    case Type::i8: return widen_all<int8_t>(from, to, n);
    case Type::i16:
    case Type::u8:
    case Type::u4: return;
  }
}

void finish_any(const float* from, const float* scale, const float* bias, void* to, Type type, int64_t n) {
  switch (type) {
    case Type::f32: return finish_all<float>(from, scale, bias, to, n);
    case Type::f16: return finish_all<Half>(from, scale, bias, to, n);
    case Type::bf16: return finish_all<BFloat>(from, scale, bias, to, n);
    case Type::i8:
    case Type::i16:
    case Type::u8:
    case Type::u4: return;
  }
}

// Weights of any type times fp32 inputs.
template <class E>
struct WidenDot {
  using W = E;
  using X = float;
  using WVec = Vec;
  using Acc = Vec;
  static constexpr int64_t STEP = Vec::WIDTH;
  static constexpr int TOKENS = MAX_TOKENS < 4 ? MAX_TOKENS : 4;  // more would spill
  static Vec load_w(const E* p) { return widen(p); }
  static Vec load_w_n(const E* p, int64_t n) { return widen_n(p, n); }
  static Vec load_x(const float* p) { return Vec::load(p); }
  static Vec load_x_n(const float* p, int64_t n) { return Vec::load_n(p, n); }
  static Vec mad(Vec acc, Vec w, Vec x) { return Vec::fma(w, x, acc); }
};

inline Type input_widened(Type, Type) { return Type::f32; }

// nibbles.h
void dot_nibbles(const Rows& rows, int64_t begin, int64_t end, const Values& x, int64_t tokens,
                 int64_t columns, float* out, int64_t ldo);

void dot_widened(const Rows& rows, int64_t begin, int64_t end, const Values& x, int64_t tokens,
                 const Segment* segments, int64_t num_segments, float* out, int64_t ldo) {
  const auto run = [&](auto weight) {
    dot_rows<WidenDot<decltype(weight)>>(rows, begin, end, x, tokens, segments, num_segments, out, ldo);
  };
  switch (rows.type) {
    case Type::f32: return run(float());
    case Type::f16: return run(Half());
    case Type::bf16: return run(BFloat());
    case Type::i8: return run(int8_t());
    case Type::u4: return dot_nibbles(rows, begin, end, x, tokens, segments[0].end, out, ldo);
    case Type::i16:
    case Type::u8: return;
  }
}
