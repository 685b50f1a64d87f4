// Runs block_sums on pairs of bf16: numbers first, then x, weights by pairs, block columns.
using namespace padst;

struct Case {
  int32_t out, in, tokens, groups, kept, columns, apart, threads;
};

template <int OUT, int IN> static void run(const Case& c) {
  constexpr int N = width(OUT);
  const int64_t row = c.columns * (int64_t)IN / 2, results = c.groups * (int64_t)OUT;
  const auto x = take<float>((size_t)c.tokens * row);
  const auto w = take<float>((size_t)c.groups * c.kept * OUT * IN / 2);
  const auto indices = take<int32_t>((size_t)c.groups * c.kept);
  std::vector<float> y((size_t)c.tokens * results);
  const auto store = [&](int64_t m, int64_t count, int64_t n, const float* tile) {
    for (int64_t r = 0; r < count; r++)
      for (int64_t v = 0; v < N; v++) y.at((m + r) * results + n + v) += tile[r * N + v];
  };
  const Layout layout{indices.data(), nullptr, c.kept, c.groups};
  const auto sums = [&](auto read) {
    block_sums<N, IN / 2, OUT, 0, decltype(read)::value, false, 32, Pairs>(
        x.data(), row, c.tokens, row, row, nullptr, w.data(), layout, nullptr, c.threads, store);
  };
  if (c.apart) sums(std::integral_constant<Read, Read::APART>());
  else sums(std::integral_constant<Read, Read::HERE>());
  std::fwrite(y.data(), sizeof(float), y.size(), stdout);
}

int main() {
  Case c;
  while (std::fread(&c, sizeof c, 1, stdin) == 1) {
    switch (c.out * 1000 + c.in) {
#define SIDES(OUT, IN) case OUT * 1000 + IN: run<OUT, IN>(c); break;
      ALL_SIDES
      default: return 2;
    }
  }
  return 0;
}
