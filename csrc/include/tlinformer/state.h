// What a file of saved sequences holds; Engine::save_state writes such files.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tlinformer/config.h"

namespace tlinformer {

struct StateInfo {
  Config config;                 // of the model that the sequences went through
  DType dtype = DType::float32;  // of its cache
  std::vector<int64_t> lengths;  // tokens of each sequence
};

// Reads the file's header alone. Throws FileError where the file cannot be read, and
// InvalidArgument for a file that is no saved state or one of another version of the format.
StateInfo read_state_info(const std::string& path);

}  // namespace tlinformer
