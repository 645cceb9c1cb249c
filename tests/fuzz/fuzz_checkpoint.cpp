// libFuzzer's target: any bytes as a model directory either open as a model whose every number can
// be read, or are refused with an Error. An input is a mode, then a config and an index, each
// after two bytes with its length, then the file of weights, which is read as a saved state, too.
// `make fuzz` builds and runs it.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "runtime/safetensors.h"
#include "runtime/state_file.h"
#include "tlinformer/checkpoint.h"
#include "tlinformer/error.h"

using namespace tlinformer;

namespace {

struct Input {
  const char* at;
  const char* end;
  std::string take(size_t most) {
    const size_t length = std::min(most, static_cast<size_t>(end - at));
    at += length;
    return {at - length, at};
  }
  std::string section() {
    const std::string length = take(2);
    if (length.size() < 2) return {};
    return take(static_cast<unsigned char>(length[0]) | static_cast<unsigned char>(length[1]) << 8);
  }
};

void write(const std::string& path, const std::string& text) {
  FILE* file = std::fopen(path.c_str(), "wb");
  if (!file || std::fwrite(text.data(), 1, text.size(), file) != text.size()) std::abort();
  std::fclose(file);
}

std::string new_folder() {
  char name[] = "/dev/shm/tlinformer-fuzz-XXXXXX";
  if (!mkdtemp(name)) std::abort();
  return name;
}

// Looks at every byte, so that AddressSanitizer sees where the pointers lead.
void read(const Config& c, const Weights& weights) {
  static volatile char sink;
  const auto touch = [&](const void* data, int64_t n) {
    const char* bytes = static_cast<const char*>(data);
    for (int64_t i = 0; i < n * size_of(weights.dtype); ++i) sink = bytes[i];
  };
  touch(weights.embed_tokens, c.vocab_size * c.hidden_size);
  touch(weights.norm_bias, c.hidden_size);
  for (const LayerWeights& layer : weights.layers) {
    touch(layer.qkv_proj_weight, (c.query_dim() + 2 * c.kv_dim()) * c.hidden_size);
    touch(layer.down_proj_weight, c.intermediate_size * c.hidden_size);
    touch(layer.mlp_norm_bias, c.hidden_size);
  }
}

template <class Call>
void refused_or_fine(const Call& call) {
  try {
    call();
  } catch (const Error&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::string folder = new_folder();
  const std::string single = folder + "/model.safetensors";
  Input input{reinterpret_cast<const char*>(data), reinterpret_cast<const char*>(data) + size};
  const std::string mode = input.take(1);
  const std::string config = input.section(), index = input.section();
  const std::string weights = input.take(size);
  // Copies on the heap, whose ends AddressSanitizer guards, as it does not guard a file's.
  refused_or_fine([&] { config_from_json(config); });
  refused_or_fine([&] { read_index(index.data(), index.data() + index.size()); });
  refused_or_fine([&] {
    static volatile char sink;
    const std::vector<char> exact(weights.begin(), weights.end());
    const Safetensors file = read_safetensors(exact.data(), static_cast<int64_t>(exact.size()));
    for (const auto& [name, tensor] : file.tensors) {
      for (int64_t i = 0; i < tensor.elements * size_of(tensor.dtype); ++i) sink = tensor.data[i];
    }
  });
  const bool sharded = !mode.empty() && (mode[0] & 1);
  write(folder + "/config.json", config);
  write(folder + "/model.safetensors.index.json", index);
  write(sharded ? folder + "/shard" : single, weights);
  refused_or_fine([&] {
    const InputFile file(sharded ? folder + "/shard" : single);
    int64_t data = 0;
    const StateHeader header = read_state_header(read_header(file, data));
    layout_of(header, file.bytes() - data);
  });
  if (sharded) unlink(single.c_str());
  refused_or_fine([&] {
    Checkpoint checkpoint(folder);
    for (DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
      read(checkpoint.config(), checkpoint.weights(dtype));
    }
  });
  return 0;
}
