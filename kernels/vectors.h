// Vectors of floats in the compiler's own notation: AVX-512, AVX2 and anything narrower.
#include <cstdint>
#include <cstring>
#include <memory>
#if defined(__FMA__)
#include <immintrin.h>
#endif

#define PADST_INLINE inline __attribute__((always_inline))

namespace padst {

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif

template <int N> struct Vector {
  typedef float type __attribute__((vector_size(4 * N)));
};
template <int N> using vec = typename Vector<N>::type;
template <int N> struct Words {
  typedef uint32_t type __attribute__((vector_size(4 * N)));
};
template <int N> using words = typename Words<N>::type;

// The widest vector that tiles n numbers.
constexpr int lanes(int n, int most = LANES) { return n % most == 0 ? most : lanes(n, most / 2); }

template <int N> PADST_INLINE vec<N> load(const float* p) {
  vec<N> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <int N> PADST_INLINE void store(float* p, vec<N> v) { std::memcpy(p, &v, sizeof v); }
template <int N> PADST_INLINE vec<N> all(float x) { return x - vec<N>{}; }

// a * b + c, rounded once: the compiler is told not to contract products and sums by itself.
template <typename V> PADST_INLINE V fma(V a, V b, V c) { return a * b + c; }
#if defined(__FMA__)
template <> PADST_INLINE vec<4> fma(vec<4> a, vec<4> b, vec<4> c) { return _mm_fmadd_ps(a, b, c); }
template <> PADST_INLINE vec<8> fma(vec<8> a, vec<8> b, vec<8> c) {
  return _mm256_fmadd_ps(a, b, c);
}
#endif
#if defined(__AVX512F__)
template <> PADST_INLINE vec<16> fma(vec<16> a, vec<16> b, vec<16> c) {
  return _mm512_fmadd_ps(a, b, c);
}
#endif

// What a number of x, in every lane, and weights add to sums: a product each.
struct Single {
  static constexpr int64_t TOKENS = 1;  // that are summed at once
  // Lay out `count` numbers of token t from number k on, of `tokens` that are `row` apart.
  static PADST_INLINE void lay_out(const float* x, int64_t row, int64_t, int64_t t, int64_t k,
                                   int64_t count, float* to) {
    std::memcpy(to, x + t * row + k, sizeof(float) * count);
  }
  template <int L> static PADST_INLINE vec<L> add(vec<L> x, vec<L> weights, vec<L> sums) {
    return fma(x, weights, sums);
  }
};

// The same where two numbers of bf16 lie in the place of a float: both products.
struct Pairs {
  static constexpr int64_t TOKENS = 2;
  // A pair is a number of two tokens; zeros stand for one that is not there.
  static PADST_INLINE void lay_out(const uint16_t* x, int64_t row, int64_t tokens, int64_t t, int64_t k,
                                   int64_t count, float* to) {
    const uint16_t* const from = x + 2 * t * row + k;
    if (2 * t + 1 < tokens) return zip(from, from + row, count, to);
    for (int64_t n = 0; n < count; n++) put(from[n], to + n);
  }
  // Pairs of the numbers of two rows.
  static PADST_INLINE void zip(const uint16_t* first, const uint16_t* second, int64_t count,
                               float* to) {
    for (int64_t n = 0; n < count; n++) put(first[n] | (uint32_t)second[n] << 16, to + n);
  }
  template <int L> static PADST_INLINE vec<L> add(vec<L> x, vec<L> weights, vec<L> sums) {
#if defined(__AVX512BF16__)
    if constexpr (L == 16) return _mm512_dpbf16_ps(sums, (__m512bh)x, (__m512bh)weights);
#endif
    return fma(second<L>(x), second<L>(weights), fma(first<L>(x), first<L>(weights), sums));
  }

 private:
  static PADST_INLINE void put(uint32_t pair, float* to) { std::memcpy(to, &pair, sizeof pair); }
  template <int L> static PADST_INLINE vec<L> first(vec<L> pair) {
    return (vec<L>)((words<L>)pair << 16);
  }
  template <int L> static PADST_INLINE vec<L> second(vec<L> pair) {
    return (vec<L>)((words<L>)pair & 0xffff0000u);
  }
};

// Memory for so many floats, from the begin of a line of the cache on.
class Aligned {
 public:
  explicit Aligned(int64_t count)
      : memory_(count ? new float[count + 16] : nullptr),
        begin((float*)(((uintptr_t)memory_.get() + 63) / 64 * 64)) {}

 private:
  std::unique_ptr<float[]> memory_;

 public:
  float* const begin;
};

}  // namespace padst
