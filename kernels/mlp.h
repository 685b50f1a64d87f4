// Two layers of blocks and what stands between them: the hidden features of a chunk of tokens stay in
// the cache, and nothing of them is ever stored for all tokens.
namespace padst {

// A layer of blocks (IN, OUT) that is done N outputs at once.
template <int N_, int IN_, int OUT_> struct Sides {
  static constexpr int N = N_, IN = IN_, OUT = OUT_, STEP = tokens_of(N_);
  static constexpr int CHUNK = 42 / STEP * STEP;  // whole tiles of tokens
};

// All sums of a second layer of blocks over activate(sums of the first + bias), in place on tiles:
//   activate(tile, count); the bias may be null.
// Every thread has its own tokens. Where that leaves too many threads idle all share one chunk.
template <typename First, typename Second, int HIDDEN, int64_t ROW, Read READ, bool MOVED,
          typename Activate, typename Store>
PADST_INLINE void block_mlp(const float* x, int64_t row, int64_t tokens, int64_t features,
                            int64_t inputs, const int64_t* in_map, const float* w1,
                            const Layout& layout1, const float* bias, const float* w2,
                            const Layout& layout2, const int64_t* out_map, int threads,
                            const Activate& activate, const Store& store) {
  constexpr int N = First::N, L = lanes(N);
  constexpr int64_t WIDTH = HIDDEN + 16, STEP = First::STEP, CHUNK = First::CHUNK;
  const auto chunk = [&](int64_t first, int64_t count, int workers, float* hidden)
                         __attribute__((noinline)) {
    const auto keep = [&](int64_t t, int64_t rows, int64_t n, float* tile) {
      for (int64_t r = 0; bias && r < rows; r++)
        for (int64_t v = 0; v < N; v += L)
          padst::store<L>(tile + r * N + v, load<L>(tile + r * N + v) + load<L>(bias + n + v));
      activate(tile, rows * N);
      for (int64_t r = 0; r < rows; r++)
        std::memcpy(hidden + (t + r) * WIDTH + n, tile + r * N, sizeof(float) * N);
    };
    const auto give = [&](int64_t t, int64_t rows, int64_t n, float* tile) {
      store(first + t, rows, n, tile);
    };
    block_sums<N, First::IN, First::OUT, ROW, READ, false, First::CHUNK>(
        x + first * row, row, count, features, inputs, in_map, w1, layout1, nullptr, workers, keep);
    block_sums<Second::N, Second::IN, Second::OUT, WIDTH, Read::HERE, MOVED, Second::CHUNK>(
        hidden, WIDTH, count, HIDDEN, HIDDEN, nullptr, w2, layout2, out_map, workers, give);
  };
  const int64_t steps = (tokens + STEP - 1) / STEP;
  const int64_t busiest = std::min(tokens, (steps + threads - 1) / threads * STEP);
  if (busiest * threads * 4 > tokens * 5) {
    const Aligned hidden(tokens * WIDTH);
    return chunk(0, tokens, threads, hidden.begin);
  }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int part = 0; part < threads; part++) {
    const Aligned hidden(std::min(CHUNK, busiest) * WIDTH);
    const int64_t last = std::min(tokens, steps * (part + 1) / threads * STEP);
    for (int64_t first = steps * part / threads * STEP; first < last; first += CHUNK)
      chunk(first, std::min(CHUNK, last - first), 1, hidden.begin);
  }
}

}  // namespace padst
