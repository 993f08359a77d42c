// Rows of a transposed weight, each times a value of every token, added up: written once for every
// instruction set. Included after tiles.h, which says what it needs.

// Rows that are needed later, to be prefetched piece by piece along the rows, as memory likes it; of BYTES a
// step, behind those of so many steps.
template <int64_t BYTES>
struct Ahead {
  static constexpr int64_t PIECE = BYTES < LINE ? BYTES : LINE;
  const char* const* rows;
  int64_t n, bytes;  // of each row
  int64_t row, at;

  Ahead(const char* const* rows, int64_t n, int64_t bytes, int64_t steps) : rows(rows), n(n), bytes(bytes) {
    const int64_t pieces = (bytes + PIECE - 1) / PIECE, done = steps * (BYTES / PIECE);
    row = done / pieces;
    at = done % pieces * PIECE;
  }

  void step() {
    for (int64_t b = 0; b < BYTES && row < n; b += PIECE) {
      prefetch(rows[row] + at);
      at += PIECE;
      if (at >= bytes) {
        at = 0;
        ++row;
      }
    }
  }
};

// What accumulate adds up: rows of type E, widened. An instruction set may have another one:
//   GROUP          rows that are multiplied together
//   COLUMNS        columns of a tile, in VECTORS vectors of sums
//   bytes          that columns of a row take
//   load           GROUP rows, COLUMNS columns from `column` on (`width` of them, then zeros)
//   mad            acc + rows * values of h; Acc, a vector of sums, in memory of the type Sum
//   GROUPED        whether h has scales for groups of rows: sums are made fp32 after each, and begin at
//                  start(h, t) in the next
template <class E>
struct Accumulate {
  using W = E;
  using H = float;
  using WVec = Vec;
  using HVec = Vec;
  using Acc = Vec;
  using Sum = float;
  static constexpr int GROUP = 1, VECTORS = 2;
  static constexpr bool GROUPED = false;
  static constexpr int64_t COLUMNS = VECTORS * Vec::WIDTH;

  static constexpr int64_t bytes(int64_t columns) { return columns * int64_t(sizeof(E)); }
  static void load(const E* const* w, int64_t column, int64_t width, WVec* to) {
    for (int v = 0; v < VECTORS; ++v) {
      const E* from = w[0] + column + v * Vec::WIDTH;
      const int64_t left = width - v * Vec::WIDTH;
      to[v] = left >= Vec::WIDTH ? widen(from) : left > 0 ? widen_n(from, left) : Vec::zero();
    }
  }
  static HVec value(const H* h) { return Vec::set1(*h); }
  static Vec mad(Vec acc, WVec w, HVec value) { return Vec::fma(w, value, acc); }
};

// Where a tile of S times COLUMNS columns has its rows from: from where they lie, `width` columns of them
// where they are not WHOLE, which may be kept; or as they were kept.
template <class A, int S, bool WHOLE, bool KEEP>
struct Lying {
  const typename A::W* const* rows;
  int64_t column, width;
  typename A::WVec* kept;
  Ahead<A::GROUP * A::bytes(S* A::COLUMNS)> ahead;

  void step() { ahead.step(); }
  void load(int64_t i, int s, typename A::WVec* to) const {
    A::load(rows + i, column + s * A::COLUMNS, WHOLE ? A::COLUMNS : width, to);
    if constexpr (KEEP)
      for (int v = 0; v < A::VECTORS; ++v) kept[i / A::GROUP * A::VECTORS + v] = to[v];
  }
};

template <class A>
struct Kept {
  const typename A::WVec* kept;

  void step() {}
  void load(int64_t i, int, typename A::WVec* to) const {
    for (int v = 0; v < A::VECTORS; ++v) to[v] = kept[i / A::GROUP * A::VECTORS + v];
  }
};

// Adds n rows times h [T][ldh] to the sums [S][lds][COLUMNS], of T tokens. A function of its own, with all
// that it calls: a call left within would spill every sum at each group of rows (GCC 12 chose to, at one
// token and at 5 to 9: three times as slow).
template <class A, int T, int S, class Source>
[[gnu::flatten, gnu::noinline]] void accumulate_tile(Source source, int64_t n, const typename A::H* h,
                                                     int64_t ldh, const Values& of, typename A::Sum* sums,
                                                     int64_t lds) {
  typename A::Acc acc[S][T][A::VECTORS];
#pragma GCC unroll 16
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
      for (int v = 0; v < A::VECTORS; ++v)
        if constexpr (A::GROUPED)
          acc[s][t][v] = A::start(of, t);
        else
          acc[s][t][v] = A::Acc::load(sums + (s * lds + t) * A::COLUMNS + v * Vec::WIDTH);
#pragma GCC unroll 2
  for (int64_t i = 0; i < n; i += A::GROUP) {
    source.step();
#pragma GCC unroll 16
    for (int s = 0; s < S; ++s) {
      typename A::WVec w[A::VECTORS];
      source.load(i, s, w);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        const auto value = A::value(h + t * ldh + i);
#pragma GCC unroll 16
        for (int v = 0; v < A::VECTORS; ++v) acc[s][t][v] = A::mad(acc[s][t][v], w[v], value);
      }
    }
  }
