// Runs the kernel of two block layers on cases from standard input: numbers first, then x, weights,
// block columns, the bias and maps; writes the results to standard output.
using namespace padst;

struct Case {
  int32_t form, tokens, columns, kept1, kept2, outputs, row, features, biased, threads;
};

template <int OUT1, int IN1, int OUT2, int IN2, int HIDDEN, Read READ, bool MOVED>
static void run(const Case& c) {
  using First = Sides<width(OUT1), IN1, OUT1>;
  using Second = Sides<width(OUT2), IN2, OUT2>;
  constexpr int N = Second::N;
  const int64_t rows = HIDDEN / OUT1, wide = c.columns * (int64_t)IN1;
  const int64_t results = c.outputs * (int64_t)OUT2;
  const auto x = take<float>((size_t)(c.tokens - 1) * c.row + c.features);
  const auto w1 = take<float>((size_t)rows * c.kept1 * OUT1 * IN1);
  const auto w2 = take<float>((size_t)c.outputs * c.kept2 * OUT2 * IN2);
  const auto columns1 = take<int32_t>((size_t)rows * c.kept1);
  const auto columns2 = take<int32_t>((size_t)c.outputs * c.kept2);
  const auto bias = take<float>(c.biased ? HIDDEN : 0);
  const auto map = take<int64_t>(READ == Read::THROUGH ? wide : 0);
  const auto to = take<int64_t>(MOVED ? results : 0);
  std::vector<float> y((size_t)c.tokens * results);
  const auto activate = [](float* tile, int64_t count) {
    for (int64_t n = 0; n < count; n++) tile[n] = tile[n] > 0 ? tile[n] : -0.5f * tile[n];
  };
  const auto store = [&](int64_t m, int64_t count, int64_t n, const float* tile) {
    for (int64_t r = 0; r < count; r++)
      for (int64_t v = 0; v < N; v++) y.at((m + r) * results + n + v) += tile[r * N + v];
  };
  const Layout one{columns1.data(), nullptr, c.kept1, rows};
  const Layout two{columns2.data(), nullptr, c.kept2, c.outputs};
  block_mlp<First, Second, HIDDEN, 0, READ, MOVED>(
      x.data(), c.row, c.tokens, c.features, wide, map.data(), w1.data(), one,
      c.biased ? bias.data() : nullptr,
      w2.data(), two, to.data(), c.threads, activate, store);
  std::fwrite(y.data(), sizeof(float), y.size(), stdout);
}

int main() {
  Case c;
  while (std::fread(&c, sizeof c, 1, stdin) == 1) {
    switch (c.form) {
#define FORM(AT, OUT1, IN1, OUT2, IN2, HIDDEN, READ, MOVED) \
  case AT: run<OUT1, IN1, OUT2, IN2, HIDDEN, (Read)READ, MOVED>(c); break;
      ALL_FORMS
      default: return 2;
    }
  }
  return 0;
}
