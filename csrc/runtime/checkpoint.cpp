#include "tlinformer/checkpoint.h"

#include <unistd.h>

#include <set>

#include "convert.h"
#include "json.h"
#include "mapped_file.h"
#include "safetensors.h"

namespace tlinformer {
namespace {

// Adds the file's name to what is wrong with its contents.
template <class Read>
auto in_file(const std::string& path, const Read& read) {
  try {
    return read();
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(path + ": " + error.what());
  }
}

// Takes the fields of a config out of a JSON object one by one; those left over are unknown.
struct Fields {
  Json values;

  // Sets `to` if the field is there; null leaves the default as it does in Python.
  bool take(const char* name, int64_t& to) {
    return take_if(name, "an integer", &Json::is_number_integer, to);
  }
  bool take(const char* name, double& to) {
    return take_if(name, "a number", &Json::is_number, to);
  }
  bool take(const char* name, std::string& to) {
    return take_if(name, "a string", &Json::is_string, to);
  }

  template <class T>
  bool take_if(const char* name, const char* kind, bool (Json::*is)() const noexcept, T& to) {
    const auto at = values.find(name);
    if (at == values.end()) return false;
    const Json value = *at;
    values.erase(at);
    if (value.is_null()) return false;
    require((value.*is)(), name, " is ", value.dump(), "; it must be ", kind);
    to = value.get<T>();
    return true;
  }
};

Config read_config(const Json& values) {
  require(values.is_object(), "the config is no JSON object");
  Config c;
  Fields fields{values};
  for (auto [name, field] : {std::pair{"vocab_size", &c.vocab_size},
                             {"hidden_size", &c.hidden_size},
                             {"num_attention_heads", &c.num_attention_heads}}) {
    require(fields.take(name, *field), "the field ", name, " is missing");
  }
  c.num_key_value_heads = c.num_attention_heads;
  fields.take("num_key_value_heads", c.num_key_value_heads);
  fields.take("num_blocks", c.num_blocks);
  fields.take("block_depth", c.block_depth);
  fields.take("generation_window", c.generation_window);
  if (!fields.take("intermediate_size", c.intermediate_size)) {
    require(c.hidden_size > 0 && c.hidden_size < int64_t{1} << 31, "hidden_size = ", c.hidden_size,
            "; it must be 1 to ", (int64_t{1} << 31) - 1);
    c.intermediate_size = (8 * c.hidden_size / 3 + 255) / 256 * 256;
  }
  if (values.value("history_window", Json()) == "auto") {
    c.history_window = Config::kAuto;
    fields.values.erase("history_window");
  } else if (fields.take("history_window", c.history_window)) {
    require(c.history_window > 0, "history_window = ", c.history_window,
            "; it must be at least 1, or \"auto\"");
  }
  fields.take("rope_theta", c.rope_theta);
  fields.take("layer_norm_eps", c.layer_norm_eps);
  fields.take("history_window_coefficient", c.history_window_coefficient);
  double dropout = 0;  // of training alone
  fields.take("dropout", dropout);
  std::string variant = "tlinformer";
  fields.take("variant", variant);
  require(variant == "tlinformer" || variant == "tconstformer", "variant is '", variant,
          "'; it must be tlinformer or tconstformer");
  if (variant == "tconstformer") c.variant = Variant::tconstformer;
  require(fields.values.empty(), "unknown config fields ", fields.values.dump());
  c.validate();
  return c;
}

bool exists(const std::string& path) { return access(path.c_str(), F_OK) == 0; }

std::string text_of_shape(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

}  // namespace

Config config_from_json(const std::string& text) {
  return read_json(text.data(), text.data() + text.size(), read_config);
}

Weights make_weights(const Config& config, DType dtype, const FindTensor& find) {
  const int64_t d = config.hidden_size, f = config.intermediate_size;
  const int64_t q = config.query_dim(), qkv = q + 2 * config.kv_dim();
  Weights weights;
  weights.dtype = dtype;
  weights.embed_tokens = find("embed_tokens.weight", {config.vocab_size, d});
  weights.norm_weight = find("norm.weight", {d});
  weights.norm_bias = find("norm.bias", {d});
  for (int64_t i = 0; i < config.num_layers(); ++i) {
    const std::string prefix = "blocks." + std::to_string(i / config.block_depth) + ".layers." +
                               std::to_string(i % config.block_depth) + ".";
    LayerWeights layer;
    layer.attn_norm_weight = find(prefix + "attn_norm.weight", {d});
    layer.attn_norm_bias = find(prefix + "attn_norm.bias", {d});
    layer.qkv_proj_weight = find(prefix + "qkv_proj.weight", {qkv, d});
    layer.qkv_proj_bias = find(prefix + "qkv_proj.bias", {qkv});
    layer.out_proj_weight = find(prefix + "out_proj.weight", {d, q});
    layer.out_proj_bias = find(prefix + "out_proj.bias", {d});
    layer.mlp_norm_weight = find(prefix + "mlp_norm.weight", {d});
    layer.mlp_norm_bias = find(prefix + "mlp_norm.bias", {d});
    layer.gate_proj_weight = find(prefix + "gate_proj.weight", {f, d});
    layer.up_proj_weight = find(prefix + "up_proj.weight", {f, d});
    layer.down_proj_weight = find(prefix + "down_proj.weight", {d, f});
    weights.layers.push_back(layer);
  }
  return weights;
}

struct Checkpoint::Impl {
  Config config;
  std::vector<MappedFile> files;
  std::map<std::string, StoredTensor> tensors;
  std::map<std::pair<std::string, DType>, std::vector<char>> copies;
  int64_t parameters = 0;

