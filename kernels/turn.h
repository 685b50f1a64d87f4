// Tokens and features change places: L x L numbers are turned in registers. To read features through
// a map, tokens are turned, whole lines are picked, and those are turned back: several times as fast
// as a gather of single numbers.
namespace padst {

// Transpose L x L numbers: the quarters, then the quarters of those.
template <int L> struct Order {
  typedef int32_t type __attribute__((vector_size(4 * L)));
};
template <int L, int HALF> struct Turn {
  static PADST_INLINE void turn(vec<L> (&rows)[L]) {
    typename Order<L>::type low, high;
#pragma GCC unroll 16
    for (int j = 0; j < L; j++) {
      low[j] = j & HALF ? L + j - HALF : j;
      high[j] = j & HALF ? L + j : j + HALF;
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; i++)
      if (!(i & HALF)) {
        const vec<L> a = rows[i], b = rows[i + HALF];
        rows[i] = __builtin_shuffle(a, b, low);
        rows[i + HALF] = __builtin_shuffle(a, b, high);
      }
    Turn<L, HALF / 2>::turn(rows);
  }
};
template <int L> struct Turn<L, 0> {
  static PADST_INLINE void turn(vec<L> (&)[L]) {}
};

// lines[k * across + t] = x[t][k] for L tokens; zeros for those that are not there.
template <int L>
inline void to_lines(const float* x, int64_t row, int64_t tokens, int64_t features, int64_t across,
                     float* lines) {
  int64_t k = 0;
  if (tokens >= L)
    for (; k + L <= features; k += L) {
      vec<L> rows[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) rows[i] = load<L>(x + i * row + k);
      Turn<L, L / 2>::turn(rows);
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) store<L>(lines + (k + i) * across, rows[i]);
    }
  float* line = lines + k * across;
  for (const float* from = x + k; from < x + features; from++, line += across)
    for (int i = 0; i < L; i++) line[i] = i < tokens ? from[i * row] : 0.0f;
}

// out[t][k] = lines[map[k] * across + t] for L tokens; without a map, of line k.
template <int L>
inline void from_lines(const float* lines, int64_t across, const int64_t* map, int64_t count,
                       float* out, int64_t row) {
  int64_t k = 0;
  for (; k + L <= count; k += L) {
    vec<L> rows[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) rows[i] = load<L>(lines + (map ? map[k + i] : k + i) * across);
    Turn<L, L / 2>::turn(rows);
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) store<L>(out + i * row + k, rows[i]);
  }
  for (int rest = (int)(count % L); rest > 0; rest--, k++)
    for (int i = 0; i < L; i++) out[i * row + k] = lines[(map ? map[k] : k) * across + i];
}

// out[t][k] = x[t][map[k]] for at most L tokens, of which `out` has room for L.
// `lines` has room for L of each of the features.
template <int L>
inline void through(const float* x, int64_t row, int64_t tokens, int64_t features, const int64_t* map,
                    int64_t count, float* lines, float* out, int64_t to) {
  if (2 * tokens > L) {
    to_lines<L>(x, row, tokens, features, L, lines);
    from_lines<L>(lines, L, map, count, out, to);
  } else {
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t k = 0; k < count; k++) out[t * to + k] = x[t * row + map[k]];
  }
}

// The same for numbers of 16 bits, two in the place of a float: a new pair has halves of two others.
// `features` and `count` are pairs, the map has two numbers for each.
template <int L>
inline void pairs_through(const float* x, int64_t row, int64_t tokens, int64_t features,
                          const int64_t* map, int64_t count, float* lines, float* out, int64_t to) {
  if (2 * tokens > L) {
    to_lines<L>(x, row, tokens, features, L, lines);
    const auto pick = [&](int64_t k) {
      const int64_t low = map[2 * k], high = map[2 * k + 1];
      const auto a = (words<L>)load<L>(lines + low / 2 * L);
      const auto b = (words<L>)load<L>(lines + high / 2 * L);
      return (vec<L>)((a >> (uint32_t)(low % 2 * 16) & 0xffffu) | b >> (uint32_t)(high % 2 * 16) << 16);
    };
    int64_t k = 0;
    for (; k + L <= count; k += L) {
      vec<L> rows[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) rows[i] = pick(k + i);
      Turn<L, L / 2>::turn(rows);
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) store<L>(out + i * to + k, rows[i]);
    }
    for (; k < count; k++) {
      const vec<L> picked = pick(k);
      for (int i = 0; i < L; i++) out[i * to + k] = picked[i];
    }
  } else {
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t k = 0; k < 2 * count; k++)
        std::memcpy((char*)(out + t * to) + 2 * k, (const char*)(x + t * row) + 2 * map[k], 2);
  }
}

}  // namespace padst
