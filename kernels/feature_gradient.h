// Gradients of weights that lie anywhere. Both list the weights by spans of what they read in any
// order, as much as a cache holds: of outputs for the inputs' gradient, of inputs for the weights'.
namespace padst {

// Every output has `each` weights in every group of `width` inputs, at these places of the group.
struct Slots {
  const int32_t* places;
  int64_t outputs, groups, each, width;

  int64_t kept() const { return groups * each; }
  int64_t inputs() const { return groups * width; }
  int64_t weights() const { return outputs * kept(); }
  // use(k, input) for every weight k of an output.
  template <typename Use> PADST_INLINE void visit(int64_t output, const Use& use) const {
    const int32_t* const here = places + output * kept();
    for (int64_t g = 0, k = 0; g < groups; g++)
      for (const int64_t end = k + each; k < end; k++) use(k, here[k] + g * width);
  }
};

constexpr int64_t parts_of(int64_t all, int64_t part) { return (all + part - 1) / part; }

// -- inputs ---------------------------------------------------------------------------------------

constexpr int64_t SPAN = 256;  // outputs whose tile of ACROSS tokens stays in the L1 cache

struct Weight {
  int32_t row;
  float value;
};

// The weights of every input, those of SPAN outputs after those of the SPAN before: a counting sort.
class ByInput {
 public:
  ByInput(const float* values, const Slots& slots, const int64_t* map, int threads)
      : inputs_(slots.inputs()),
        spans(parts_of(slots.outputs, SPAN)),
        starts_(spans * (inputs_ + 1)),
        weights_(new Weight[slots.weights()]) {
    const int64_t kept = slots.kept();
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t span = 0; span < spans; span++) {
      std::vector<int32_t> next(inputs_);
      const int64_t first = span * SPAN, last = std::min(slots.outputs, first + SPAN);
      int32_t* const counts = next.data();
      for (int64_t o = first; o < last; o++)
        slots.visit(o, [=](int64_t, int64_t input) { counts[input]++; });
      int32_t* const starts = &starts_[span * (inputs_ + 1)];
      int32_t at = (int32_t)(first * kept);
      for (int64_t i = 0; i < inputs_; i++) {
        starts[i] = at;
        at += next[i];
        next[i] = starts[i];
      }
      starts[inputs_] = at;
      Weight* const to = weights_.get();
      for (int64_t o = first; o < last; o++) {
        const int32_t row = (int32_t)(map ? map[o] : o);
        const float* const from = values + o * kept;
        slots.visit(o, [=](int64_t k, int64_t input) { to[counts[input]++] = {row, from[k]}; });
      }
    }
  }
  const Weight* begin(int64_t span, int64_t input) const {
    return &weights_[starts_[span * (inputs_ + 1) + input]];
  }

 private:
  int64_t inputs_;

 public:
  const int64_t spans;

 private:
  std::vector<int32_t> starts_;
  std::unique_ptr<Weight[]> weights_;
};

// out[t] += sum of weights and their rows of a tile; two sums, because each waits for its own last
// addition.
PADST_INLINE void weighted(const float* tile, const Weight* weights, const Weight* end, float* out) {
  constexpr int L = LANES, V = ACROSS / L, U = 2;
  vec<L> sums[U][V];
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) {
    sums[0][v] = load<L>(out + v * L);
    sums[1][v] = vec<L>{};
  }
  const auto add = [&](const Weight& w, int u) __attribute__((always_inline)) {
    const vec<L> value = all<L>(w.value);
    const float* const from = tile + (int64_t)w.row * ACROSS;
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sums[u][v] = fma(value, load<L>(from + v * L), sums[u][v]);
  };
  for (; weights + U <= end; weights += U) {
    add(weights[0], 0);
    add(weights[1], 1);
  }
  if (weights < end) add(*weights, 0);
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) store<L>(out + v * L, sums[0][v] + sums[1][v]);
}

