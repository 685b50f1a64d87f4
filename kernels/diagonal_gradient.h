// The gradient of diagonals: both sides are read along them, adjacent diagonals together, because
// these read the same lines of the cache.
namespace padst {

// sums[d][n] += sum over tokens of fixed[n] and moving[at[d] + n], for D diagonals.
template <int D, int N>
PADST_INLINE void along(const float* fixed, int64_t fixed_row, const float* moving,
                        int64_t moving_row, int64_t tokens, const int64_t* at, float* out) {
  constexpr int L = lanes(N), V = N / L;
  vec<L> sums[D][V];
  const float* from[D];  // each steps by itself, or GCC keeps one address for every load
#pragma GCC unroll 8
  for (int d = 0; d < D; d++) {
    from[d] = moving + at[d];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sums[d][v] = load<L>(out + d * N + v * L);
  }
  for (int64_t t = 0; t < tokens; t++, fixed += fixed_row) {
    vec<L> values[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) values[v] = load<L>(fixed + v * L);
#pragma GCC unroll 8
    for (int d = 0; d < D; d++) {
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sums[d][v] = fma(values[v], load<L>(from[d] + v * L), sums[d][v]);
      from[d] += moving_row;
    }
  }
#pragma GCC unroll 8
  for (int d = 0; d < D; d++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store<L>(out + d * N + v * L, sums[d][v]);
}

// The gradient of every diagonal: weight c of diagonal d is a sum over tokens of fixed[c], c below
// `length`, and moving[(c + offsets[d]) % around]. Both are copied, a few tokens at a time: `moving`
// goes on behind its end, and no rows lie pages apart. N weights are stored at once.
template <int N, typename Store>
PADST_INLINE void diagonal_gradient(const float* fixed, int64_t fixed_row, int64_t length,
                                    const float* moving, int64_t moving_row, int64_t around,
                                    int64_t tokens, const int32_t* offsets, int64_t count,
                                    int threads, const Store& store) {
  constexpr int W = N <= 4 * LANES ? N : lanes(N, 4 * LANES), V = W / lanes(W);
  constexpr int ROOM = (REGISTERS - V - 2) / V, D = ROOM > 8 ? 8 : ROOM < 1 ? 1 : ROOM;
  constexpr int H = D > 2 ? D / 2 : 1;
  constexpr int64_t CHUNK = 16;
  std::vector<int32_t> order(count);
  for (int64_t d = 0; d < count; d++) order[d] = (int32_t)d;
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return offsets[a] < offsets[b]; });
  const int64_t tiles = length / W, groups = (count + D - 1) / D;
  const int64_t narrow = length + 16, wide = (around + W + 15) / 16 * 16;
  std::vector<float> sums(count * length);  // tiles, diagonals in order, W
  const Aligned memory(CHUNK * (narrow + wide));
  float* const copied = memory.begin;
  float* const going = copied + CHUNK * wide;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    for (int64_t first = 0; first < tokens; first += CHUNK) {
      const int64_t here = std::min(CHUNK, tokens - first);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < here; t++) {
        float* const to = copied + t * wide;
        std::memcpy(to, moving + (first + t) * moving_row, sizeof(float) * around);
        for (int64_t k = 0; k < W; k++) to[around + k] = to[k % around];
        std::memcpy(going + t * narrow, fixed + (first + t) * fixed_row, sizeof(float) * length);
      }
#pragma omp for collapse(2) schedule(static)
      for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t group = 0; group < groups; group++) {
          const int64_t begin = group * D, left = std::min<int64_t>(D, count - begin);
          int64_t at[D];
          for (int64_t d = 0; d < left; d++) at[d] = (offsets[order[begin + d]] + tile * W) % around;
          const float* const from = going + tile * W;
          const auto some = [&](auto number, int64_t d) __attribute__((always_inline)) {
            along<decltype(number)::value, W>(from, narrow, copied, wide, here, at + d,
                                              &sums[(tile * count + begin + d) * W]);
          };
          int64_t d = 0;
          if (left == D) some(std::integral_constant<int, D>(), 0), d = D;
          for (; d + H <= left; d += H) some(std::integral_constant<int, H>(), d);
          for (; d < left; d++) some(std::integral_constant<int, 1>(), d);
        }
    }
#pragma omp for schedule(static)
    for (int64_t d = 0; d < count; d++) {
      alignas(64) float whole[N];
      for (int64_t c = 0; c < length; c += N) {
        for (int64_t w = 0; w < N; w += W)
          std::memcpy(whole + w, &sums[((c + w) / W * count + d) * W], sizeof(float) * W);
        store(order[d], 1, c, whole);
      }
    }
  }
}

}  // namespace padst
