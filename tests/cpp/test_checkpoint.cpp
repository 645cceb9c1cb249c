// Model directories: one file or shards, every dtype, unaligned files, and what is refused.
#include <stdlib.h>
#include <sys/stat.h>

#include <cmath>
#include <cstring>
#include <map>

#include "check.h"
#include "runtime/convert.h"
#include "tlinformer/checkpoint.h"
#include "tlinformer/error.h"

using namespace tlinformer;

namespace {

const char kConfig[] = R"({"vocab_size": 5, "hidden_size": 4, "num_attention_heads": 2,
  "num_key_value_heads": 1, "num_blocks": 1, "block_depth": 2, "history_window": "auto",
  "intermediate_size": 3, "variant": "tconstformer", "dropout": 0.1})";

using Tensors = std::map<std::string, std::vector<int64_t>>;

Tensors all_tensors() {
  Tensors tensors;
  make_weights(config_from_json(kConfig), DType::float32,
               [&](const std::string& name, const std::vector<int64_t>& shape) {
                 tensors[name] = shape;
                 return nullptr;
               });
  return tensors;
}

float value_of(const std::string& name, int64_t i) {
  return float(int64_t(name.size()) + i) / 64;  // exact in every dtype
}

// A file of these tensors; `pad` spaces behind the header move what follows.
std::string file_of(const Tensors& tensors, DType dtype, int pad = 0) {
  const char* names[] = {"F32", "BF16", "F16"};
  std::string header, data;
  for (const auto& [name, shape] : tensors) {
    std::string sizes;
    int64_t count = 1;
    for (int64_t size : shape) {
      sizes += (sizes.empty() ? "" : ",") + std::to_string(size);
      count *= size;
    }
    const size_t begin = data.size(), step = size_t(size_of(dtype));
    data.resize(begin + size_t(count) * step);
    for (int64_t i = 0; i < count; ++i) {
      store(dtype, value_of(name, i), &data[begin + size_t(i) * step]);
    }
    header += (header.empty() ? "{\"" : ",\"") + name + "\":{\"dtype\":\"" +
              names[static_cast<int>(dtype)] + "\",\"shape\":[" + sizes + "],\"data_offsets\":[" +
              std::to_string(begin) + "," + std::to_string(data.size()) + "]}";
  }
  header += "}" + std::string(size_t(pad), ' ');
  std::string file(8, '\0');
  const uint64_t length = header.size();
  std::memcpy(&file[0], &length, 8);
  return file + header + data;
}

struct Folder {
  std::string path = "/tmp/tlinformer-test-XXXXXX";
  Folder() { CHECK(mkdtemp(&path[0])); }
  ~Folder() {
    for (const auto& name : names) std::remove((path + "/" + name).c_str());
    std::remove(path.c_str());
  }
  std::vector<std::string> names;
  void write(const std::string& name, const std::string& text) {
    names.push_back(name);
    FILE* file = std::fopen((path + "/" + name).c_str(), "wb");
    CHECK(file && std::fwrite(text.data(), 1, text.size(), file) == text.size());
    std::fclose(file);
  }
};

void check_values(Checkpoint& checkpoint, DType dtype) {
  const Weights weights = checkpoint.weights(dtype);
  CHECK(weights.dtype == dtype && weights.layers.size() == 2);
  const auto check = [&](const std::string& name, const void* at, int64_t count) {
    CHECK(reinterpret_cast<uintptr_t>(at) % size_t(size_of(dtype)) == 0);
    const char* bytes = static_cast<const char*>(at);
    for (int64_t i = 0; i < count; ++i) {
      CHECK(load(dtype, bytes + i * size_of(dtype)) == value_of(name, i));
    }
  };
  check("embed_tokens.weight", weights.embed_tokens, 20);
  check("norm.bias", weights.norm_bias, 4);
  check("blocks.0.layers.1.qkv_proj.weight", weights.layers[1].qkv_proj_weight, 32);
  check("blocks.0.layers.0.down_proj.weight", weights.layers[0].down_proj_weight, 12);
}

void test_reads(DType saved, int pad) {
  Folder folder;
  folder.write("config.json", kConfig);
  folder.write("model.safetensors", file_of(all_tensors(), saved, pad));
  Checkpoint checkpoint(folder.path);
  CHECK(checkpoint.dtype() == saved);
  CHECK(checkpoint.config().history_window == Config::kAuto);
  CHECK(checkpoint.config().variant == Variant::tconstformer);
  const int64_t layer = 4 * 4 + 8 * 4 + 8 + 4 * 4 + 4 + 3 * 12;
  CHECK(checkpoint.parameters() == 5 * 4 + 2 * 4 + 2 * layer);
  for (DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    check_values(checkpoint, dtype);
  }
}