#pragma GCC unroll 16
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
      for (int v = 0; v < A::VECTORS; ++v) {
        auto* to = sums + (s * lds + t) * A::COLUMNS + v * Vec::WIDTH;
        if constexpr (A::GROUPED)
          Vec::fma(acc[s][t][v].floats(), Vec::set1(of.scales[t * of.groups]), Vec::load(to)).store(to);
        else
          acc[s][t][v].store(to);
      }
}

// Tokens whose sums of a tile fit the registers.
template <class A>
constexpr int MOST_TOKENS = 2 * ACCUMULATE_TOKENS / A::VECTORS;

template <class A, int S, int T = MOST_TOKENS<A> / S, class Source>
void accumulate_tokens(int64_t tokens, const Source& source, int64_t n, const typename A::H* h, int64_t ldh,
                       const Values& of, typename A::Sum* sums, int64_t lds) {
  if constexpr (T > 1)
    if (tokens < T) return accumulate_tokens<A, S, T - 1>(tokens, source, n, h, ldh, of, sums, lds);
  accumulate_tile<A, T, S>(source, n, h, ldh, of, sums, lds);
}

// A block of rows, and the one after it to prefetch.
template <class A>
struct Block {
  const typename A::W* w[MANY_ROWS + A::GROUP - 1];  // the last one again, up to whole groups
  const char* next[MANY_ROWS];
  int64_t n, later, column, bytes;  // first column; of a row
  typename A::WVec* kept;

  Block(const Rows& rows, int64_t first, int64_t n, int64_t later, int64_t column, int64_t columns,
        typename A::WVec* kept)
      : n(n), later(later), column(column), bytes(A::bytes(columns)), kept(kept) {
    for (int64_t i = 0; i < n; ++i) w[i] = row<typename A::W>(rows, first + i);
    for (int i = 0; i < A::GROUP - 1; ++i) w[n + i] = w[n - 1];
    for (int64_t i = 0; i < later; ++i)
      next[i] = reinterpret_cast<const char*>(row<typename A::W>(rows, first + n + i)) + A::bytes(column);
  }

  // Of columns from the at-th on.
  template <int S, bool WHOLE, bool KEEP>
  Lying<A, S, WHOLE, KEEP> lying(int64_t at, int64_t width) const {
    const int64_t steps = (n + A::GROUP - 1) / A::GROUP;
    return {w, column + at, width, kept, {next, later, bytes, at / A::COLUMNS / S * steps}};
  }
};

// A few tokens: S tiles at once, as long as their sums fit the registers, then one by one.
template <class A, int S>
int64_t few_tokens(const Block<A>& block, int64_t at, int64_t columns, int64_t tokens, const typename A::H* h,
                   int64_t ldh, const Values& of, typename A::Sum* sums) {
  if (tokens * S > MOST_TOKENS<A>) return at;
  for (; at + S * A::COLUMNS <= columns; at += S * A::COLUMNS)
    accumulate_tokens<A, S>(tokens, block.template lying<S, true, false>(at, 0), block.n, h, ldh, of,
                            sums + at * tokens, tokens);
  return at;
}

// The first tile of tokens keeps the rows as it multiplied them.
template <class A, bool WHOLE>
void many_tokens(const Block<A>& block, int64_t at, int64_t width, int64_t tokens, const typename A::H* h,
                 int64_t ldh, Values of, typename A::Sum* sums) {
  for (int64_t t = 0; t < tokens;) {
    constexpr int MOST = 2 * MANY_TOKENS / A::VECTORS;
    const int64_t count = share(tokens - t, MOST);
    auto* to = sums + at * tokens + t * A::COLUMNS;
    if (t == 0)
      accumulate_tokens<A, 1, MOST>(count, block.template lying<1, WHOLE, true>(at, width), block.n, h, ldh,
                                    of, to, tokens);
    else
      accumulate_tokens<A, 1, MOST>(count, Kept<A>{block.kept}, block.n, h + t * ldh, ldh, of, to, tokens);
    t += count;
    if (A::GROUPED) {
      of.scales += count * of.groups;
      of.offsets += count * of.groups;
    }
  }
}

// Sums [tiles][tokens][COLUMNS] as [tokens][ldo], a token's times its scale if there are such.
template <class A>
void unroll_tiles(const typename A::Sum* sums, int64_t tokens, int64_t columns, const float* scales,
                  float* out, int64_t ldo, bool add) {
  for (int64_t column = 0; column < columns; column += A::COLUMNS)
    for (int64_t t = 0; t < tokens; ++t) {
      const auto* from = sums + column * tokens + t * A::COLUMNS;
      const float scale = scales ? scales[t] : 1;
      float* to = out + t * ldo + column;
      for (int64_t c = 0; c < min(columns - column, A::COLUMNS); ++c)
        to[c] = (add ? to[c] : 0) + static_cast<float>(from[c]) * scale;
    }
}

