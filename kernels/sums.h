// The loop around every kernel of sums: chunks of tokens, a copy of them, steps of outputs, maps.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace padst {

// What a chunk of x is read from: itself, or a copy of it.
enum class Read {
  HERE,
  APART,         // a copy with other strides, or with something around every row
  THROUGH,       // feature k is feature in_map[k] of x
  PAIRS_THROUGH  // of numbers of 16 bits, two in the place of a float
};

inline void check_map(const int64_t* map, int64_t size, int64_t features) {
  for (int64_t k = 0; k < size; k++)
    if (map[k] < 0 || map[k] >= features)
      throw std::out_of_range("Expected a map to features below " + std::to_string(features) +
                              ". Got " + std::to_string(map[k]) + ". Give one of the layer's width.");
}

// What stands around a copied row: so many zeros before it, so many zeros or wrapped inputs after.
struct Around {
  int64_t before, after;
  bool wraps;
};

constexpr int MOST = 16;  // rows of a tile

// How many tokens have room for their sums of n outputs beside one row of weights.
constexpr int tokens_of(int n) {
  const int vectors = n / lanes(n), most = (REGISTERS - vectors - 1) / vectors;
  return most > MOST ? MOST : most < 1 ? 1 : most;
}

// Store all sums of x (tokens, inputs), N outputs at a time, `steps` times N in all. A tile does
//   done = tile(from, width, at, left, out)
// : some of the `left` rows at `from`, `width` apart, for outputs at * N and on, into out (MOST, N).
// With an out_map output n is sum out_map[n]: a thread does all sums of a chunk before it stores any.
template <int N, int CHUNK, Read READ, bool MOVED, typename Tile, typename Store>
PADST_INLINE void all_sums(const float* x, int64_t row, int64_t tokens, int64_t features,
                           int64_t inputs, const int64_t* in_map, Around around, int64_t steps,
                           const int64_t* out_map, int threads, const Tile& tile_at,
                           const Store& store) {
  constexpr bool COPIED = READ != Read::HERE;
  constexpr int L = CHUNK < LANES ? lanes(CHUNK) : LANES;  // tokens that go through a map together
  constexpr int ROOM = (CHUNK + L - 1) / L * L;
  const int64_t outputs = steps * N, chunks = (tokens + CHUNK - 1) / CHUNK;
  const int64_t width = COPIED ? around.before + inputs + around.after : row;
  // Steps that a thread does together: few where there are few chunks, so that all have work.
  const int64_t wanted = threads > 1 && !MOVED ? steps * chunks / (4 * threads) : steps;
  const int64_t share = std::max<int64_t>(1, std::min(steps, wanted));
  const int64_t turned = std::max(READ >= Read::THROUGH ? features : 0, MOVED ? outputs : 0);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    alignas(64) float tile[MOST * N];
    const Aligned copy(COPIED ? ROOM * width : 0), sums(MOVED ? CHUNK * outputs : 0);
    const Aligned lines(L * turned);
    int64_t copied = -1;
#pragma omp for collapse(2) schedule(static)
    for (int64_t begin = 0; begin < steps; begin += share)
      for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t first = chunk * CHUNK, last = std::min(tokens, first + CHUNK);
        for (int64_t t = first; COPIED && copied != chunk && t < last; t++) {
          float* to = copy.begin + (t - first) * width;
          std::memset(to, 0, sizeof(float) * around.before);
          to += around.before;
          if (READ == Read::APART) std::memcpy(to, x + t * row, sizeof(float) * inputs);
          if (READ == Read::THROUGH && (t - first) % L == 0)
            through<L>(x + t * row, row, last - t, features, in_map, inputs, lines.begin, to, width);
          if (READ == Read::PAIRS_THROUGH && (t - first) % L == 0)
            pairs_through<L>(x + t * row, row, last - t, features, in_map, inputs, lines.begin, to,
                             width);
          if (around.wraps)
            for (int64_t k = 0; k < around.after; k++) to[inputs + k] = to[k % inputs];
          else
            std::memset(to + inputs, 0, sizeof(float) * around.after);
        }
        copied = chunk;
        const float* from = COPIED ? copy.begin : x + first * row;
        for (int64_t at = begin; at < std::min(steps, begin + share); at++)
          for (int64_t t = first, done; t < last; t += done) {
            done = tile_at(from + (t - first) * width, width, at, last - t, tile);
            if (!MOVED) store(t, done, at * N, tile);
            for (int64_t r = 0; MOVED && r < done; r++)
              std::memcpy(sums.begin + (t - first + r) * outputs + at * N, tile + r * N,
                          sizeof(float) * N);
          }
        for (int64_t t = first; MOVED && t < last; t += L) {
          const float* const made = sums.begin + (t - first) * outputs;
          const int64_t count = std::min<int64_t>(L, last - t);
          const bool few = 2 * count <= L;
          if (!few) to_lines<L>(made, outputs, count, outputs, L, lines.begin);
          for (int64_t n = 0; n < outputs; n += N) {
            if (!few) from_lines<L>(lines.begin, L, out_map + n, N, tile, N);
            for (int64_t r = 0; few && r < count; r++)
              for (int64_t v = 0; v < N; v++) tile[r * N + v] = made[r * outputs + out_map[n + v]];
            store(t, count, n, tile);
          }
        }
      }
  }
}

}  // namespace padst
