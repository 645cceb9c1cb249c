// Every failure of the engine is an exception derived from Error; its text names the value, the
// limit and the way out. The engine stays usable after any of them.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

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
struct NumericalError : Error {  // the model produced NaN
  using Error::Error;
};

template <class E = InvalidArgument, class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << parts);
  throw E(text.str());
}

}  // namespace tlinformer
