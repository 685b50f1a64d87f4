// Diagonals: inputs, weights and outputs of a diagonal lie side by side, so nothing is gathered.
namespace padst {

// out[r][n] = sum over crossings j of w[j * N + n] * x[r * ROW + at[j] + n].
template <int R, int N, int64_t ROW>
PADST_INLINE void crossed(const float* x, const float* w, const int32_t* at, int64_t count,
                          float* out) {
  constexpr int L = lanes(N), V = N / L;
  vec<L> sums[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sums[r][v] = vec<L>{};
  for (int64_t j = 0; j < count; j++) {
    const float *ws = w + j * N, *xs = x + at[j];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      const vec<L> weights = load<L>(ws + v * L);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) sums[r][v] = fma(weights, load<L>(xs + r * ROW + v * L), sums[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store<L>(out + r * N + v * L, sums[r][v]);
}

// Every sum along diagonals, N outputs at once. Where a diagonal crosses a tile of outputs, N weights
// meet inputs at[j] and on; the crossings of tile u are starts[u] to starts[u + 1], or as many for any
// tile without. Eight tokens' inputs stay in the L1 cache, the crossings stream.
template <int N, int64_t INPUTS, bool DOWN, Read READ, bool MOVED, typename Store>
PADST_INLINE void diagonal_sums(const float* x, int64_t row, int64_t tokens, int64_t features,
                                const int64_t* in_map, const float* w, const int32_t* at,
                                const int32_t* starts, int64_t crossings, int64_t outputs,
                                const int64_t* out_map, int threads, const Store& store) {
  static_assert(READ != Read::HERE, "something stands around every row");
  constexpr int R = tokens_of(N) < 8 ? tokens_of(N) : 8, H = R > 2 ? R / 2 : 1;
  constexpr Around AROUND = DOWN ? Around{N, N, false} : Around{0, N, true};
  constexpr int64_t ROW = AROUND.before + INPUTS + AROUND.after;
  const auto tile = [&](const float* from, int64_t, int64_t step, int64_t left, float* out)
      __attribute__((always_inline)) {
    const int64_t alike = crossings / (outputs / N), first = starts ? starts[step] : step * alike;
    const int64_t count = starts ? starts[step + 1] - first : alike;
    const float* const weights = w + first * N;
    const int32_t* const here = at + first;
    if (left >= R) return crossed<R, N, ROW>(from, weights, here, count, out), R;
    if (left >= H) return crossed<H, N, ROW>(from, weights, here, count, out), H;
    return crossed<1, N, ROW>(from, weights, here, count, out), 1;
  };
  all_sums<N, 8, READ, MOVED>(x, row, tokens, features, INPUTS, in_map, AROUND, outputs / N, out_map,
                              threads, tile, store);
}

}  // namespace padst
