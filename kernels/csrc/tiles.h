// The loops over rows, columns and tokens, written once for every instruction set. Included once by each ISA file, in its
// anonymous namespace, after its vector types:
//   Vec             WIDTH fp32 lanes: zero, load, load_n, store, store_n, set1, fma, relu, sum4 (of four vectors), sum
//   widen, widen_n  WIDTH elements of a type as a Vec; the first n, then zeros
//   Dot<W, X>       how weights W and inputs X are multiplied: STEP, load_w, load_x (and _n), mad
//   MAX_TOKENS      tokens whose accumulators fit the registers beside four rows

constexpr int ROWS = 4;  // of a dot tile: enough independent chains to hide the latency of a multiply-add
constexpr int64_t DIRECT_ROWS = 8;  // of accumulate, at once, where they lie
constexpr int64_t PANEL_ROWS = 64;  // copied at once: a panel of them fits the first cache, all panels the second
constexpr int64_t LINE = 64;

template <class E>
inline const E* row(const Rows& rows, int64_t i) {
  return static_cast<const E*>(rows.data) + (rows.ids ? rows.ids[i] : i) * rows.stride;
}

// Into the second cache: in the first one it would drive out what is in use (20 to 30% slower on Zen 4).
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// While a group of rows is multiplied the next one is prefetched: rows of a list lie too far apart for the hardware's
// own prefetcher, and each is only a few KB long.
template <class D, int R, int T, bool PREFETCH>
void dot_tile(const typename D::W* const* w, const typename D::W* const* next, const typename D::X* x, int64_t ldx,
              const Segment* segments, int64_t num_segments, float* out, int64_t ldo) {
  Vec acc[T][R];
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) acc[t][r] = Vec::zero();
  for (int64_t s = 0; s < num_segments; ++s) {
    int64_t k = segments[s].begin;
    const int64_t end = segments[s].end;
    for (; k + D::STEP <= end; k += D::STEP) {
      typename D::WVec weights[R];
      for (int r = 0; r < R; ++r) {
        weights[r] = D::load_w(w[r] + k);
        if (PREFETCH) prefetch(next[r] + k);
      }
      for (int t = 0; t < T; ++t) {
        const auto value = D::load_x(x + t * ldx + k);
        for (int r = 0; r < R; ++r) acc[t][r] = D::mad(acc[t][r], weights[r], value);
      }
    }
    if (k < end) {
      typename D::WVec weights[R];
      for (int r = 0; r < R; ++r) weights[r] = D::load_w_n(w[r] + k, end - k);
      for (int t = 0; t < T; ++t) {
        const auto value = D::load_x_n(x + t * ldx + k, end - k);
        for (int r = 0; r < R; ++r) acc[t][r] = D::mad(acc[t][r], weights[r], value);
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    if (R == 4) Vec::sum4(acc[t][0], acc[t][R > 1 ? 1 : 0], acc[t][R > 2 ? 2 : 0], acc[t][R > 3 ? 3 : 0], out + t * ldo);
    else
      for (int r = 0; r < R; ++r) out[t * ldo + r] = Vec::sum(acc[t][r]);
  }
}

template <class D, int R, bool PREFETCH>
void dot_tokens(int tokens, const typename D::W* const* w, const typename D::W* const* next, const typename D::X* x, int64_t ldx,
                const Segment* segments, int64_t num_segments, float* out, int64_t ldo) {
  switch (tokens) {
    case 1: return dot_tile<D, R, 1, PREFETCH>(w, next, x, ldx, segments, num_segments, out, ldo);
    case 2: return dot_tile<D, R, 2, PREFETCH>(w, next, x, ldx, segments, num_segments, out, ldo);
    case 3: if constexpr (MAX_TOKENS >= 3) return dot_tile<D, R, 3, PREFETCH>(w, next, x, ldx, segments, num_segments, out, ldo);
    case 4: if constexpr (MAX_TOKENS >= 4) return dot_tile<D, R, 4, PREFETCH>(w, next, x, ldx, segments, num_segments, out, ldo);
    case 5: if constexpr (MAX_TOKENS >= 5) return dot_tile<D, R, 5, PREFETCH>(w, next, x, ldx, segments, num_segments, out, ldo);
    case 6: if constexpr (MAX_TOKENS >= 6) return dot_tile<D, R, 6, PREFETCH>(w, next, x, ldx, segments, num_segments, out, ldo);
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
    const int count = share(tokens - t, MAX_TOKENS);
    if (t == 0) dot_tokens<D, R, true>(count, w, next, x, ldx, segments, num_segments, out, ldo);
    else dot_tokens<D, R, false>(count, w, next, x + t * ldx, ldx, segments, num_segments, out + t * ldo, ldo);
    t += count;
  }
}

template <class D>
void dot_rows(const Rows& rows, int64_t begin, int64_t end, const void* x, int64_t ldx, int64_t tokens,
              const Segment* segments, int64_t num_segments, float* out, int64_t ldo) {
  const auto* input = static_cast<const typename D::X*>(x);
  int64_t i = begin;
  for (; i + ROWS <= end; i += ROWS)
    dot_group<D, ROWS>(rows, i, end, input, ldx, tokens, segments, num_segments, out + i - begin, ldo);
  for (; i < end; ++i) dot_group<D, 1>(rows, i, end, input, ldx, tokens, segments, num_segments, out + i - begin, ldo);
}

// Pieces of one or two rows that are needed later, to be prefetched while n rows are worked through.
struct Later {
  const char *first, *last;
  int64_t bytes, n;

  void prefetch_at(int64_t i, int64_t rows) const {
    for (int64_t b = bytes * i / n / LINE * LINE; b < bytes * (i + rows) / n; b += LINE) {
      prefetch(first + b);
      if (last != first) prefetch(last + b);
    }
  }
};

// Accumulate adds blocks of rows to sums of COLUMNS columns at a time. A few tokens read the rows where they lie; more read
// them several times, so that the block is first copied into panels: rows of a power of two of bytes would fall into the
// same few sets of the first cache. A is Accumulate<E> below or an instruction set's own:
//   GROUP                 rows that are multiplied together
//   pack(h, n, to)        n values of h, of one token
//   fill(rows, i, n, to)  GROUP rows from the i-th of n, COLUMNS columns (`width` of them, then zeros), for a panel
//   from_panel, from_rows add n rows to the sums of T tokens
template <class E>
struct Accumulate {
  using W = E;
  using H = float;
  static constexpr int GROUP = 1;
  static constexpr int VECTORS = 4;
  static constexpr int64_t COLUMNS = VECTORS * Vec::WIDTH;

  static void pack(const float* h, int64_t n, H* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = h[i];
  }

  static void fill(const E* const* w, int64_t i, int64_t, int64_t column, int64_t width, E* to) {
    const E* from = w[i] + column;
    if (width == COLUMNS) __builtin_memcpy(to, from, COLUMNS * sizeof(E));
    else
      for (int64_t c = 0; c < COLUMNS; ++c) to[c] = c < width ? from[c] : E{};
  }

  template <int T>
  static void from_panel(const E* panel, int64_t n, const H* h, float* sums, const Later& later) {
    tile<T>(
        [&](int64_t i, int v) {
          if (v == 0) later.prefetch_at(i, 1);
          return widen(panel + i * COLUMNS + v * Vec::WIDTH);
        },
        n, h, sums);
  }

  template <int T>
  static void from_rows(const E* const* w, const E* const* ahead, int64_t n, int64_t column, int64_t width, const H* h, float* sums) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t b = 0; b < int64_t(COLUMNS * sizeof(E)); b += LINE) prefetch(reinterpret_cast<const char*>(ahead[i]) + b);
    if (width == COLUMNS)
      tile<T>([&](int64_t i, int v) { return widen(w[i] + column + v * Vec::WIDTH); }, n, h, sums);
    else
      tile<T>(
          [&](int64_t i, int v) {
            const int64_t left = width - v * Vec::WIDTH;
            return left <= 0 ? Vec::zero() : widen_n(w[i] + column + v * Vec::WIDTH, left < Vec::WIDTH ? left : Vec::WIDTH);
          },
          n, h, sums);
  }

 private:
  template <int T, class Source>
  static void tile(const Source& weights, int64_t n, const H* h, float* sums) {
    Vec acc[T][VECTORS];
    for (int t = 0; t < T; ++t)
      for (int v = 0; v < VECTORS; ++v) acc[t][v] = Vec::load(sums + t * COLUMNS + v * Vec::WIDTH);
    for (int64_t i = 0; i < n; ++i) {
      Vec w[VECTORS];
      for (int v = 0; v < VECTORS; ++v) w[v] = weights(i, v);
      for (int t = 0; t < T; ++t) {
        const Vec value = Vec::set1(h[t * PANEL_ROWS + i]);
        for (int v = 0; v < VECTORS; ++v) acc[t][v] = Vec::fma(w[v], value, acc[t][v]);
      }
    }
    for (int t = 0; t < T; ++t)
      for (int v = 0; v < VECTORS; ++v) acc[t][v].store(sums + t * COLUMNS + v * Vec::WIDTH);
  }
};

