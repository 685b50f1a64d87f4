// Runs the kernels of gradients on cases from standard input: numbers first, then x, the gradient,
// indices, weights and maps; writes the results to standard output.
using namespace padst;

enum Kind : int32_t { DX, DW, DIAGONAL, PICKED };

struct Case {
  int32_t kind, form, tokens, outputs, inputs, groups, each, x_row, grad_row, features, results,
      through, moved, threads;
};

template <int N, typename Run> static void into(int64_t rows, int64_t across, const Run& run) {
  std::vector<float> y((size_t)rows * across);
  const auto store = [&](int64_t m, int64_t count, int64_t n, const float* tile) {
    for (int64_t r = 0; r < count; r++)
      for (int64_t v = 0; v < N; v++) y.at((m + r) * across + n + v) += tile[r * N + v];
  };
  run(store);
  std::fwrite(y.data(), sizeof(float), y.size(), stdout);
}

static void run(const Case& c) {
  const bool dx = c.kind == DX;
  const auto x = take<float>(dx ? 0 : (size_t)(c.tokens - 1) * c.x_row + c.inputs);
  const auto grad = take<float>((size_t)(c.tokens - 1) * c.grad_row + c.features);
  const int64_t count = c.kind == DIAGONAL ? c.each : (int64_t)c.outputs * c.groups * c.each;
  const auto indices = take<int32_t>(count);
  const Slots slots{indices.data(), c.outputs, c.groups, c.each, c.inputs / c.groups};
  if (dx) {
    const auto weights = take<float>(count);
    const auto in = take<int64_t>(c.through ? c.outputs : 0), out = take<int64_t>(c.moved ? c.inputs : 0);
    into<DOWN>(c.tokens, c.inputs, [&](const auto& store) {
      feature_dx(grad.data(), c.grad_row, c.tokens, c.features, c.through ? in.data() : nullptr,
                 weights.data(), slots, c.moved ? out.data() : nullptr, c.threads, store);
    });
  }
  if (c.kind == DW)
    into<DOWN>(count / DOWN, DOWN, [&](const auto& store) {
      feature_dw(x.data(), c.x_row, grad.data(), c.grad_row, c.tokens, slots, c.threads, store);
    });
  if (c.kind == DIAGONAL) {
    const bool down = c.outputs >= c.inputs;
    const int64_t length = down ? c.inputs : c.outputs, around = down ? c.outputs : c.inputs;
    const auto with = [&](auto n) {
      into<decltype(n)::value>(count, length, [&](const auto& store) {
        diagonal_gradient<decltype(n)::value>(
            (down ? x : grad).data(), down ? c.x_row : c.grad_row, length, (down ? grad : x).data(),
            down ? c.grad_row : c.x_row, around, c.tokens, indices.data(), count, c.threads, store);
      });
    };
    if (c.form == 64) with(std::integral_constant<int, 64>());
    if (c.form == 48) with(std::integral_constant<int, 48>());
    if (c.form == 16) with(std::integral_constant<int, 16>());
    if (c.form == 4) with(std::integral_constant<int, 4>());
  }
  if (c.kind == PICKED) {
    const auto with = [&](auto width, auto each, auto groups) {
      into<LANES>(count / LANES, LANES, [&](const auto& store) {
        picked_gradient<decltype(width)::value, decltype(each)::value, decltype(groups)::value>(
            x.data(), c.x_row, grad.data(), c.grad_row, c.tokens, indices.data(), c.outputs,
            c.threads, store);
      });
    };
    switch (c.form) {
#define FORM(AT, WIDTH, EACH, GROUPS)                                                            \
  case AT:                                                                                       \
    with(std::integral_constant<int, WIDTH>(), std::integral_constant<int, EACH>(),              \
         std::integral_constant<int, GROUPS>());                                                 \
    break;
      ALL_FORMS
    }
  }
}

int main() {
  Case c;
  while (std::fread(&c, sizeof c, 1, stdin) == 1) run(c);
  return 0;
}
