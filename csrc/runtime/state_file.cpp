#include "state_file.h"

#include <map>

#include "tlinformer/checkpoint.h"
#include "tlinformer/error.h"

namespace tlinformer {
namespace {

constexpr char kFormat[] = "tlinformer-state", kVersion[] = "1";

Json json_of(const Config& c) {
  Json json{{"vocab_size", c.vocab_size},
            {"hidden_size", c.hidden_size},
            {"num_attention_heads", c.num_attention_heads},
            {"num_key_value_heads", c.num_key_value_heads},
            {"num_blocks", c.num_blocks},
            {"block_depth", c.block_depth},
            {"history_window", c.history_window},
            {"generation_window", c.generation_window},
            {"intermediate_size", c.intermediate_size},
            {"rope_theta", c.rope_theta},
            {"layer_norm_eps", c.layer_norm_eps},
            {"history_window_coefficient", c.history_window_coefficient},
            {"variant", c.variant == Variant::tconstformer ? "tconstformer" : "tlinformer"}};
  if (c.history_window == Config::kAuto) json["history_window"] = "auto";
  return json;
}

const char* stored_name(DType dtype) {
  return dtype == DType::float32 ? "F32" : dtype == DType::bfloat16 ? "BF16" : "F16";
}

std::string text(const std::map<std::string, std::string>& metadata, const char* name) {
  const auto at = metadata.find(name);
  require(at != metadata.end(), "its metadata lack '", name, "'");
  return at->second;
}

}  // namespace

StateLayout layout_of(const StateHeader& of, int64_t most) {
  const Config& c = of.info.config;
  const int64_t row_bytes = c.kv_dim() * size_of(of.info.dtype);
  StateLayout layout;
  Json& header = layout.header;
  header["__metadata__"] = {{"format", kFormat},
                            {"version", kVersion},
                            {"config", json_of(c).dump()},
                            {"dtype", name_of(of.info.dtype)},
                            {"lengths", Json(of.info.lengths).dump()},
                            {"fingerprint", of.fingerprint},
                            {"checksum", of.checksum}};
  const auto add = [&](StateTensor tensor, const char* dtype, const Json& shape) {
    tensor.begin = layout.data_bytes;
    layout.data_bytes += tensor.bytes;
    require(layout.data_bytes <= most, "its sequences need more than the ", most,
            " bytes that it has: it was cut off, or is damaged");
    std::string name = "sequences." + std::to_string(tensor.sequence) + "." + tensor.part;
    if (tensor.block >= 0) {
      name += "." + std::to_string(tensor.block) + "." + std::to_string(tensor.layer) +
              (tensor.values ? ".values" : ".keys");
    }
    header[name] = {
        {"dtype", dtype}, {"shape", shape}, {"data_offsets", {tensor.begin, layout.data_bytes}}};
    layout.tensors.push_back(std::move(tensor));
  };
  for (size_t i = 0; i < of.info.lengths.size(); ++i) {
    const int64_t s = static_cast<int64_t>(i), length = of.info.lengths[i];
    require(length <= most / (2 * row_bytes), "a sequence of ", length, " tokens needs more than ",
            "the ", most, " bytes that it has: it was cut off, or is damaged");
    add({"tokens", s, -1, -1, false, length, 0, 4 * length}, "I32", Json::array({length}));
    add({"logits", s, -1, -1, false, 1, 0, 4 * c.vocab_size}, "F32", Json::array({c.vocab_size}));
    const auto add_rows = [&](const char* region, int64_t block, int64_t layer, int64_t rows) {
      if (rows == 0) return;
      for (bool values : {false, true}) {
        add({region, s, static_cast<int>(block), static_cast<int>(layer), values, rows, 0,
             rows * row_bytes},
            stored_name(of.info.dtype), {c.num_key_value_heads, rows, c.head_dim()});
      }
    };
    add_rows("history", 0, 0, length);  // its window lies behind it
    // Where the next token slides, that is enough: the slide makes the rest anew.
    if (length % c.generation_window == 0) continue;
    const int64_t history = c.history_at(length - 1);
    for (int64_t b = 0; b < c.num_blocks; ++b) {
      if (b > 0) add_rows("history", b, 0, history);
      for (int64_t l = 1; l < c.block_depth; ++l) {
        add_rows("context", b, l, c.compressed_rows(history));
      }
      for (int64_t l = b == 0; l < c.block_depth; ++l) add_rows("window", b, l, length - history);
    }
  }
  return layout;
}

std::string encode(const Json& header) {
  std::string json = header.dump();
  json.resize((json.size() + 7) / 8 * 8, ' ');
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(json.size() >> 8 * i & 0xff);
  return bytes + json;
}

Json read_header(const InputFile& file, int64_t& data) {
  constexpr int64_t kMost = 100'000'000;  // safetensors' own limit
  unsigned char prefix[8] = {};
  if (file.bytes() >= 8) file.read(0, prefix, 8);
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | prefix[i];
  require(length > 0 && length <= static_cast<uint64_t>(kMost) &&
              static_cast<int64_t>(length) <= file.bytes() - 8,
          "it is no saved state, or was cut off: it has ", file.bytes(), " bytes");
  std::string text(static_cast<size_t>(length), ' ');
  file.read(8, text.data(), static_cast<int64_t>(length));
  data = 8 + static_cast<int64_t>(length);
  return read_json(text.data(), text.data() + text.size(), [](const Json& json) { return json; });
}

StateHeader read_state_header(const Json& header) try {
  require(header.is_object() && header.contains("__metadata__"), "it is no saved state");
  const auto metadata = header["__metadata__"].get<std::map<std::string, std::string>>();
  require(metadata.count("format") == 1 && metadata.at("format") == kFormat,
          "it is no saved state (Engine.save_state writes such files)");
  const std::string version = text(metadata, "version");
  require(version == kVersion, "it is of version ", version, " of the format; this library reads ",
          "version ", kVersion);
  StateHeader state;
  state.info.config = config_from_json(text(metadata, "config"));
  state.info.dtype = dtype_from_name(text(metadata, "dtype"));
  state.fingerprint = text(metadata, "fingerprint");
  state.checksum = text(metadata, "checksum");
  const Json lengths = Json::parse(text(metadata, "lengths"));
  require(lengths.is_array() && !lengths.empty(), "its lengths are ", lengths.dump());
  for (const Json& length : lengths) {
    constexpr uint64_t kMost = uint64_t{1} << 40;
    require(length.is_number_unsigned() && length >= 1u && length <= kMost, "a sequence of ",
            length.dump(), " tokens; it must be 1 to ", kMost);
    state.info.lengths.push_back(length.get<int64_t>());
  }
  return state;
} catch (const Json::exception& error) {
  throw InvalidArgument(error.what());
}

StateInfo read_state_info(const std::string& path) {
  const InputFile file(path);
  try {
    int64_t data = 0;
    return read_state_header(read_header(file, data)).info;
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(path + ": " + error.what());
  }
}

void require_same(const Config& saved, const Config& own) {
  const Json theirs = json_of(saved), ours = json_of(own);
  for (const auto& [name, value] : ours.items()) {
    require(theirs[name] == value, "it was saved by a model with ", name, " = ",
            theirs[name].dump(), "; this engine's has ", value.dump());
  }
}

}  // namespace tlinformer
