// Blocks: the sums of a few tokens and a row of blocks stay in registers.
namespace padst {

// How many tokens have room for their sums of n outputs beside one row of weights.
constexpr int tokens_of(int n) {
  const int vectors = n / lanes(n), most = (REGISTERS - vectors - 1) / vectors;
  return most > 16 ? 16 : most < 1 ? 1 : most;
}

// out[r][n] = sum_jk x[r * row + (columns[j] * C + k) * step] * w[j * C * ldw + k * ldw + n]
// for R tokens and N outputs. A C of 0 takes the length of the sum from `length`.
template <int R, int N, int C, typename I>
PADST_INLINE void sums_of(const float* __restrict x, int64_t row, int64_t step,
                          const I* __restrict columns, const float* __restrict w, int64_t ldw,
                          int64_t kept, int64_t length, float* __restrict out) {
  constexpr int L = lanes(N), V = N / L;
  // Few sums would each wait for their own last addition: several of each, added in the end.
  constexpr int U = R * V >= 8 || C == 0 ? 1 : C % (8 / (R * V)) == 0 ? 8 / (R * V) : 1;
  const int64_t inputs = C == 0 ? length : C;
  vec<L> sums[U][R][V];
#pragma GCC unroll 8
  for (int u = 0; u < U; u++)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sums[u][r][v] = vec<L>{};
  for (int64_t j = 0; j < kept; j++) {
    const float* xs = columns ? x + (int64_t)columns[j] * inputs * step : x;
    const float* ws = w + j * inputs * ldw;
    for (int64_t k = 0; k < inputs; k += U) {
#pragma GCC unroll 8
      for (int u = 0; u < U; u++) {
        vec<L> weights[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) weights[v] = load<L>(ws + (k + u) * ldw + v * L);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
          const vec<L> value = all<L>(xs[r * row + (k + u) * step]);
#pragma GCC unroll 8
          for (int v = 0; v < V; v++) sums[u][r][v] = fma(value, weights[v], sums[u][r][v]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      vec<L> sum = sums[0][r][v];
#pragma GCC unroll 8
      for (int u = 1; u < U; u++) sum += sums[u][r][v];
      store<L>(out + r * N + v * L, sum);
    }
}

// Do as many rows of x as have room, of those that are left; return how many.
template <int N, int C, typename I>
PADST_INLINE int tile_of(const float* x, int64_t row, int64_t step, const I* columns,
                         const float* w, int64_t ldw, int64_t kept, int64_t length, float* out,
                         int64_t left) {
  constexpr int R = tokens_of(N), H = R > 2 ? R / 2 : 1, Q = H > 2 ? H / 2 : 1;
  if (left >= R) return sums_of<R, N, C>(x, row, step, columns, w, ldw, kept, length, out), R;
  if (left >= H) return sums_of<H, N, C>(x, row, step, columns, w, ldw, kept, length, out), H;
  if (left >= Q) return sums_of<Q, N, C>(x, row, step, columns, w, ldw, kept, length, out), Q;
  return sums_of<1, N, C>(x, row, step, columns, w, ldw, kept, length, out), 1;
}

}  // namespace padst
