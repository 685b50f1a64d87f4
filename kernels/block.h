// Blocks: the sums of a few tokens and a row of blocks stay in registers.
#include <algorithm>
#include <memory>
#include <vector>

namespace padst {

// How many tokens have room for their sums of n outputs beside one row of weights.
constexpr int tokens_of(int n) {
  const int vectors = n / lanes(n), most = (REGISTERS - vectors - 1) / vectors;
  return most > 16 ? 16 : most < 1 ? 1 : most;
}

// The blocks that some outputs sum over: which of the inputs each reads, and where its weights lie.
struct Blocks {
  const int32_t* columns;  // the block of inputs; null for the first one
  const int32_t* places;   // the block of weights; null for one after the other
  int64_t count;
};

// out[r][n] = sum over blocks j and inputs k of
//   x[r * row + (columns[j] * C + k) * step] * w[(places[j] * C + k) * ldw + n]
// for R tokens and N outputs. A C of 0 takes the number of inputs from `length`.
template <int R, int N, int C>
PADST_INLINE void sums_of(const float* __restrict x, int64_t row, int64_t step, Blocks blocks,
                          const float* __restrict w, int64_t ldw, int64_t length,
                          float* __restrict out) {
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
  for (int64_t j = 0; j < blocks.count; j++) {
    const float* xs = blocks.columns ? x + blocks.columns[j] * inputs * step : x;
    const float* ws = w + (blocks.places ? blocks.places[j] : j) * inputs * ldw;
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
template <int N, int C>
PADST_INLINE int tile_of(const float* x, int64_t row, int64_t step, Blocks blocks, const float* w,
                         int64_t ldw, int64_t length, float* out, int64_t left) {
  constexpr int R = tokens_of(N), H = R > 2 ? R / 2 : 1, Q = H > 2 ? H / 2 : 1;
  if (left >= R) return sums_of<R, N, C>(x, row, step, blocks, w, ldw, length, out), R;
  if (left >= H) return sums_of<H, N, C>(x, row, step, blocks, w, ldw, length, out), H;
  if (left >= Q) return sums_of<Q, N, C>(x, row, step, blocks, w, ldw, length, out), Q;
  return sums_of<1, N, C>(x, row, step, blocks, w, ldw, length, out), 1;
}

// The blocks of all groups of outputs: the same number each, or those of group g from starts[g] on.
struct Layout {
  const int32_t* columns;
  const int32_t* places;
  const int32_t* starts;
  int64_t kept, groups;

  PADST_INLINE Blocks of(int64_t group) const {
    if (!starts) return {columns + group * kept, nullptr, kept};
    return {columns + starts[group], places + starts[group], starts[group + 1] - starts[group]};
  }
  PADST_INLINE int64_t first(int64_t group) const { return starts ? 0 : group * kept; }
};

// The same blocks by block column: what sums over rows of blocks reads.
class ByColumn {
 public:
  ByColumn(const int32_t* indices, int64_t rows, int64_t kept, int64_t columns)
      : starts_(columns + 1), rows_(rows * kept), places_(rows * kept), columns_(columns) {
    for (int64_t j = 0; j < rows * kept; j++) starts_[indices[j] + 1]++;
    for (int64_t c = 0; c < columns; c++) starts_[c + 1] += starts_[c];
    std::vector<int32_t> next(starts_.begin(), starts_.end() - 1);
    for (int64_t j = 0; j < rows * kept; j++) {
      const int32_t at = next[indices[j]]++;
      rows_[at] = (int32_t)(j / kept);
      places_[at] = (int32_t)j;
    }
  }
  Layout layout() const {
    return {rows_.data(), places_.data(), starts_.data(), 0, columns_};
  }

 private:
  std::vector<int32_t> starts_, rows_, places_;
  int64_t columns_;
};

constexpr int64_t CHUNK = 32;  // tokens whose inputs stay in the cache while all weights pass by

// Every sum of x (tokens, inputs) and blocks (IN, OUT), N outputs at once: store gets tiles of them.
// COPIED sets rows apart that lie a multiple of a page apart, and so share few lines of the cache.
template <int N, int IN, int OUT, bool COPIED, typename Store>
PADST_INLINE void block_sums(const float* x, int64_t row, int64_t tokens, int64_t inputs,
                             const float* w, const Layout& layout, int threads,
                             const Store& store) {
  constexpr int PARTS = OUT / N;
  const int64_t chunks = (tokens + CHUNK - 1) / CHUNK, width = COPIED ? inputs + 16 : row;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    alignas(64) float tile[16 * N];
    std::unique_ptr<float[]> copy(COPIED ? new float[CHUNK * width] : nullptr);
    int64_t copied = -1;
#pragma omp for collapse(2) schedule(static)
    for (int64_t chunk = 0; chunk < chunks; chunk++)
      for (int64_t part = 0; part < layout.groups * PARTS; part++) {
        const int64_t group = part / PARTS, inside = part % PARTS * N, first = chunk * CHUNK;
        const int64_t last = std::min(tokens, first + CHUNK);
        if (COPIED && copied != chunk) {
          for (int64_t t = first; t < last; t++)
            std::memcpy(&copy[(t - first) * width], x + t * row, sizeof(float) * inputs);
          copied = chunk;
        }
        const float* from = COPIED ? copy.get() : x + first * row;
        const float* weights = w + layout.first(group) * IN * OUT + inside;
        for (int64_t t = first, done; t < last; t += done) {
          done = tile_of<N, IN>(from + (t - first) * width, width, 1, layout.of(group), weights,
                                OUT, 0, tile, last - t);
          store(t, done, group * OUT + inside, tile);
        }
      }
  }
}

// The gradient of every block (IN, OUT): sums over tokens of x (tokens, inputs) and grad.
template <int N, int IN, int OUT, typename Store>
PADST_INLINE void block_gradient(const float* x, int64_t x_row, const float* grad,
                                 int64_t grad_row, int64_t tokens, const int32_t* columns,
                                 int64_t rows, int64_t kept, int threads, const Store& store) {
  constexpr int PARTS = OUT / N;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    alignas(64) float tile[16 * N];
    std::unique_ptr<float[]> panel(new float[tokens * N]);  // N outputs side by side
#pragma omp for schedule(static)
    for (int64_t part = 0; part < rows * PARTS; part++) {
      const int64_t block = part / PARTS, inside = part % PARTS * N;
      for (int64_t t = 0; t < tokens; t++)
        std::memcpy(&panel[t * N], grad + t * grad_row + block * OUT + inside, sizeof(float) * N);
      for (int64_t slot = block * kept; slot < (block + 1) * kept; slot++)
        for (int64_t k = 0, done; k < IN; k += done) {
          done = tile_of<N, 0>(x + columns[slot] * (int64_t)IN + k, 1, x_row, {nullptr, nullptr, 1},
                               panel.get(), N, tokens, tile, IN - k);
          store(slot * IN + k, done, inside, tile);
        }
    }
  }
}

}  // namespace padst
