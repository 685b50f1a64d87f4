// The gradient of N:M: a vector of outputs picks its inputs out of a group in registers, as select.h.
namespace padst {

// out[j][l] += sum over tokens of grad[t][l] and the input of group j / KEPT that lane l picks by
// at[j][l], for G groups: rows of x are `row` apart, those of grad and out lie side by side.
template <int L, int G, int M, int KEPT>
PADST_INLINE void picked_products(const float* x, int64_t row, const float* grad, int64_t tokens,
                                  const int32_t* at, float* out) {
  constexpr int VECTORS = vectors_of(M, L);
  vec<L> sums[G * KEPT];
  ints<L> places[G * KEPT];
#pragma GCC unroll 16
  for (int j = 0; j < G * KEPT; j++) {
    sums[j] = load<L>(out + j * L);
    places[j] = picks<L>(at + j * L);
  }
  for (int64_t t = 0; t < tokens; t++, x += row) {
    const vec<L> values = load<L>(grad + t * L);
#pragma GCC unroll 16
    for (int j = 0; j < G * KEPT; j++)
      sums[j] = fma(values, pick<L, VECTORS>(x + j / KEPT * M, places[j]), sums[j]);
  }
#pragma GCC unroll 16
  for (int j = 0; j < G * KEPT; j++) store<L>(out + j * L, sums[j]);
}

// How many of some groups are done at once: as many as there are registers, or fewer that tile them.
constexpr int together(int groups, int most) {
  for (int n = most; n > most / 2; n--)
    if (groups % n == 0) return n;
  return most;
}

// The gradient of every weight, from x (tokens, GROUPS * M), grad (tokens, outputs) and places
// (outputs, GROUPS, KEPT). Some groups of a chunk of tokens stay in the L1 cache while all outputs
// pass by. store gets rows of LANES numbers, of all outputs in order.
template <int M, int KEPT, int GROUPS, typename Store>
PADST_INLINE void picked_gradient(const float* x, int64_t x_row, const float* grad,
                                  int64_t grad_row, int64_t tokens, const int32_t* places,
                                  int64_t outputs, int threads, const Store& store) {
  constexpr int L = LANES, ROOM = (REGISTERS - 4) / 2 / KEPT;
  constexpr int G = together(GROUPS, ROOM > 8 ? 8 : ROOM < 1 ? 1 : ROOM);
  constexpr int64_t CHUNK = 64, ROW = (G * M + 15) / 16 * 16 + 16;  // vectors reach behind a group
  const int64_t tiles = outputs / L, parts = (GROUPS + G - 1) / G, kept = GROUPS * KEPT;
  std::vector<int32_t> at(outputs * kept);  // tiles, slots, L; and so the sums
  std::vector<float> sums(outputs * kept);
  const Aligned turned(CHUNK * outputs);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Aligned copy(CHUNK * ROW);
    float* const inputs = copy.begin;
    std::vector<float> rows(L * kept);
#pragma omp for schedule(static)
    for (int64_t o = 0; o < outputs; o++)
      for (int64_t k = 0; k < kept; k++) at[(o / L * kept + k) * L + o % L] = places[o * kept + k];
    for (int64_t first = 0; first < tokens; first += CHUNK) {
      const int64_t count = std::min(CHUNK, tokens - first);
#pragma omp for schedule(static)
      for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t t = 0; t < count; t++)
          std::memcpy(turned.begin + (tile * CHUNK + t) * L, grad + (first + t) * grad_row + tile * L,
                      sizeof(float) * L);
      int64_t copied = -1;
#pragma omp for collapse(2) schedule(static)
      for (int64_t part = 0; part < parts; part++)
        for (int64_t tile = 0; tile < tiles; tile++) {
          const int64_t begin = part * G, some = std::min<int64_t>(G, GROUPS - begin);
          for (int64_t t = 0; copied != part && t < count; t++)
            std::memcpy(&inputs[t * ROW], x + (first + t) * x_row + begin * M,
                        sizeof(float) * some * M);
          copied = part;
          const int64_t here = (tile * kept + begin * KEPT) * L;
          const float* const from = turned.begin + tile * CHUNK * L;
          if (some == G) {
            picked_products<L, G, M, KEPT>(inputs, ROW, from, count, &at[here], &sums[here]);
            continue;
          }
          for (int64_t g = 0; g < some; g++)
            picked_products<L, 1, M, KEPT>(&inputs[g * M], ROW, from, count,
                                           &at[here + g * KEPT * L], &sums[here + g * KEPT * L]);
        }
    }
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++) {
      for (int64_t k = 0; k < kept; k++)
        for (int64_t l = 0; l < L; l++) rows[l * kept + k] = sums[(tile * kept + k) * L + l];
      for (int64_t k = 0; k < kept; k += MOST)
        store(tile * kept + k, std::min<int64_t>(MOST, kept - k), 0, &rows[k * L]);
    }
  }
}

}  // namespace padst
