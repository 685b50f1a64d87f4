// N:M and fan-in: every output picks some of a group of inputs. Up to two vectors of inputs are
// picked from in registers, sixteen outputs at once; larger groups are gathered from.
namespace padst {

template <int N> struct Integers {
  typedef int32_t type __attribute__((vector_size(4 * N)));
};
template <int N> using ints = typename Integers<N>::type;

// Where every lane finds its input within the group.
template <int L, typename I> PADST_INLINE ints<L> picks(const I* p) {
  ints<L> v;
#pragma GCC unroll 16
  for (int l = 0; l < L; l++) v[l] = p[l];
  return v;
}
#if defined(__AVX512F__)
template <> PADST_INLINE ints<16> picks<16, uint8_t>(const uint8_t* p) {
  return (ints<16>)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
}
template <> PADST_INLINE ints<16> picks<16, int32_t>(const int32_t* p) {
  return (ints<16>)_mm512_loadu_si512(p);
}
#endif

// In how many vectors a group of M inputs lies, if they are few enough to pick from in registers.
constexpr int vectors_of(int m, int l) {
#if defined(__AVX512F__)
  return l == 16 ? m <= 16 ? 1 : m <= 32 ? 2 : 0 : 0;
#else
  return 0;
#endif
}

// The inputs that lanes pick from those at p, where VECTORS of them may be read.
template <int L, int VECTORS> PADST_INLINE vec<L> pick(const float* p, ints<L> at) {
#if defined(__AVX512F__)
  if constexpr (L == 16 && VECTORS == 1)
    return _mm512_permutexvar_ps((__m512i)at, load<16>(p));
  else if constexpr (L == 16 && VECTORS == 2)
    return _mm512_permutex2var_ps(load<16>(p), (__m512i)at, load<16>(p + 16));
  else if constexpr (L == 16)
    return _mm512_i32gather_ps((__m512i)at, p, 4);
  else
#endif
  {
    vec<L> v;
#pragma GCC unroll 16
    for (int l = 0; l < L; l++) v[l] = p[at[l]];
    return v;
  }
}

// out[r][n] = sum over slots k of w[k * N + n] * x[r * ROW + k / KEPT * M + at[k * N + n]].
template <int R, int N, int M, int KEPT, int64_t ROW, typename I>
PADST_INLINE void picked(const float* x, const float* w, const I* at, int64_t groups, float* out) {
  constexpr int L = lanes(N), V = N / L, VECTORS = vectors_of(M, L);
  vec<L> sums[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sums[r][v] = vec<L>{};
  for (int64_t g = 0; g < groups; g++, x += M)
    for (int s = 0; s < KEPT; s++, w += N, at += N)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        const vec<L> weights = load<L>(w + v * L);
        const ints<L> places = picks<L>(at + v * L);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
          sums[r][v] = fma(weights, pick<L, VECTORS>(x + r * ROW, places), sums[r][v]);
      }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store<L>(out + r * N + v * L, sums[r][v]);
}

// Every sum of picked inputs, N outputs at once: weights and places are (outputs / N, slots, N), which
// streams; rows of all outputs would lie pages apart.
template <int N, int M, int KEPT, int64_t INPUTS, Read READ, bool MOVED, typename I, typename Store>
PADST_INLINE void picked_sums(const float* x, int64_t row, int64_t tokens, int64_t features,
                              const int64_t* in_map, const float* w, const I* at, int64_t outputs,
                              const int64_t* out_map, int threads, const Store& store) {
  static_assert(READ != Read::HERE, "vectors reach behind the last group");
  constexpr int R = tokens_of(N) < 8 ? tokens_of(N) : 8, H = R > 2 ? R / 2 : 1;
  constexpr int64_t BEHIND = 32, ROW = INPUTS + BEHIND, groups = INPUTS / M;
  const auto tile = [&](const float* from, int64_t, int64_t step, int64_t left, float* out)
      __attribute__((always_inline)) {
    const float* const ws = w + step * groups * KEPT * N;
    const I* const here = at + step * groups * KEPT * N;
    if (left >= R)
      return picked<R, N, M, KEPT, ROW>(from, ws, here, groups, out), R;
    if (left >= H)
      return picked<H, N, M, KEPT, ROW>(from, ws, here, groups, out), H;
    return picked<1, N, M, KEPT, ROW>(from, ws, here, groups, out), 1;
  };
  all_sums<N, 8, READ, MOVED>(x, row, tokens, features, INPUTS, in_map, {0, BEHIND, false},
                              outputs / N, out_map, threads, tile, store);
}

}  // namespace padst
