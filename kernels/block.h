// Blocks: the sums of a few tokens and a row of blocks stay in registers.
namespace padst {

// The blocks that some outputs sum over: which block of inputs each reads; null for the first one.
struct Blocks {
  const int32_t* columns;
  int64_t count;
};

// out[r][n] = sum over blocks j and inputs k of
//   x[r * row + (columns[j] * C + k) * step] * w[(j * C + k) * ldw + n]
// for R tokens and N outputs. A C of 0 takes the number of inputs from `length`. With Pairs a number
// is two of bf16, and C counts pairs.
template <int R, int N, int C, typename Math>
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
          for (int v = 0; v < V; v++)
            sums[u][r][v] = Math::template add<L>(value, weights[v], sums[u][r][v]);
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

// How many rows the next smaller tile has: a power of two, so that chunks and few tokens are tiled.
constexpr int smaller(int rows, int most = 16) {
  return 3 * most <= 2 * rows || most == 1 ? most : smaller(rows, most / 2);
}

// Do as many rows of x as have room, of those that are left; return how many.
template <int N, int C, typename Math = Single>
PADST_INLINE int tile_of(const float* x, int64_t row, int64_t step, Blocks blocks, const float* w,
                         int64_t ldw, int64_t length, float* out, int64_t left) {
  constexpr int R = tokens_of(N), H = smaller(R), Q = smaller(H);
  if (left >= R) return sums_of<R, N, C, Math>(x, row, step, blocks, w, ldw, length, out), R;
  if (left >= H) return sums_of<H, N, C, Math>(x, row, step, blocks, w, ldw, length, out), H;
  if (left >= Q) return sums_of<Q, N, C, Math>(x, row, step, blocks, w, ldw, length, out), Q;
  return sums_of<1, N, C, Math>(x, row, step, blocks, w, ldw, length, out), 1;
}

// The blocks of all groups of outputs: the same number each, or those of group g from starts[g] on.
struct Layout {
  const int32_t* columns;
  const int32_t* starts;
  int64_t kept, groups;

  PADST_INLINE int64_t first(int64_t group) const { return starts ? starts[group] : group * kept; }
  PADST_INLINE Blocks of(int64_t group) const {
    return {columns + first(group), starts ? starts[group + 1] - starts[group] : kept};
  }
};

// The blocks (OUT, IN) of w turned, one block column after the other: what sums over rows of blocks.
template <int IN, int OUT> class ByColumn {
 public:
  ByColumn(const float* w, const int32_t* indices, int64_t rows, int64_t kept, int64_t columns,
           int threads)
      : weights(rows * kept * IN * OUT), starts_(columns + 1), rows_(rows * kept), columns_(columns) {
    constexpr int L = lanes(OUT);
    for (int64_t j = 0; j < rows * kept; j++) starts_[indices[j] + 1]++;
    for (int64_t c = 0; c < columns; c++) starts_[c + 1] += starts_[c];
    std::vector<int32_t> next(starts_.begin(), starts_.end() - 1), from(rows * kept);
    for (int64_t j = 0; j < rows * kept; j++) from[next[indices[j]]++] = (int32_t)j;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t at = 0; at < rows * kept; at++) {
      rows_[at] = (int32_t)(from[at] / kept);
      for (int c = 0; c < OUT; c += L)
        to_lines<L>(w + ((int64_t)from[at] * OUT + c) * IN, IN, L, IN, OUT,
                    weights.begin + at * IN * OUT + c);
    }
  }
  Layout layout() const { return {rows_.data(), starts_.data(), 0, columns_}; }

  const Aligned weights;

 private:
  std::vector<int32_t> starts_, rows_;
  int64_t columns_;
};

// Numbers of bf16 in rows of OUT as pairs of those of two rows: blocks (2 IN, OUT) as (IN, OUT).
template <int OUT> class Zipped {
 public:
  Zipped(const uint16_t* values, int64_t rows, int threads) : weights(rows * OUT) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t k = 0; k < rows; k++)
      Pairs::zip(values + 2 * k * OUT, values + (2 * k + 1) * OUT, OUT, weights.begin + k * OUT);
  }

  const Aligned weights;
};

