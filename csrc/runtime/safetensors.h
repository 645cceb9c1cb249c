// The file format safetensors: 8 bytes with the header's length (little endian), the header, which
// is JSON, then the tensors' bytes.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "tlinformer/config.h"

namespace tlinformer {

struct StoredTensor {
  DType dtype = DType::float32;
  std::vector<int64_t> shape;
  const char* data = nullptr;  // row-major, little endian, not aligned
  int64_t elements = 0;
};

struct Safetensors {
  std::map<std::string, StoredTensor> tensors;
  std::string architecture;  // of the file's metadata; empty where it says nothing
};

// The tensors in a file's memory, all inside [data, data + bytes). Throws InvalidArgument.
Safetensors read_safetensors(const char* data, int64_t bytes);

// The file that holds each tensor, from the text of model.safetensors.index.json; plain file names.
std::map<std::string, std::string> read_index(const char* begin, const char* end);

}  // namespace tlinformer
