// Runs the block kernels on cases from standard input: numbers first, then x, weights (or the
// gradient), block columns and maps; writes the results to standard output.
using namespace padst;

#ifndef MATH
#define MATH Single  // or Pairs: a float is two numbers of bf16
#endif
constexpr bool SINGLE = std::is_same_v<MATH, Single>;
constexpr Read MAPPED = SINGLE ? Read::THROUGH : Read::PAIRS_THROUGH;

enum Kind : int32_t { LINEAR, DX, DW };

struct Case {
  int32_t kind, out, in, tokens, groups, kept, columns, row, read, features, moved, threads;
};

template <int OUT, int IN> static void run(const Case& c) {
  constexpr int N = width(OUT);
  const bool dx = c.kind == DX, dw = c.kind == DW;
  // `groups` and `columns` are the rows and columns of blocks of the layer; dx swaps their roles.
  const int64_t rows = c.groups, wide = dx ? rows * IN : c.columns * (int64_t)IN;
  const int64_t results = dx ? c.columns * (int64_t)OUT : rows * OUT;
  // The gradient of pairs reads single numbers: `row` and `features` count those, two in a float.
  const auto floats = [&](size_t count) { return SINGLE || !dw ? count : (count + 1) / 2; };
  const auto x = take<float>(floats((size_t)(c.tokens - 1) * c.row + c.features));
  const auto w =
      take<float>(dw ? floats((size_t)c.tokens * results) : (size_t)rows * c.kept * OUT * IN);
  const auto indices = take<int32_t>((size_t)rows * c.kept);
  const int64_t across = dw ? OUT : results;
  std::vector<float> y(dw ? (size_t)rows * c.kept * IN * OUT : (size_t)c.tokens * results);
  const auto store = [&](int64_t m, int64_t count, int64_t n, const float* tile) {
    for (int64_t r = 0; r < count; r++)
      for (int64_t v = 0; v < N; v++) y.at((m + r) * across + n + v) += tile[r * N + v];
  };
  if (dw) {
    using Number = std::conditional_t<SINGLE, float, uint16_t>;
    block_gradient<N, IN, OUT, MATH>((const Number*)x.data(), c.row, c.features,
                                     (const Number*)w.data(), results, c.tokens, indices.data(), rows,
                                     c.kept, c.threads, store);
  } else {
    const ByColumn<IN, OUT> by(w.data(), indices.data(), dx ? rows : 0, c.kept, c.columns, c.threads);
    const Layout layout = dx ? by.layout() : Layout{indices.data(), nullptr, c.kept, rows};
    const auto map = take<int64_t>(c.read == (int)MAPPED ? (SINGLE ? wide : 2 * wide) : 0);
    check_map(map.data(), (int64_t)map.size(), SINGLE ? c.features : 2 * c.features);
    const auto to = take<int64_t>(c.moved ? results : 0);
    check_map(to.data(), (int64_t)to.size(), results);
    const auto sums = [&](auto read, auto moved) {
      block_sums<N, IN, OUT, 0, decltype(read)::value, decltype(moved)::value, 32, MATH>(
          x.data(), c.row, c.tokens, c.features, wide, map.data(),
          dx ? by.weights.begin : w.data(), layout, to.data(), c.threads, store);
    };
    const auto reads = [&](auto read) {
      if (c.moved) sums(read, std::true_type()); else sums(read, std::false_type());
    };
    if (c.read == (int)Read::HERE) reads(std::integral_constant<Read, Read::HERE>());
    if (c.read == (int)Read::APART) reads(std::integral_constant<Read, Read::APART>());
    if (c.read == (int)MAPPED) reads(std::integral_constant<Read, MAPPED>());
  }
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