// The gradient of the inputs: store gets tiles of DOWN of them. Output o of the weight is feature
// in_map[o] of grad (tokens, features); input n of the result is out_map[n] of the weight.
template <typename Store>
PADST_INLINE void feature_dx(const float* grad, int64_t row, int64_t tokens, int64_t features,
                             const int64_t* in_map, const float* weights, const Slots& slots,
                             const int64_t* out_map, int threads, const Store& store) {
  const ByInput by_input(weights, slots, in_map, threads);
  const int64_t tiles = parts_of(tokens, ACROSS), inputs = slots.inputs();
  // A thread turns its tokens once for all inputs; with fewer tiles than threads they share one.
  const int64_t parts = tiles >= threads ? 1 : threads;
  const int64_t share = parts_of(inputs / DOWN, parts) * DOWN;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    alignas(64) float tile[ACROSS * DOWN];
    const Aligned turned(features * ACROSS), sums(share * ACROSS);
#pragma omp for collapse(2) schedule(static)
    for (int64_t at = 0; at < tiles; at++)
      for (int64_t part = 0; part < parts; part++) {
        const int64_t first = at * ACROSS, count = std::min<int64_t>(ACROSS, tokens - first);
        const int64_t begin = part * share, end = std::min(inputs, begin + share);
        to_tile(grad + first * row, row, count, features, turned.begin);
        std::fill_n(sums.begin, share * ACROSS, 0.0f);
        for (int64_t span = 0; span < by_input.spans; span++)
          for (int64_t n = begin; n < end; n++) {
            const int64_t i = out_map ? out_map[n] : n;
            weighted(turned.begin, by_input.begin(span, i), by_input.begin(span, i + 1),
                     sums.begin + (n - begin) * ACROSS);
          }
        for (int64_t n = begin; n < end; n += DOWN) {
          from_tile(sums.begin + (n - begin) * ACROSS, tile);
          store(first, count, n, tile);
        }
      }
  }
}

// -- weights --------------------------------------------------------------------------------------

constexpr int64_t CHUNK = 208;         // tokens: 197 are one chunk
constexpr int64_t CACHED = 160 * 1024;  // numbers that the L2 cache holds beside what streams

// The inputs of every output by spans of inputs, and from where in `places` each came.
class BySpan {
 public:
  BySpan(const Slots& slots, int64_t span, int threads)
      : kept_(slots.kept()),
        spans(parts_of(slots.inputs(), span)),
        starts_(slots.outputs * (spans + 1)),
        inputs_(slots.weights() + LANES),
        order_(spans > 1 ? slots.weights() : 0) {
    const double in_spans = 1.0 / (double)span;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      std::vector<int32_t> list(kept_), next(spans + 1);
#pragma omp for schedule(static)
      for (int64_t o = 0; o < slots.outputs; o++) {
        int32_t *const to = &inputs_[o * kept_], *const starts = &starts_[o * (spans + 1)];
        int32_t* const known = spans > 1 ? list.data() : to;
        slots.visit(o, [=](int64_t k, int64_t input) { known[k] = (int32_t)input; });
        starts[spans] = (int32_t)kept_;
        if (spans == 1) continue;
        std::fill(next.begin(), next.end(), 0);
        const auto span_of = [&](int32_t input) { return (int32_t)((input + 0.5) * in_spans); };
        for (int64_t k = 0; k < kept_; k++) next[span_of(list[k]) + 1]++;
        for (int64_t s = 0; s < spans; s++) starts[s] = next[s], next[s + 1] += next[s];
        for (int64_t k = 0; k < kept_; k++) {
          const int32_t s = span_of(list[k]), at = next[s]++;
          to[at] = list[k] - (int32_t)(s * span);
          order_[o * kept_ + at] = (int32_t)k;
        }
      }
    }
  }
  int64_t begin(int64_t output, int64_t span) const {
    return output * kept_ + starts_[output * (spans + 1) + span];
  }
  const int32_t* inputs() const { return inputs_.data(); }
  // Bring an output's numbers into the order of its places.
  void restore(int64_t output, float* numbers) const {
    if (spans == 1) return;
    std::vector<float> sorted(numbers, numbers + kept_);
    for (int64_t k = 0; k < kept_; k++) numbers[order_[output * kept_ + k]] = sorted[k];
  }

 private:
  int64_t kept_;

 public:
  const int64_t spans;

 private:
  std::vector<int32_t> starts_, inputs_, order_;
};

