// Weights of type u4, turned into floats piece by piece: for instruction sets that cannot multiply them as
// they are, and what all of them need of their scales. Included after accumulate.h.

inline int64_t bytes_of(int64_t columns) { return columns / 2; }

// n <= WEIGHT_GROUP scales, of a row that holds them, from the at-th on.
inline void widen_scales(const Scales& scales, int64_t row, int64_t at, int64_t n, float* to) {
  const auto run = [&](auto value) {
    const auto* from = static_cast<const decltype(value)*>(scales.data) + row * scales.stride + at;
    for (int64_t i = 0; i < n; i += Vec::WIDTH)
      widen_n(from + i, min(Vec::WIDTH, n - i)).store_n(to + i, min(Vec::WIDTH, n - i));
  };
  switch (scales.type) {
    case Type::f16: return run(Half());
    case Type::bf16: return run(BFloat());
    default: return run(float());
  }
}

inline void prefetch_scales(const Rows& rows, int64_t i, int64_t at, int64_t n) {
  const int64_t size = rows.scales.type == Type::f32 ? 4 : 2;
  const char* from = static_cast<const char*>(rows.scales.data) +
                     (number(rows, i) / rows.scales.rows * rows.scales.stride + at) * size;
  for (int64_t c = 0; c < n * size; c += LINE) prefetch(from + c);
}

// PIECE weights, without scales.
inline void widen_piece(const uint8_t* from, float* to) {
  for (int64_t j = 0; j < PIECE / 2; ++j) {
    to[j] = static_cast<float>((from[j] & 15) - 8);
    to[j + PIECE / 2] = static_cast<float>((from[j] >> 4) - 8);
  }
}

// A piece of a row, from `column` on, with its scales.
inline void widen_scaled(const Rows& rows, int64_t i, int64_t column, float* to) {
  float scales[PIECE];
  widen_piece(row<uint8_t>(rows, i) + bytes_of(column), to);
  const int64_t at = number(rows, i);
  if (rows.scales.rows == 1) {
    widen_scales(rows.scales, at, column / WEIGHT_GROUP, 1, scales);
    for (int64_t c = 0; c < PIECE; ++c) to[c] *= scales[0];
    return;
  }
  widen_scales(rows.scales, at / rows.scales.rows, column, PIECE, scales);
  for (int64_t c = 0; c < PIECE; ++c) to[c] *= scales[c];
}

// As `dot` and `accumulate`, with fp32 inputs.
void dot_nibbles(const Rows& rows, int64_t begin, int64_t end, const Values& x, int64_t tokens,
                 int64_t columns, float* out, int64_t ldo) {
  const auto* inputs = static_cast<const float*>(x.data);
  float weights[PIECE];
  for (int64_t i = begin; i < end; ++i)
    for (int64_t column = 0; column < columns; column += PIECE) {
      widen_scaled(rows, i, column, weights);
      for (int64_t t = 0; t < tokens; ++t) {
        Vec sum = Vec::zero();
        for (int64_t c = 0; c < PIECE; c += Vec::WIDTH)
          sum = Vec::fma(Vec::load(weights + c), Vec::load(inputs + t * x.stride + column + c), sum);
        float& to = out[t * ldo + i - begin];
        to = (column > 0 ? to : 0) + Vec::sum(sum);
      }
    }
}

void accumulate_nibbles(const Rows& rows, int64_t begin, int64_t end, const Values& h, const int32_t* places,
                        int64_t tokens, int64_t column_begin, int64_t column_end, float* out, int64_t ldo,
                        bool add) {
  const auto* values = static_cast<const float*>(h.data);
  const int64_t columns = column_end - column_begin;
  for (int64_t t = 0; t < tokens && !add; ++t)
    for (int64_t c = 0; c < columns; ++c) out[t * ldo + c] = 0;
  float weights[PIECE];
  for (int64_t i = begin; i < end; ++i)
    for (int64_t column = 0; column < columns; column += PIECE) {
      widen_scaled(rows, i, column_begin + column, weights);
      for (int64_t t = 0; t < tokens; ++t) {
        const Vec value = Vec::set1(values[t * h.stride + places[i]]);
        float* to = out + t * ldo + column;
        for (int64_t c = 0; c < PIECE; c += Vec::WIDTH)
          Vec::fma(Vec::load(weights + c), value, Vec::load(to + c)).store(to + c);
      }
    }
}
