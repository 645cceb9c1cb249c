// The smallest test harness that names what failed.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                \
    }                                                                              \
  } while (0)

#define CHECK_CLOSE(a, b, tolerance)                                                             \
  do {                                                                                           \
    const double a_ = (a), b_ = (b);                                                             \
    if (!(std::fabs(a_ - b_) <= (tolerance))) {                                                  \
      std::fprintf(stderr, "%s:%d: %s = %.9g, %s = %.9g\n", __FILE__, __LINE__, #a, a_, #b, b_); \
      std::exit(1);                                                                              \
    }                                                                                            \
  } while (0)

// Runs `call`, which must throw E with `part` in its text.
template <class E, class Call>
void check_throws(const char* part, const Call& call) {
  try {
    call();
  } catch (const E& error) {
    if (std::string(error.what()).find(part) != std::string::npos) return;
    std::fprintf(stderr, "threw '%s', without '%s'\n", error.what(), part);
    std::exit(1);
  }
  std::fprintf(stderr, "did not throw '%s'\n", part);
  std::exit(1);
}
