// A model on disk: a directory with config.json and model.safetensors, or the shards that
// model.safetensors.index.json names. Python's save_pretrained writes such directories.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tlinformer/config.h"

namespace tlinformer {

// The config in the text of a config.json. Throws InvalidArgument naming the field: one that is
// unknown, missing, of another type or out of range.
Config config_from_json(const std::string& text);

// Asked for a tensor by its name in a checkpoint ("blocks.0.layers.1.qkv_proj.weight") with the
// shape that the config gives it; returns where it lies.
using FindTensor =
    std::function<const void*(const std::string& name, const std::vector<int64_t>& shape)>;

// The weights of a model from wherever its tensors lie; `find` is asked for each of them once.
Weights make_weights(const Config& config, DType dtype, const FindTensor& find);

// An open model directory. Its files are mapped, not read: keep them as they are while it lives (a
// file that somebody shortens ends the process). Tensors are float32, bfloat16 or float16.
class Checkpoint {
 public:
  // Checks everything but the numbers. Throws FileError where a file is missing or unreadable, and
  // InvalidArgument, naming the file, for contents that do not make up a model.
  explicit Checkpoint(const std::string& directory);
  ~Checkpoint();
  Checkpoint(Checkpoint&&) noexcept;
  Checkpoint& operator=(Checkpoint&&) noexcept;

  const Config& config() const;
  DType dtype() const;         // of embed_tokens, as saved
  int64_t parameters() const;  // numbers in all tensors

  // Pointers into the files, or to copies where a tensor has another dtype than asked for or is
  // not aligned to its own. All are in host memory and live as long as this object does.
  Weights weights(DType dtype);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tlinformer