template <class A>
void add_panel(int tokens, const typename A::W* panel, int64_t n, const typename A::H* h, float* sums, const Later& later) {
  switch (tokens) {
    case 1: return A::template from_panel<1>(panel, n, h, sums, later);
    case 2: return A::template from_panel<2>(panel, n, h, sums, later);
    case 3: if constexpr (MAX_TOKENS >= 3) return A::template from_panel<3>(panel, n, h, sums, later);
    case 4: if constexpr (MAX_TOKENS >= 4) return A::template from_panel<4>(panel, n, h, sums, later);
    case 5: if constexpr (MAX_TOKENS >= 5) return A::template from_panel<5>(panel, n, h, sums, later);
    case 6: if constexpr (MAX_TOKENS >= 6) return A::template from_panel<6>(panel, n, h, sums, later);
  }
}

template <class A>
void add_rows(int tokens, const typename A::W* const* w, const typename A::W* const* ahead, int64_t n, int64_t column, int64_t width,
              const typename A::H* h, float* sums) {
  switch (tokens) {
    case 1: return A::template from_rows<1>(w, ahead, n, column, width, h, sums);
    case 2: return A::template from_rows<2>(w, ahead, n, column, width, h, sums);
    case 3: if constexpr (MAX_TOKENS >= 3) return A::template from_rows<3>(w, ahead, n, column, width, h, sums);
    case 4: if constexpr (MAX_TOKENS >= 4) return A::template from_rows<4>(w, ahead, n, column, width, h, sums);
    case 5: if constexpr (MAX_TOKENS >= 5) return A::template from_rows<5>(w, ahead, n, column, width, h, sums);
    case 6: if constexpr (MAX_TOKENS >= 6) return A::template from_rows<6>(w, ahead, n, column, width, h, sums);
  }
}

