// Weights by feature: every output sums a few inputs. Tokens lie side by side, x^T in tiles, so that
// a feature is one aligned row whatever its place.
namespace padst {

constexpr int ACROSS = 32;  // tokens in a tile: x^T of a thousand features stays in the L2 cache
constexpr int DOWN = 16;    // outputs that are turned back and stored together

// out[k][t] = x[t][k] for at most ACROSS tokens; zeros for the others.
inline void to_tile(const float* x, int64_t row, int64_t tokens, int64_t features, float* out) {
  for (int t = 0; t < ACROSS; t += LANES)
    to_lines<LANES>(x + t * row, row, tokens - t, features, ACROSS, out + t);
}

// out[t][o] = in[o][t], ACROSS tokens of DOWN outputs.
inline void from_tile(const float* in, float* out) {
  for (int t = 0; t < ACROSS; t += LANES)
    from_lines<LANES>(in + t, ACROSS, nullptr, DOWN, out + t * DOWN, DOWN);
}

// Sums of G outputs over `kept` inputs each, for a tile: out[g][t]. Several at once, because each
// sum waits for its own last addition. Rows are the outputs' weights; inputs go through `map`.
template <int G, bool THROUGH>
PADST_INLINE void feature_rows(const float* tile, const float* weights, const int32_t* inputs,
                               const int64_t* map, const int64_t (&rows)[G], int64_t kept,
                               float* out) {
  constexpr int L = LANES, V = ACROSS / L;
  vec<L> sums[G][V];
#pragma GCC unroll 8
  for (int g = 0; g < G; g++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sums[g][v] = vec<L>{};
  for (int64_t k = 0; k < kept; k++) {
#pragma GCC unroll 8
    for (int g = 0; g < G; g++) {
      const vec<L> weight = all<L>(weights[rows[g] * kept + k]);
      const int32_t input = inputs[rows[g] * kept + k];
      const float* from = tile + (THROUGH ? map[input] : input) * ACROSS;
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sums[g][v] = fma(weight, load<L>(from + v * L), sums[g][v]);
    }
  }
#pragma GCC unroll 8
  for (int g = 0; g < G; g++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store<L>(out + g * ACROSS + v * L, sums[g][v]);
}

// y[t][o] = sum_k weights[o][k] * x[t][inputs[o][k]]: store gets tiles of DOWN outputs. With maps an
// input is in_map[inputs[o][k]] of the features of x, and output n is sum out_map[n].
template <bool THROUGH, bool MOVED, typename Store>
PADST_INLINE void feature_sums(const float* x, int64_t row, int64_t tokens, int64_t features,
                               const int64_t* in_map, const float* weights, const int32_t* inputs,
                               int64_t outputs, int64_t kept, const int64_t* out_map, int threads,
                               const Store& store) {
  constexpr int G = ACROSS / LANES >= 4 ? 2 : 4;  // 8 vectors of sums
  const int64_t tiles = (tokens + ACROSS - 1) / ACROSS;
  // A thread turns its tokens once for all outputs; with fewer tiles than threads they share one.
  const int64_t parts = tiles >= threads ? 1 : threads;
  const int64_t share = (outputs / DOWN + parts - 1) / parts * DOWN;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    alignas(64) float sums[DOWN * ACROSS], tile[ACROSS * DOWN];
    const Aligned turned(features * ACROSS);
#pragma omp for collapse(2) schedule(static)
    for (int64_t at = 0; at < tiles; at++)
      for (int64_t part = 0; part < parts; part++) {
        const int64_t first = at * ACROSS, count = std::min<int64_t>(ACROSS, tokens - first);
        to_tile(x + first * row, row, count, features, turned.begin);
        const int64_t last = std::min(outputs, (part + 1) * share);
        for (int64_t o = part * share; o < last; o += DOWN) {
          for (int g = 0; g < DOWN; g += G) {
            int64_t rows[G];
            for (int at = 0; at < G; at++) rows[at] = MOVED ? out_map[o + g + at] : o + g + at;
            feature_rows<G, THROUGH>(turned.begin, weights, inputs, in_map, rows, kept,
                                     sums + g * ACROSS);
          }
          from_tile(sums, tile);
          store(first, count, o, tile);
        }
      }
  }
}

}  // namespace padst
