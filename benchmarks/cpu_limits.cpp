// What one thread of this CPU can do at most with AVX-512: the limits that kernels are judged by.
//   g++ -O2 -march=native benchmarks/cpu_limits.cpp -o limits && ./limits
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <initializer_list>

static double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Sixteen sums that do not wait for one another: GCC's own loops spill some of them.
#define SUMS(ONE) ONE(0) ONE(1) ONE(2) ONE(3) ONE(4) ONE(5) ONE(6) ONE(7) ONE(8) ONE(9) ONE(10) \
  ONE(11) ONE(12) ONE(13) ONE(14) ONE(15)
#define REGISTER(I) "vfmadd231ps %%zmm30, %%zmm31, %%zmm" #I "\n"
#define LOAD(I) "vfmadd231ps 64*" #I "(%0), %%zmm31, %%zmm" #I "\n"
#define BROADCAST(I) "vfmadd231ps 4*" #I "(%0)%{1to16%}, %%zmm31, %%zmm" #I "\n"
#define STORE(I) "vmovaps %%zmm31, 64*" #I "(%0)\n"
#define STREAM(I) "vmovntps %%zmm31, 64*" #I "(%0)\n"
#define CHANGED "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", \
  "zmm10", "zmm11", "zmm12", "zmm13", "zmm14", "zmm15"
constexpr double FLOPS = 16 * 32;  // of sixteen products and sums

template <typename Run>
static void report(const char* what, double times, const Run& run, const char* unit = "GF/s") {
  double best = 1e9;
  for (int round = 0; round < 15; round++) {
    const double start = now();
    run();
    best = std::min(best, now() - start);
  }
  const double each = *unit == 'G' && unit[1] == 'F' ? FLOPS : 16 * 64.0;  // or bytes
  std::printf("%-44s %6.1f %s\n", what, 1e-9 * times * each / best, unit);
}

int main() {
  constexpr long MOST = 5L << 20;  // floats
  float* const memory = (float*)std::aligned_alloc(4096, sizeof(float) * MOST);
  std::fill_n(memory, MOST, 1.0f);
  constexpr long TIMES = 2'000'000;
  report("operands in registers", TIMES, [] {
    for (long k = 0; k < TIMES; k++) asm volatile(SUMS(REGISTER)::: CHANGED);
  });
  report("one operand broadcast from the L1 cache", TIMES, [=] {
    for (long k = 0; k < TIMES; k++) asm volatile(SUMS(BROADCAST)::"r"(memory) : CHANGED);
  });
  for (const long kilobytes : {16L, 256L, 768L, 4096L, 16384L})
    for (const long shift : {0L, 1L}) {
      const long steps = kilobytes - shift, rounds = std::max(4L, (1L << 17) / kilobytes);
      char what[80];
      std::snprintf(what, sizeof what, "a vector of %ld KB a product%s", kilobytes,
                    shift ? ", across lines" : "");
      report(what, (double)(rounds * steps), [=] {
        for (long r = 0; r < rounds; r++)
          for (long k = 0; k < steps; k++)
            asm volatile(SUMS(LOAD)::"r"(memory + shift + 256 * k) : CHANGED);
      });
    }
  for (const long kilobytes : {512L, 2364L, 18912L}) {  // the last: 197 and 1576 rows of 3072
    const long rounds = std::max(4L, (1L << 15) / kilobytes);
    char what[80];
    const auto writes = [&](const char* how, auto write) {
      std::snprintf(what, sizeof what, "%s %ld KB again and again", how, kilobytes);
      report(what, (double)(rounds * kilobytes), [&] {
        for (long r = 0; r < rounds; r++)
          for (long k = 0; k < kilobytes; k++) write(memory + 256 * k);
      }, "GB/s");
    };
    writes("writing", [](float* to) { asm volatile(SUMS(STORE)::"r"(to) : "memory"); });
    writes("streaming", [](float* to) { asm volatile(SUMS(STREAM)::"r"(to) : "memory"); });
  }
  std::free(memory);
}