// Every sum of x (tokens, inputs) and blocks (IN, OUT), N outputs at once. Rows that lie a multiple
// of a page apart share few lines of the cache: read APART, they have 16 zeros between them.
// A ROW of 0 is known at run time only: rows are `row` apart.
template <int N, int IN, int OUT, int64_t ROW, Read READ, bool MOVED, int CHUNK = 32,
          typename Math = Single, typename Store>
PADST_INLINE void block_sums(const float* x, int64_t row, int64_t tokens, int64_t features,
                             int64_t inputs, const int64_t* in_map, const float* w,
                             const Layout& layout, const int64_t* out_map, int threads,
                             const Store& store) {
  constexpr int PARTS = OUT / N;
  const auto tile = [&](const float* from, int64_t width, int64_t at, int64_t left,
                        float* out) __attribute__((always_inline)) {
    const int64_t group = at / PARTS, inside = at % PARTS * N;
    const float* weights = w + layout.first(group) * IN * OUT + inside;
    return tile_of<N, IN, Math>(from, ROW ? ROW : width, 1, layout.of(group), weights, OUT, 0, out,
                                left);
  };
  all_sums<N, CHUNK, READ, MOVED>(x, row, tokens, features, inputs, in_map, {0, 16, false},
                               layout.groups * PARTS, out_map, threads, tile, store);
}

// The gradient of every block (IN, OUT): sums over tokens of x (tokens, inputs) and grad. Blocks ask
// for inputs in any order, so those of a chunk of tokens are laid out by block and stay in the cache
// while all blocks pass by. The outputs come in order: those of the next part are asked for early.
// With Pairs, x and grad are of bf16 and two tokens are summed at once.
template <int N, int IN, int OUT, typename Math = Single, typename Number, typename Store>
PADST_INLINE void block_gradient(const Number* x, int64_t x_row, int64_t inputs, const Number* grad,
                                 int64_t grad_row, int64_t tokens, const int32_t* columns,
                                 int64_t rows, int64_t kept, int threads, const Store& store) {
  const int64_t steps = (tokens + Math::TOKENS - 1) / Math::TOKENS;
  constexpr int PARTS = OUT / N;
  const int64_t size = kept * IN * N, parts = rows * PARTS;  // sums of a part
  const int64_t room = std::max<int64_t>(16, std::min<int64_t>((1 << 17) / inputs, 4096 / N));
  const int64_t chunks = (steps + room - 1) / room, chunk = (steps + chunks - 1) / chunks;
  const Aligned all(parts * size), by_block(chunk * inputs);
  std::memset(all.begin, 0, sizeof(float) * parts * size);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    alignas(64) float tile[MOST * N];
    const Aligned outputs(chunk * N);
    for (int64_t first = 0; first < steps; first += chunk) {
      const int64_t count = std::min(chunk, steps - first);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < count; t++)
        for (int64_t block = 0; block < inputs / IN; block++)
          Math::lay_out(x, x_row, tokens, first + t, block * IN, IN,
                        by_block.begin + (block * chunk + t) * IN);
#pragma omp for schedule(static)
      for (int64_t part = 0; part < parts; part++) {
        const int64_t row = part / PARTS;
        const int64_t from = row * OUT + part % PARTS * N;
        const bool more = part + 1 < parts;
        for (int64_t t = 0; t < count; t++) {
          Math::lay_out(grad, grad_row, tokens, first + t, from, N, outputs.begin + t * N);
          const Number* const next = grad + (first + t) * Math::TOKENS * grad_row + from + N;
          for (int n = 0; more && n < N; n += 16) __builtin_prefetch(next + n);
        }
        float* sums = all.begin + part * size;
        for (int64_t slot = 0; slot < kept; slot++) {
          const float* const block = by_block.begin + columns[row * kept + slot] * chunk * IN;
          for (int64_t k = 0, done; k < IN; k += done, sums += done * N) {
            done = tile_of<N, 0, Math>(block + k, 1, IN, {nullptr, 1}, outputs.begin, N, count,
                                 tile, IN - k);
            for (int64_t n = 0; n < done * N; n++) sums[n] += tile[n];
          }
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t part = 0; part < parts; part++)
      for (int64_t k = 0; k < kept * IN; k += MOST)
        store(part / PARTS * kept * IN + k, std::min<int64_t>(MOST, kept * IN - k),
              part % PARTS * N, all.begin + part * size + k * N);
  }
}

}  // namespace padst