// In `scratch`: sums [tiles][tokens][COLUMNS], packed h [tokens][PANEL_ROWS], panels [tiles][PANEL_ROWS][COLUMNS].
template <class A>
void accumulate_rows(const Rows& rows, int64_t begin, int64_t end, const float* h, int64_t ldh, const int32_t* places, int64_t tokens, int64_t column_begin,
                     int64_t column_end, float* out, int64_t ldo, char* scratch) {
  using W = typename A::W;
  const int64_t columns = column_end - column_begin, tiles = (columns + A::COLUMNS - 1) / A::COLUMNS;
  float* sums = reinterpret_cast<float*>(scratch);
  auto* packed = reinterpret_cast<typename A::H*>(sums + tiles * tokens * A::COLUMNS);
  W* panels = reinterpret_cast<W*>(packed + tokens * PANEL_ROWS);
  for (int64_t i = 0; i < tiles * tokens * A::COLUMNS; ++i) sums[i] = 0;
  const bool direct = tokens <= MAX_TOKENS;
  const int64_t block = direct ? DIRECT_ROWS : PANEL_ROWS;
  const W *w[PANEL_ROWS], *next[PANEL_ROWS], *ahead[DIRECT_ROWS];
  const auto width = [&](int64_t tile) { return columns - tile * A::COLUMNS < A::COLUMNS ? columns - tile * A::COLUMNS : A::COLUMNS; };
  for (int64_t first = begin; first < end; first += block) {
    const int64_t n = end - first < block ? end - first : block;
    for (int64_t i = 0; i < n; ++i) {
      w[i] = row<W>(rows, first + i);
      next[i] = row<W>(rows, first + n + i < end ? first + n + i : end - 1);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      float values[PANEL_ROWS];
      for (int64_t i = 0; i < n; ++i) values[i] = h[t * ldh + places[first + i]];
      A::pack(values, n, packed + t * PANEL_ROWS);
    }
    if (direct) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t column = column_begin + tile * A::COLUMNS;
        for (int64_t i = 0; i < n; ++i) ahead[i] = next[i] + column;
        add_rows<A>(static_cast<int>(tokens), w, ahead, n, column, width(tile), packed, sums + tile * tokens * A::COLUMNS);
      }
      continue;
    }
    for (int64_t i = 0; i < n; i += A::GROUP)  // along the rows, as memory likes it
      for (int64_t tile = 0; tile < tiles; ++tile)
        A::fill(w, i, n, column_begin + tile * A::COLUMNS, width(tile), panels + (tile * PANEL_ROWS + i) * A::COLUMNS);
    // While panels are multiplied, the next block's rows are prefetched: some in each call.
    const int64_t groups = (tokens + MAX_TOKENS - 1) / MAX_TOKENS, calls = tiles * groups;
    for (int64_t call = 0, tile = 0; tile < tiles; ++tile)
      for (int64_t t = 0; t < tokens; ++call) {
        const int count = share(tokens - t, MAX_TOKENS);
        const int64_t from = n * call / calls, to = n * (call + 1) / calls;
        Later later{nullptr, nullptr, 0, n};
        if (from < to) {
          later.first = reinterpret_cast<const char*>(next[from] + column_begin);
          later.last = reinterpret_cast<const char*>(next[to - 1] + column_begin);
          later.bytes = columns * int64_t(sizeof(W));
        }
        add_panel<A>(count, panels + tile * PANEL_ROWS * A::COLUMNS, n, packed + t * PANEL_ROWS, sums + (tile * tokens + t) * A::COLUMNS, later);
        t += count;
      }
  }
  for (int64_t tile = 0; tile < tiles; ++tile)
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t column = tile * A::COLUMNS, left = column_end - column_begin - column;
      const float* from = sums + (tile * tokens + t) * A::COLUMNS;
      float* to = out + t * ldo + column;
      for (int64_t c = 0; c < (left < A::COLUMNS ? left : A::COLUMNS); ++c) to[c] = from[c];
    }
}