void test_shards() {
  Folder folder;
  folder.write("config.json", kConfig);
  Tensors first = all_tensors(), second;
  std::string index;
  for (auto at = first.begin(); at != first.end();) {
    const bool moved = index.size() % 2 == 0;
    index += (index.empty() ? "\"" : ",\"") + at->first + "\":\"" + (moved ? "b" : "a") + "\"";
    if (moved) second.insert(*at);
    at = moved ? first.erase(at) : std::next(at);
  }
  index = "{\"metadata\":{},\"weight_map\":{" + index + "}}";
  folder.write("model.safetensors.index.json", index);
  folder.write("a", file_of(first, DType::bfloat16));
  check_throws<FileError>("/b: No such file", [&] { Checkpoint{folder.path}; });
  folder.write("b", file_of(second, DType::bfloat16));
  Checkpoint checkpoint(folder.path);
  check_values(checkpoint, DType::bfloat16);
  second.erase(second.begin());
  folder.write("b", file_of(second, DType::bfloat16));
  check_throws<InvalidArgument>("missing from this shard", [&] { Checkpoint{folder.path}; });
  index.replace(index.find(":\"b\""), 4, ":\"../b\"");
  folder.write("model.safetensors.index.json", index);
  check_throws<InvalidArgument>("no name inside", [&] { Checkpoint{folder.path}; });
}

void test_refusals() {
  Folder folder;
  check_throws<FileError>("config.json: No such file", [&] { Checkpoint{folder.path}; });
  folder.write("config.json", kConfig);
  check_throws<FileError>("model.safetensors: No such", [&] { Checkpoint{folder.path}; });
  const std::string good = file_of(all_tensors(), DType::float32);
  const auto refused = [&](const char* words, const std::string& file) {
    folder.write("model.safetensors", file);
    check_throws<InvalidArgument>(words, [&] { Checkpoint{folder.path}; });
  };
  const auto changed = [&](const std::string& from, const std::string& to) {
    std::string file = good;
    file.replace(file.find(from), from.size(), to);
    uint64_t length;
    std::memcpy(&length, &file[0], 8);
    length += to.size() - from.size();
    std::memcpy(&file[0], &length, 8);
    return file;
  };
  refused("too few for a safetensors header", "");
  refused("header claims 72057594037927935", std::string(7, '\xff') + std::string(30, '\0'));
  refused("outside the", good.substr(0, good.size() - 1));
  refused("parse error", changed("{", "["));
  refused("its dtype is I32", changed("F32", "I32"));
  refused("tensor norm.bias is missing", changed("\"norm.bias", "\"norm.bia_"));
  refused("its shape needs", changed("[5,4]", "[4,4]"));
  refused("config.json asks for (5, 4)", changed("[5,4]", "[4,5]"));
  refused("more than the", changed("[5,4]", "[9999999999,9999999999]"));
  refused("no natural number", changed("[5,4]", "[-5,4]"));
  Tensors more = all_tensors();
  more["surplus"] = {1};
  refused("surplus is unknown", file_of(more, DType::float32));
}

void test_config() {
  const auto refused = [&](const char* words, const std::string& text) {
    check_throws<InvalidArgument>(words, [&] { config_from_json(text); });
  };
  const std::string sizes = R"("vocab_size": 9, "hidden_size": 8, "num_attention_heads": 2)";
  const Config c = config_from_json("{" + sizes + R"(, "intermediate_size": null})");
  CHECK(c.num_key_value_heads == 2 && c.intermediate_size == 256 && c.history_window == 256);
  refused("parse error", "{");
  refused("no JSON object", "[1]");
  refused("vocab_size is missing", "{}");
  refused("unknown config fields {\"wide\":1}", "{" + sizes + R"(, "wide": 1})");
  refused("num_blocks is 1.5; it must be an integer", "{" + sizes + R"(, "num_blocks": 1.5})");
  refused("variant is 'x'", "{" + sizes + R"(, "variant": "x"})");
  refused("history_window = 0", "{" + sizes + R"(, "history_window": 0})");
  refused("block_depth = 1", "{" + sizes + R"(, "block_depth": 1})");
}

// Halves survive the way through float32, and what lies between two of them goes to the nearer.
void test_halves() {
  for (uint32_t half = 0; half < 0x7c00; ++half) {
    const uint16_t bits = static_cast<uint16_t>(half);
    const float value = float_of_half(bits), next = float_of_half(static_cast<uint16_t>(half + 1));
    CHECK(half_of(value) == bits && half_of(-value) == (bits | 0x8000));
    if (half == 0x7bff) break;
    const float middle = value + (next - value) / 2;
    CHECK(half_of(middle) == (half + (half & 1)));
    CHECK(half_of(std::nextafter(middle, value)) == half);
    CHECK(half_of(std::nextafter(middle, next)) == half + 1);
  }
  CHECK(half_of(65519) == 0x7bff && half_of(65520) == 0x7c00 && std::isinf(float_of_half(0x7c00)));
  CHECK(std::isnan(float_of_half(half_of(NAN))));
  CHECK(bfloat16_of(float_of(0x3f808000)) == 0x3f80 && bfloat16_of(float_of(0x3f818000)) == 0x3f82);
}

}  // namespace

int main() {
  for (DType saved : {DType::float32, DType::bfloat16, DType::float16}) {
    for (int pad = 0; pad < 4; ++pad) test_reads(saved, pad);
  }
  test_shards();
  test_refusals();
  test_config();
  test_halves();
}