// The sums of the lanes of L vectors, side by side: of halves, then of quarters, as in Turn.
template <int L, int HALF> PADST_INLINE vec<L> folded(vec<L> (&rows)[L]) {
  if constexpr (HALF == 0) {
    return rows[0];
  } else {
    typename Order<L>::type own, other;
#pragma GCC unroll 16
    for (int j = 0; j < L; j++) {
      own[j] = j & HALF ? L + j : j;
      other[j] = j & HALF ? L + j - HALF : j + HALF;
    }
#pragma GCC unroll 16
    for (int i = 0; i < HALF; i++) {
      const vec<L> a = rows[i], b = rows[i + HALF];
      rows[i] = __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
    }
    return folded<L, HALF / 2>(rows);
  }
}

// The products of one row of `across` numbers and L others.
PADST_INLINE vec<LANES> dots(const float* own, const float* rows, const int32_t* others,
                             int64_t across) {
  constexpr int L = LANES, U = L < 8 ? L : 8;
  vec<L> sums[L];
#pragma GCC unroll 16
  for (int k = 0; k < L; k += U) {
    const float* from[U];
#pragma GCC unroll 8
    for (int u = 0; u < U; u++) {
      from[u] = rows + others[k + u] * across;
      sums[k + u] = vec<L>{};
    }
    for (int64_t t = 0; t < across; t += L) {
      const vec<L> value = load<L>(own + t);
#pragma GCC unroll 8
      for (int u = 0; u < U; u++) sums[k + u] = fma(value, load<L>(from[u] + t), sums[k + u]);
    }
  }
  return folded<L, L / 2>(sums);
}

// out[k][t] = x[t][k], rows `across` apart; zeros from `tokens` on.
inline void to_rows(const float* x, int64_t row, int64_t tokens, int64_t inputs, int64_t across,
                    float* out) {
  for (int64_t t = 0; t < across; t += LANES)
    to_lines<LANES>(x + t * row, row, tokens - t, inputs, across, out + t);
}

// The gradient of every weight, from x (tokens, inputs) and grad (tokens, outputs): a chunk of tokens
// of a span of inputs stays in the L2 cache while all outputs pass by, DOWN in the L1 cache.
template <typename Store>
PADST_INLINE void feature_dw(const float* x, int64_t x_row, const float* grad, int64_t grad_row,
                             int64_t tokens, const Slots& slots, int threads, const Store& store) {
  constexpr int L = LANES, SOME = 64;
  const int64_t across = parts_of(parts_of(tokens, parts_of(tokens, CHUNK)), L) * L;
  const int64_t kept = slots.kept(), inputs = slots.inputs(), span = std::min(inputs, CACHED / across);
  const BySpan by_span(slots, span, threads);
  std::vector<float> all(slots.weights());
  const Aligned turned(span * across);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Aligned few(DOWN * across);
    for (int64_t first = 0; first < tokens; first += across) {
      const int64_t count = std::min(across, tokens - first);
      for (int64_t s = 0; s < by_span.spans; s++) {
        const int64_t begin = s * span, end = std::min(inputs, begin + span);
#pragma omp for schedule(static)
        for (int64_t k = begin; k < end; k += SOME)
          to_rows(x + first * x_row + k, x_row, count, std::min<int64_t>(SOME, end - k), across,
                  turned.begin + (k - begin) * across);
#pragma omp for schedule(static)
        for (int64_t o = 0; o < slots.outputs; o += DOWN) {
          to_rows(grad + first * grad_row + o, grad_row, count, DOWN, across, few.begin);
          for (int64_t n = 0; n < DOWN; n++) {
            const float* const own = few.begin + n * across;
            const int64_t last = by_span.begin(o + n, s + 1);
            int64_t k = by_span.begin(o + n, s);
            for (; k + L <= last; k += L)
              padst::store<L>(&all[k], load<L>(&all[k]) +
                                   dots(own, turned.begin, by_span.inputs() + k, across));
            if (k == last) continue;
            int32_t rest[L] = {};  // and others, whose products are not kept
            std::copy_n(by_span.inputs() + k, last - k, rest);
            const vec<L> sums = dots(own, turned.begin, rest, across);
            for (int l = 0; k + l < last; l++) all[k + l] += sums[l];
          }
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t o = 0; o < slots.outputs; o += DOWN) {
      for (int64_t n = o; n < o + DOWN; n++) by_span.restore(n, &all[n * kept]);
      for (int64_t k = 0; k < kept; k += MOST)  // rows of DOWN numbers
        store(o / DOWN * kept + k, std::min<int64_t>(MOST, kept - k), 0, &all[o * kept + k * DOWN]);
    }
  }
}

}  // namespace padst