template <class E>
void widen_all(const void* from, float* to, int64_t n) {
  const E* p = static_cast<const E*>(from);
  int64_t i = 0;
  for (; i + Vec::WIDTH <= n; i += Vec::WIDTH) widen(p + i).store(to + i);
  if (i < n) widen_n(p + i, n - i).store_n(to + i, n - i);
}

inline Vec finished(Vec value, const float* bias, bool relu, int64_t n) {
  if (bias) value = Vec::fma(Vec::set1(1), n < Vec::WIDTH ? Vec::load_n(bias, n) : Vec::load(bias), value);
  return relu ? Vec::relu(value) : value;
}

template <class E>
void finish_all(const float* from, const float* bias, bool relu, void* to, int64_t n) {
  E* p = static_cast<E*>(to);
  int64_t i = 0;
  for (; i + Vec::WIDTH <= n; i += Vec::WIDTH) store_as(finished(Vec::load(from + i), bias ? bias + i : bias, relu, Vec::WIDTH), p + i);
  if (i < n) {
    E last[Vec::WIDTH];
    store_as(finished(Vec::load_n(from + i, n - i), bias ? bias + i : bias, relu, n - i), last);
    for (int64_t j = 0; i + j < n; ++j) p[i + j] = last[j];
  }
}

void widen_any(const void* from, Type type, float* to, int64_t n) {
  switch (type) {
    case Type::f32: return widen_all<float>(from, to, n);
    case Type::f16: return widen_all<Half>(from, to, n);
    case Type::bf16: return widen_all<BFloat>(from, to, n);
    case Type::i8: return widen_all<int8_t>(from, to, n);
  }
}

