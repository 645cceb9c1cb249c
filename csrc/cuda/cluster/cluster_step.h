// A token (batch 1) through everything between two history attentions, in one kernel: one cluster
// of 16 blocks that pass activations through each other's shared memory while the weights stream.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../attention/decode_attention.h"
#include "../launch.cuh"
#include "../state.h"
#include "../step/product.h"
#include "tlinformer/config.h"

namespace tlinformer::cuda {

struct ClusterLayer {
  LayerWeights weights{};  // device pointers; not read after the constructor
  NewRows window{};        // where new rows go; not the first of a block: the rows also read
  CachedRows context{};    // not the first of a block: its rows 0 ... state.compressed - 1
};

// What a step reads and writes, on the device, each 16-byte aligned.
struct ClusterBuffers {
  const SequenceState* state = nullptr;
  float* x = nullptr;              // (D)
  float* query = nullptr;          // (Hq d), rotated, times log2(e) / sqrt(d)
  const void* attended = nullptr;  // (Hq d) of dtype
  void* packed = nullptr;          // packed_bytes(), filled by the constructor
};

// Segment 0: project of layer 0. Segment b = 1 ... num_blocks: finish of the first layer of block
// b - 1, all of that block's other layers, and project of the next block's first layer, if any.
// Between them the caller attends: query -> attended. A sequence that is not live keeps all it had.
class ClusterStep {
 public:
  // Whether the current device runs it. The rows are upper bounds of one sequence, by the plan.
  static bool supports(const Config& config, DType dtype, int64_t most_window_rows,
                       int64_t most_context_rows);
  static int64_t packed_bytes(const Config& config);

  // One entry of `layers` for each layer, block by block. Returns when the weights are packed.
  ClusterStep(const Config& config, DType dtype, const std::vector<ClusterLayer>& layers,
              const ClusterBuffers& buffers, int64_t most_window_rows, int64_t most_context_rows,
              cudaStream_t stream);

  int segments() const { return static_cast<int>(segments_.size()); }
  void run(int segment, const Launch& how) const;

 private:
  std::vector<std::shared_ptr<const struct ClusterParameters>> segments_;
  DType dtype_;
};

}  // namespace tlinformer::cuda
