// JSON text to values. The header is nlohmann's, as published (version 3.11.2, MIT licence).
#pragma once

#include <string>

#define JSON_NO_IO  // no iostreams in this library: see error.h
#include "../third_party/nlohmann/json.hpp"
#include "tlinformer/error.h"

namespace tlinformer {

using Json = nlohmann::json;

// Runs `read` on the value of a JSON text; whatever is wrong with it becomes InvalidArgument.
template <class Read>
auto read_json(const char* begin, const char* end, const Read& read) {
  try {
    return read(Json::parse(begin, end));
  } catch (const Json::exception& error) {
    throw InvalidArgument(error.what());
  }
}

}  // namespace tlinformer