void finish_any(const float* from, const float* bias, bool relu, void* to, Type type, int64_t n) {
  switch (type) {
    case Type::f32: return finish_all<float>(from, bias, relu, to, n);
    case Type::f16: return finish_all<Half>(from, bias, relu, to, n);
    case Type::bf16: return finish_all<BFloat>(from, bias, relu, to, n);
    case Type::i8: return;
  }
}

// Weights of any type times fp32 inputs.
template <class E>
struct WidenDot {
  using W = E;
  using X = float;
  using WVec = Vec;
  static constexpr int64_t STEP = Vec::WIDTH;
  static Vec load_w(const E* p) { return widen(p); }
  static Vec load_w_n(const E* p, int64_t n) { return widen_n(p, n); }
  static Vec load_x(const float* p) { return Vec::load(p); }
  static Vec load_x_n(const float* p, int64_t n) { return Vec::load_n(p, n); }
  static Vec mad(Vec acc, Vec w, Vec x) { return Vec::fma(w, x, acc); }
};

inline Type input_widened(Type, Type) { return Type::f32; }

void dot_widened(const Rows& rows, int64_t begin, int64_t end, const void* x, Type, int64_t ldx, int64_t tokens, const Segment* segments,
                 int64_t num_segments, float* out, int64_t ldo) {
  switch (rows.type) {
    case Type::f32: return dot_rows<WidenDot<float>>(rows, begin, end, x, ldx, tokens, segments, num_segments, out, ldo);
    case Type::f16: return dot_rows<WidenDot<Half>>(rows, begin, end, x, ldx, tokens, segments, num_segments, out, ldo);
    case Type::bf16: return dot_rows<WidenDot<BFloat>>(rows, begin, end, x, ldx, tokens, segments, num_segments, out, ldo);
    case Type::i8: return dot_rows<WidenDot<int8_t>>(rows, begin, end, x, ldx, tokens, segments, num_segments, out, ldo);
  }
}

void accumulate_widened(const Rows& rows, int64_t begin, int64_t end, const float* h, int64_t ldh, const int32_t* places, int64_t tokens,
                        int64_t column_begin, int64_t column_end, float* out, int64_t ldo, char* scratch) {
  switch (rows.type) {
    case Type::f32: return accumulate_rows<Accumulate<float>>(rows, begin, end, h, ldh, places, tokens, column_begin, column_end, out, ldo, scratch);
    case Type::f16: return accumulate_rows<Accumulate<Half>>(rows, begin, end, h, ldh, places, tokens, column_begin, column_end, out, ldo, scratch);
    case Type::bf16: return accumulate_rows<Accumulate<BFloat>>(rows, begin, end, h, ldh, places, tokens, column_begin, column_end, out, ldo, scratch);
    case Type::i8: return;
  }
}
