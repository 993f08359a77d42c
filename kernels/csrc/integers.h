// Products of int8 weights with i16 inputs: exact, with sums in int32, so the same on every instruction set.
// Included after tiles.h and the vector type
//   Ints        WIDTH int32 lanes: zero, set1, load, store, add, total; nearest (of a Vec) and floats (as a
//               Vec), narrow (to int16, int8 or uint8, saturated); sum4 and sum (in fp32); mad (adds the
//               products of a lane's pair); Pairs, WIDTH pairs of int16: pairs, pairs_n (the first n
//               elements, then zeros) of int8 or int16, both (a pair in all lanes)
//   interleave  rows a and b of int8 as two vectors of Pairs, columns in order

struct IntDot {
  using W = int8_t;
  using X = int16_t;
  using WVec = Ints::Pairs;
  using Acc = Ints;
  static constexpr int64_t STEP = 2 * Ints::WIDTH;
  static constexpr int TOKENS = MAX_TOKENS < 4 ? MAX_TOKENS : 4;
  static WVec load_w(const int8_t* p) { return Ints::pairs(p); }
  static WVec load_w_n(const int8_t* p, int64_t n) { return Ints::pairs_n(p, n); }
  static WVec load_x(const int16_t* p) { return Ints::pairs(p); }
  static WVec load_x_n(const int16_t* p, int64_t n) { return Ints::pairs_n(p, n); }
  static Ints mad(Ints acc, WVec w, WVec x) { return Ints::mad(acc, w, x); }
};

// Two rows at a time, interleaved.
struct IntAccumulate {
  using W = int8_t;
  using H = int16_t;
  using WVec = Ints::Pairs;
  using HVec = Ints::Pairs;
  using Acc = Ints;
  using Sum = int32_t;
  static constexpr int GROUP = 2, VECTORS = 2;
  static constexpr bool GROUPED = false;
  static constexpr int64_t COLUMNS = VECTORS * Ints::WIDTH;

  static constexpr int64_t bytes(int64_t columns) { return columns * int64_t(sizeof(W)); }
  static void load(const int8_t* const* w, int64_t column, int64_t width, WVec* to) {
    const int8_t *a = w[0] + column, *b = w[1] + column;
    if (width == COLUMNS) return interleave(a, b, to);
    int8_t some_a[COLUMNS] = {}, some_b[COLUMNS] = {};
    for (int64_t c = 0; c < width; ++c) {
      some_a[c] = a[c];
      some_b[c] = b[c];
    }
    interleave(some_a, some_b, to);
  }
  static HVec value(const int16_t* h) { return Ints::both(h); }
  static Ints mad(Ints acc, WVec w, HVec value) { return Ints::mad(acc, w, value); }
};

inline Type input_rounded(Type weights, Type inputs) {
  return weights == Type::i8 && inputs != Type::f32 ? Type::i16 : Type::f32;
}

struct Magnitude {
  float most, sum;  // not finite where a value is not
};

template <class E>
Magnitude magnitude(const E* from, int64_t n) {
  Vec most = Vec::zero(), sum = Vec::zero();
  for (int64_t i = 0; i < n; i += Vec::WIDTH) {
    const Vec value = Vec::abs(n - i < Vec::WIDTH ? widen_n(from + i, n - i) : widen(from + i));
    most = Vec::max(most, value);
    sum = Vec::add(sum, value);
  }
  float lanes[Vec::WIDTH], largest = 0;
  most.store(lanes);
  for (float lane : lanes) largest = lane > largest ? lane : largest;
  return {largest, Vec::sum(sum)};
}