  // Every tensor of a file, or those that `index` says it holds.
  void add(const std::string& path, const std::set<std::string>* names) {
    files.emplace_back(path);
    const MappedFile& file = files.back();
    in_file(path, [&] {
      Safetensors stored = read_safetensors(file.begin(), file.bytes());
      const std::string& kind = stored.architecture;
      require(kind.empty() || kind == "TLinFormerForCausalLM", "it holds a ", kind,
              ", not a TLinFormerForCausalLM");
      if (!names) {
        tensors = std::move(stored.tensors);
        return;
      }
      for (const std::string& name : *names) {
        const auto at = stored.tensors.find(name);
        require(at != stored.tensors.end(), "tensor ", name, " is missing from this shard");
        tensors.insert(*at);
      }
    });
  }

  void add_shards(const std::string& folder, const std::string& index) {
    const MappedFile text(index);
    std::map<std::string, std::set<std::string>> shards;
    in_file(index, [&] {
      for (const auto& [name, shard] : read_index(text.begin(), text.end())) {
        shards[shard].insert(name);
      }
    });
    for (const auto& [shard, names] : shards) add(folder + "/" + shard, &names);
  }

  const StoredTensor& find(const std::string& name, const std::vector<int64_t>& shape) const {
    const auto at = tensors.find(name);
    require(at != tensors.end(), "tensor ", name, " is missing");
    require(at->second.shape == shape, "tensor ", name, " has the shape ",
            text_of_shape(at->second.shape), "; config.json asks for ", text_of_shape(shape));
    return at->second;
  }

  const void* tensor(const std::string& name, const StoredTensor& stored, DType dtype) {
    const int64_t size = size_of(dtype);
    const bool aligned = reinterpret_cast<uintptr_t>(stored.data) % static_cast<size_t>(size) == 0;
    if (stored.dtype == dtype && aligned) return stored.data;
    std::vector<char>& copy = copies[{name, dtype}];
    if (!copy.empty()) return copy.data();
    copy.resize(static_cast<size_t>(stored.elements * size));
    const int64_t stride = size_of(stored.dtype);
    for (int64_t i = 0; i < stored.elements; ++i) {
      store(dtype, load(stored.dtype, stored.data + i * stride), copy.data() + i * size);
    }
    return copy.data();
  }
};

Checkpoint::Checkpoint(const std::string& directory) : impl_(std::make_unique<Impl>()) {
  const std::string config = directory + "/config.json";
  const MappedFile text(config);
  impl_->config = in_file(config, [&] { return config_from_json({text.begin(), text.end()}); });
  std::string weights = directory + "/model.safetensors";
  const std::string index = weights + ".index.json";
  if (!exists(weights) && exists(index)) {
    weights = index;
    impl_->add_shards(directory, index);
  } else {
    impl_->add(weights, nullptr);
  }
  in_file(weights, [&] {
    std::set<std::string> known;
    make_weights(impl_->config, DType::float32, [&](const std::string& name, const auto& shape) {
      impl_->parameters += impl_->find(name, shape).elements;
      known.insert(name);
      return nullptr;
    });
    for (const auto& [name, stored] : impl_->tensors) {
      require(known.count(name) == 1, "tensor ", name, " is unknown to a TLinFormer");
    }
  });
}

Checkpoint::~Checkpoint() = default;
Checkpoint::Checkpoint(Checkpoint&&) noexcept = default;
Checkpoint& Checkpoint::operator=(Checkpoint&&) noexcept = default;

const Config& Checkpoint::config() const { return impl_->config; }
DType Checkpoint::dtype() const { return impl_->tensors.at("embed_tokens.weight").dtype; }
int64_t Checkpoint::parameters() const { return impl_->parameters; }

Weights Checkpoint::weights(DType dtype) {
  return make_weights(impl_->config, dtype, [&](const std::string& name, const auto& shape) {
    return impl_->tensor(name, impl_->find(name, shape), dtype);
  });
}

}  // namespace tlinformer
