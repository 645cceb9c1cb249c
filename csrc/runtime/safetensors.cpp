#include "safetensors.h"

#include <limits>

#include "json.h"

namespace tlinformer {
namespace {

constexpr int64_t kMostHeader = 100'000'000;  // the format's own limit

int64_t natural(const Json& value, const char* what) {
  constexpr uint64_t kMost = std::numeric_limits<int64_t>::max();
  require(value.is_number_unsigned() && value.get<uint64_t>() <= kMost, what, " ", value.dump(),
          " is no natural number");
  return static_cast<int64_t>(value.get<uint64_t>());
}

DType dtype_of(const std::string& name) {
  if (name == "F32") return DType::float32;
  if (name == "BF16") return DType::bfloat16;
  require(name == "F16", "its dtype is ", name, "; weights are F32, BF16 or F16");
  return DType::float16;
}

// The bytes of a tensor; `left` is how many the file has, so that no product overflows.
int64_t bytes_of(const StoredTensor& tensor, int64_t left) {
  int64_t bytes = size_of(tensor.dtype);
  for (int64_t size : tensor.shape) {
    if (size == 0) return 0;
    require(bytes <= left / size, "its shape holds more than the ", left, " bytes of the file");
    bytes *= size;
  }
  return bytes;
}

StoredTensor read_tensor(const Json& entry, const char* data, int64_t bytes) {
  StoredTensor tensor;
  tensor.dtype = dtype_of(entry.at("dtype").get<std::string>());
  for (const Json& size : entry.at("shape")) tensor.shape.push_back(natural(size, "its size"));
  const Json& offsets = entry.at("data_offsets");
  const int64_t begin = natural(offsets.at(0), "its offset");
  const int64_t end = natural(offsets.at(1), "its offset");
  require(begin <= end && end <= bytes, "its bytes ", begin, " to ", end, " are outside the ",
          bytes, " of the file");
  const int64_t wanted = bytes_of(tensor, bytes);
  require(end - begin == wanted, "it has ", end - begin, " bytes; its shape needs ", wanted);
  tensor.data = data + begin;
  tensor.elements = wanted / size_of(tensor.dtype);
  return tensor;
}

}  // namespace

Safetensors read_safetensors(const char* data, int64_t bytes) {
  require(bytes >= 8, "the file has ", bytes, " bytes, too few for a safetensors header");
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<unsigned char>(data[i]);
  require(length <= static_cast<uint64_t>(kMostHeader) && static_cast<int64_t>(length) <= bytes - 8,
          "its header claims ", length, " bytes; the file has ", bytes, " and the limit is ",
          kMostHeader);
  const char* rest = data + 8 + length;
  const int64_t left = bytes - 8 - static_cast<int64_t>(length);
  return read_json(data + 8, rest, [&](const Json& header) {
    require(header.is_object(), "its header is no JSON object");
    Safetensors file;
    for (const auto& [name, entry] : header.items()) {
      if (name == "__metadata__") {
        file.architecture = entry.value("architecture", "");
        continue;
      }
      try {
        file.tensors[name] = read_tensor(entry, rest, left);
      } catch (const std::runtime_error& error) {
        throw InvalidArgument("tensor " + name + ": " + error.what());
      } catch (const Json::exception& error) {
        throw InvalidArgument("tensor " + name + ": " + error.what());
      }
    }
    return file;
  });
}

std::map<std::string, std::string> read_index(const char* begin, const char* end) {
  return read_json(begin, end, [](const Json& index) {
    std::map<std::string, std::string> files;
    for (const auto& [tensor, name] : index.at("weight_map").items()) {
      const std::string file = name.get<std::string>();
      require(!file.empty() && file.find('/') == std::string::npos, "the file '", file,
              "' of tensor ", tensor, " is no name inside the directory");
      files[tensor] = file;
    }
    return files;
  });
}

}  // namespace tlinformer
