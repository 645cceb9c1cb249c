// Every failure of the engine is an exception derived from Error; its text names the value, the
// limit and the way out. The engine stays usable after any of them.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace tlinformer {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct InvalidArgument : Error {  // a caller's value is outside what the call accepts
  using Error::Error;
};
struct OutOfMemory : Error {  // a plan does not fit the memory it was given
  using Error::Error;
};
struct Interrupted : Error {  // a progress callback asked to stop
  using Error::Error;
};
struct FileError : Error {  // a file is missing, or the system cannot read or write it
  using Error::Error;
};
struct NumericalError : Error {  // the model produced NaN
  using Error::Error;
};

// Text of a number or of a string. Without iostreams, which crashed where a program had loaded two
// versions of the C++ library.
template <class Part>
std::string text_of(const Part& part) {
  if constexpr (std::is_floating_point_v<Part>) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%g", static_cast<double>(part));
    return digits;
  } else if constexpr (std::is_arithmetic_v<Part>) {
    return std::to_string(part);
  } else {
    return std::string(part);
  }
}

template <class E = InvalidArgument, class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  throw E((std::string() + ... + text_of(parts)));
}

}  // namespace tlinformer
