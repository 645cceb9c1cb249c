// The static cache, planned to the byte before anything is allocated. It never grows or moves.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tlinformer/config.h"

namespace tlinformer {

struct CachePlanOptions {
  int64_t max_context = 0;  // tokens a sequence may hold: prompt and generated together
  int64_t batch_size = 1;   // sequences
  DType dtype = DType::float32;
  int64_t memory_limit = 0;     // bytes the plan must fit in; 0: unlimited
  Device device = Device::cpu;  // where the arena and the weights lie
};

// One tensor of the arena, (batch_size, ...) contiguous. Key/value regions hold keys, then values.
struct Region {
  std::string name;    // history | context | window | stream | workspace
  int block = -1;      // of key/value regions
  int layer = -1;      // within the block
  int64_t rows = 0;    // capacity of one sequence
  int64_t offset = 0;  // bytes from the arena's start, a multiple of kAlignment
  int64_t bytes = 0;
};

class CachePlan {
 public:
  static constexpr int64_t kAlignment = 256;

  // Throws InvalidArgument for bad options and OutOfMemory, naming the longest context that
  // would fit, when memory_limit is exceeded.
  static CachePlan make(const Config& config, const CachePlanOptions& options);

  // The longest context, of at most options.max_context tokens, whose plan fits memory_limit; 0 if
  // none does.
  static int64_t longest_context(const Config& config, const CachePlanOptions& options);

  const std::vector<Region>& regions() const { return regions_; }
  const CachePlanOptions& options() const { return options_; }
  const Region* find(const std::string& name, int block = -1, int layer = -1) const;
  int64_t total_bytes() const { return total_bytes_; }  // what the arena must hold
  int64_t cache_bytes() const;                          // keys and values alone
  int64_t bytes_of(const std::string& name) const;      // all regions of that name
  int64_t piece_rows() const { return piece_rows_; }    // rows a slide streams at a time

 private:
  void add(const std::string& name, int block, int layer, int64_t rows, int64_t bytes);
  void check_limit(const Config& config) const;

  CachePlanOptions options_;
  std::vector<Region> regions_;
  int64_t total_bytes_ = 0;
  int64_t piece_rows_ = 0;
};

}  // namespace tlinformer