// to = from / scale, to the nearest integer: their sum. What is not finite becomes any integer.
template <class E, class I>
int32_t to_integers(const E* from, float scale, I* to, int64_t n) {
  const Vec inverse = Vec::set1(scale > 0 ? 1 / scale : 0);
  Ints sum = Ints::zero();
  for (int64_t i = 0; i < n; i += Vec::WIDTH) {
    const int64_t left = n - i;
    const Vec value = left < Vec::WIDTH ? widen_n(from + i, left) : widen(from + i);
    const Ints whole = Ints::nearest(Vec::fma(value, inverse, Vec::zero()));
    sum = Ints::add(sum, whole);
    if (left >= Vec::WIDTH) {
      whole.narrow(to + i);
      continue;
    }
    I last[Vec::WIDTH];
    whole.narrow(last);
    for (int64_t j = 0; j < left; ++j) to[i + j] = last[j];
  }
  return Ints::total(sum);
}

inline float known(float scale, float sum) { return sum - sum == 0 ? scale : __builtin_nanf(""); }

// With a scale for each group, whose largest value becomes `most`.
template <class E, class I>
void round_groups(const E* from, int64_t n, int64_t group, float most, int32_t zero, I* to, float* scales,
                  int32_t* offsets) {
  for (int64_t first = 0; first < n; first += group) {
    const int64_t mine = n - first < group ? n - first : group;
    const Magnitude size = magnitude(from + first, mine);
    const float scale = size.most / most;
    *scales++ = known(scale, size.sum);
    // unsigned: of what is not finite the sum is any number, and is not read
    const auto sum = static_cast<uint32_t>(to_integers(from + first, scale, to + first, mine));
    *offsets++ = static_cast<int32_t>(0u - static_cast<uint32_t>(zero) * sum);
  }
}

template <class E>
void round_as(const E* from, int64_t n, Type to_type, int64_t group, int32_t zero, void* to, float* scales,
              int32_t* offsets) {
  if (to_type == Type::i8)
    return round_groups(from, n, group, 127, zero, static_cast<int8_t*>(to), scales, offsets);
  if (to_type == Type::u8)
    return round_groups(from, n, group, 255, zero, static_cast<uint8_t*>(to), scales, offsets);
  // The largest magnitude becomes 32767, or less where a sum of products with 128 could overflow otherwise,
  // half a step of rounding each included, and a part in 2^16 for the rounding of the sum itself.
  const Magnitude size = magnitude(from, n);
  const float room = 2147483647.0f / 128 * 0.99998f - 0.5f * static_cast<float>(n);
  const float by_sum = size.sum / (room > 1 ? room : 1), by_most = size.most / 32767,
              scale = by_sum > by_most ? by_sum : by_most;
  *scales = known(scale, size.sum);
  to_integers(from, scale, static_cast<int16_t*>(to), n);
}

void round_any(const void* from, Type type, int64_t n, Type to_type, int64_t group, int32_t zero, void* to,
               float* scales, int32_t* offsets) {
  const auto run = [&](auto value) {
    round_as(static_cast<const decltype(value)*>(from), n, to_type, group, zero, to, scales, offsets);
  };
  switch (type) {
    case Type::f32: return run(float());
    case Type::f16: return run(Half());
    case Type::bf16: return run(BFloat());
    case Type::i8:
    case Type::i16:
    case Type::u8:
    case Type::u4: return;
  }
}

void dot_rounded(const Rows& rows, int64_t begin, int64_t end, const Values& x, int64_t tokens,
                 const Segment* segments, int64_t num_segments, float* out, int64_t ldo) {
  if (x.type == Type::i16)
    dot_rows<IntDot>(rows, begin, end, x, tokens, segments, num_segments, out, ldo);
  else
    dot_widened(rows, begin, end, x, tokens, segments, num_segments, out, ldo);
}

void accumulate_rounded(const Rows& rows, int64_t begin, int64_t end, const Values& h, const int32_t* places,
                        int64_t tokens, int64_t column_begin, int64_t column_end, float* out, int64_t ldo,
                        char* scratch, bool add) {
  if (h.type == Type::i16)
    accumulate_rows<IntAccumulate>(rows, begin, end, h, places, tokens, column_begin, column_end, out, ldo,
                                   scratch, add);
  else
    accumulate_widened(rows, begin, end, h, places, tokens, column_begin, column_end, out, ldo, scratch, add);
}
