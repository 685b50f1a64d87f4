// What every driver reads its cases with.
#include <cstdio>
#include <cstdlib>

template <typename T> static std::vector<T> take(size_t count) {
  std::vector<T> data(count);  // as long as it should be: a sanitizer sees a read behind its end
  if (std::fread(data.data(), sizeof(T), count, stdin) != count) std::exit(3);
  return data;
}

[[maybe_unused]] static constexpr int width(int n) {
  return n % 64 == 0 ? 64 : n % 48 == 0 ? 48 : n % 32 == 0 ? 32 : n % 16 == 0 ? 16 : n % 8 == 0 ? 8 : 4;
}
