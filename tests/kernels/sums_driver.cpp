// Runs the diagonal, the select and the feature kernels on cases from standard input: numbers first, then x, the
// weights, places, starts and maps; writes the results to standard output.
using namespace padst;

struct Case {
  int32_t form, outputs, tokens, row, features, items, through, moved, threads;
};

template <int N, typename Run> static void each(const Case& c, int64_t inputs, const Run& run) {
  const auto in = take<int64_t>(c.through ? inputs : 0), out = take<int64_t>(c.moved ? c.outputs : 0);
  check_map(in.data(), (int64_t)in.size(), c.features);
  check_map(out.data(), (int64_t)out.size(), c.outputs);
  std::vector<float> y((size_t)c.tokens * c.outputs);
  const auto store = [&](int64_t m, int64_t count, int64_t n, const float* tile) {
    for (int64_t r = 0; r < count; r++)
      for (int64_t v = 0; v < N; v++) y.at((m + r) * c.outputs + n + v) += tile[r * N + v];
  };
  constexpr std::integral_constant<Read, Read::APART> apart{};
  constexpr std::integral_constant<Read, Read::THROUGH> through{};
  const auto on = [&](auto read, auto moved) { run(read, moved, in.data(), out.data(), store); };
  if (c.through && c.moved) on(through, std::true_type());
  if (c.through && !c.moved) on(through, std::false_type());
  if (!c.through && c.moved) on(apart, std::true_type());
  if (!c.through && !c.moved) on(apart, std::false_type());
  std::fwrite(y.data(), sizeof(float), y.size(), stdout);
}

template <int N, int INPUTS, bool DOWN> static void diagonal(const Case& c) {
  const auto x = take<float>((size_t)(c.tokens - 1) * c.row + c.features);
  const auto w = take<float>((size_t)c.items * N);
  const auto at = take<int32_t>(c.items), starts = take<int32_t>(DOWN ? c.outputs / N + 1 : 0);
  each<N>(c, INPUTS, [&](auto read, auto moved, auto* in, auto* out, const auto& store) {
    diagonal_sums<N, INPUTS, DOWN, decltype(read)::value, decltype(moved)::value>(
        x.data(), c.row, c.tokens, c.features, in, w.data(), at.data(),
        DOWN ? starts.data() : nullptr, c.items, c.outputs, out, c.threads, store);
  });
}

template <int N, int INPUTS, int M, int KEPT, typename I> static void select(const Case& c) {
  const auto x = take<float>((size_t)(c.tokens - 1) * c.row + c.features);
  const auto w = take<float>(c.items);
  const auto at = take<I>(c.items);
  each<N>(c, INPUTS, [&](auto read, auto moved, auto* in, auto* out, const auto& store) {
    picked_sums<N, M, KEPT, INPUTS, decltype(read)::value, decltype(moved)::value>(
        x.data(), c.row, c.tokens, c.features, in, w.data(), at.data(), c.outputs, out, c.threads, store);
  });
}

static void features(const Case& c) {
  const int64_t kept = c.items / c.outputs;
  const auto x = take<float>((size_t)(c.tokens - 1) * c.row + c.features);
  const auto w = take<float>(c.items);
  const auto at = take<int32_t>(c.items);
  const int64_t inputs = take<int64_t>(1)[0];
  each<DOWN>(c, inputs, [&](auto read, auto moved, auto* in, auto* out, const auto& store) {
    feature_sums<decltype(read)::value == Read::THROUGH, decltype(moved)::value>(
        x.data(), c.row, c.tokens, c.features, in, w.data(), at.data(), c.outputs, kept, out,
        c.threads, store);
  });
}

int main() {
  Case c;
  while (std::fread(&c, sizeof c, 1, stdin) == 1) {
    switch (c.form) {
#define DIAGONAL(FORM, N, INPUTS, DOWN) case FORM: diagonal<N, INPUTS, DOWN>(c); break;
#define SELECT(FORM, N, INPUTS, M, KEPT, I) case FORM: select<N, INPUTS, M, KEPT, I>(c); break;
      ALL_FORMS
      case 99: features(c); break;
      default: return 2;
    }
  }
  return 0;
}