// Block by block of rows, tile by tile of columns. A few tokens read the rows where they lie; more read them
// several times. While a block is worked through, the next is prefetched. In `scratch`: sums
// [tiles][tokens][COLUMNS], kept rows [MANY_ROWS / GROUP][VECTORS], h of rows that are not neighbours.
template <class A>
void accumulate_rows(const Rows& rows, int64_t begin, int64_t end, const Values& h, const int32_t* places,
                     int64_t tokens, int64_t column_begin, int64_t column_end, float* out, int64_t ldo,
                     char* scratch, bool add) {
  using H = typename A::H;
  using Sum = typename A::Sum;
  using WVec = typename A::WVec;
  const int64_t columns = column_end - column_begin, tiles = (columns + A::COLUMNS - 1) / A::COLUMNS;
  auto* sums = reinterpret_cast<Sum*>(scratch);
  auto* kept = reinterpret_cast<WVec*>(sums + tiles * tokens * A::COLUMNS);
  auto* gathered = reinterpret_cast<H*>(kept + MANY_ROWS / A::GROUP * A::VECTORS);
  for (int64_t i = 0; i < tiles * tokens * A::COLUMNS; ++i) sums[i] = 0;
  const bool few = tokens <= ACCUMULATE_TOKENS;
  const int64_t most = A::GROUPED ? ROW_GROUP : few ? FEW_ROWS : MANY_ROWS;
  for (int64_t first = begin; first < end; first += most) {
    const int64_t n = min(most, end - first);
    const Block<A> block(rows, first, n, min(most, end - first - n), column_begin, columns, kept);
    const H* values = static_cast<const H*>(h.data) + places[first];
    int64_t ldv = h.stride;
    if (n % A::GROUP || places[first + n - 1] - places[first] != n - 1) {
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t i = 0; i < n; ++i)
          gathered[t * MANY_ROWS + i] = static_cast<const H*>(h.data)[t * h.stride + places[first + i]];
        for (int64_t i = n; i % A::GROUP; ++i) gathered[t * MANY_ROWS + i] = H{};
      }
      values = gathered;
      ldv = MANY_ROWS;
    }
    Values of = h;  // of i8: from this group on
    if (A::GROUPED) {
      of.scales += first / ROW_GROUP;
      of.offsets += first / ROW_GROUP;
    }
    int64_t at = 0;
    if (few) {
      at = few_tokens<A, 8>(block, at, columns, tokens, values, ldv, of, sums);
      at = few_tokens<A, 4>(block, at, columns, tokens, values, ldv, of, sums);
      at = few_tokens<A, 2>(block, at, columns, tokens, values, ldv, of, sums);
      at = few_tokens<A, 1>(block, at, columns, tokens, values, ldv, of, sums);
      if (at < columns)
        accumulate_tokens<A, 1>(tokens, block.template lying<1, false, false>(at, columns - at), n, values,
                                ldv, of, sums + at * tokens, tokens);
      continue;
    }
    for (; at + A::COLUMNS <= columns; at += A::COLUMNS)
      many_tokens<A, true>(block, at, 0, tokens, values, ldv, of, sums);
    if (at < columns) many_tokens<A, false>(block, at, columns - at, tokens, values, ldv, of, sums);
  }
  unroll_tiles<A>(sums, tokens, columns, h.scales && !A::GROUPED ? h.scales : nullptr, out, ldo, add);
}

// nibbles.h
void accumulate_nibbles(const Rows& rows, int64_t begin, int64_t end, const Values& h, const int32_t* places,
                        int64_t tokens, int64_t column_begin, int64_t column_end, float* out, int64_t ldo,
                        bool add);

void accumulate_widened(const Rows& rows, int64_t begin, int64_t end, const Values& h, const int32_t* places,
                        int64_t tokens, int64_t column_begin, int64_t column_end, float* out, int64_t ldo,
                        char* scratch, bool add) {
  const auto run = [&](auto weight) {
    accumulate_rows<Accumulate<decltype(weight)>>(rows, begin, end, h, places, tokens, column_begin,
                                                  column_end, out, ldo, scratch, add);
  };
  switch (rows.type) {
    case Type::f32: return run(float());
    case Type::f16: return run(Half());
    case Type::bf16: return run(BFloat());
    case Type::i8: return run(int8_t());
    case Type::u4:
      return accumulate_nibbles(rows, begin, end, h, places, tokens, column_begin, column_end, out, ldo, add);
    case Type::i16:
    case Type::u8: return;
  }
}
