// How the 16 blocks of the cluster share the work, and what each keeps in its shared memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../rope.cuh"
#include "../state.h"
#include "cluster_step.h"
#include "tlinformer/config.h"

namespace tlinformer::cuda {

constexpr int kBlocks =
    16;  // of the cluster; also the warps that multiply: warp w sends to block w
constexpr int kTileBytes = 512;  // 16 x 16 weights, in the order of mma's A fragments
constexpr int kStageSteps = 6;   // tiles a warp finds in a full stage of the ring
constexpr int kStageBytes = kStageSteps * kBlocks * kTileBytes;
constexpr int kMostStages = 16;
constexpr int kUnitRows = 32;    // cached rows that one warp attends to at a time
constexpr int kMostVisits = 24;  // layers of a segment

enum Matrix { kQkv, kOut, kGateUp, kDown, kMatrices };

// A block's rows of one matrix, in rows of 16 x 16 tiles. A warp multiplies `per_warp` rows of
// tiles, `groups` apart, over one of `slices` ranges of `k` tiles each: warp w group w / slices,
// slice w % slices; warps that are left over do nothing. The stream holds, for each tile of a
// slice, for each row of a warp, for each warp: its tile, of zeros where the matrix ends before.
struct alignas(16) Product {
  int32_t first = 0;  // of the outputs
  int16_t rows = 0;   // outputs
  int16_t k = 0;
  int16_t slice_part = 0;  // w / slices = w slice_part / 256
  int8_t slices = 0, groups = 0, per_warp = 0;
  int8_t stage_k = 0;  // of `k`, in a stage

  __host__ __device__ int warps() const { return slices * groups; }
  __host__ __device__ int tiles() const { return warps() * per_warp * k; }

  // The division that costs least; none, with no slices, for more rows than all warps can take.
  static Product of(int64_t first, int64_t rows, int64_t tile_rows, int64_t inputs) {
    Product best;
    best.first = static_cast<int32_t>(first);
    best.rows = static_cast<int16_t>(rows);
    const int64_t all = (inputs + 15) / 16;
    int64_t least = 0;
    for (int64_t per_warp : {1, 2, 3, 6}) {
      const int64_t groups = (tile_rows + per_warp - 1) / per_warp;
      for (int64_t slices = 1; slices * groups <= kBlocks && groups > 0; ++slices) {
        const int64_t k = (all + slices - 1) / slices;
        // In cycles, about: to stream the tiles, a warp's instructions.
        const int64_t cost = 11 * slices * groups * per_warp * k + 40 * per_warp * k;
        if (best.slices > 0 && cost >= least) continue;
        least = cost;
        const int64_t deep = kStageSteps / per_warp, stages = (k + deep - 1) / deep;
        best.k = static_cast<int16_t>(k);
        best.slice_part = static_cast<int16_t>((256 + slices - 1) / slices);
        best.slices = static_cast<int8_t>(slices);
        best.groups = static_cast<int8_t>(groups);
        best.per_warp = static_cast<int8_t>(per_warp);
        best.stage_k = static_cast<int8_t>((k + stages - 1) / stages);
      }
    }
    return best;
  }
};

// What one block does. Its stream holds, layer after layer: vectors, then the matrices' tiles.
struct Share {
  int64_t stream = 0;  // where it begins in the packed memory
  int32_t layer_bytes = 0;
  int32_t vector_bytes = 0;  // norms (4 D), then the biases of its rows of qkv and of out
  Product matrices[kMatrices];
};

// Byte offsets in a block's shared memory.
struct Layout {
  int32_t x, middle;                 // residual stream: of the layer, after its attention; (D)
  int32_t normed, attended, hidden;  // inputs of products, of T, zero up to a multiple of 16
  int32_t share, places;             // copies of this block's
  int32_t state, rotations;          // of this token: a copy, cos and sin
  int32_t query, fresh;              // of this layer: queries, new keys and values
  int32_t partial, records, vectors[2];
  int32_t ring, stages;
  int32_t bytes;
};

// Barriers (8 bytes each) lie at the beginning of shared memory.
constexpr int kFull = 0;                            // of each stage
constexpr int kEmpty = kFull + 8 * kMostStages;     // of each stage
constexpr int kVectors = kEmpty + 8 * kMostStages;  // of both halves
constexpr int kExchanges = kVectors + 8 * 2;        // of each exchange
constexpr int kBarrierBytes = kExchanges + 8 * kMatrices;

struct Place {  // of a layer's cached rows
  void* window_keys;
  void* window_values;
  int64_t window_head_stride;
  const void* context_keys;
  const void* context_values;
  int64_t context_head_stride;
};

struct ClusterParameters {
  const SequenceState* state;
  float* x;
  float* query;
  const void* attended;
  const char* packed;
  const double* turns;  // of Rope, in the packed memory
  int32_t width, hidden, query_heads, kv_heads, head_dim;
  float epsilon, scale;
  int32_t first_layer, visits;  // visit v is of layer first_layer + v
  int32_t depth;                // visits that finish their layer, if `resumes`
  bool resumes;                 // visit 0 only finishes: its project was the segment before
  bool follows_history;         // the last visit's new row, if it only projects
  Layout layout;
  Share shares[kBlocks];
  Place places[kMostVisits];
};
static_assert(sizeof(ClusterParameters) <= 4096, "more than a kernel's parameters may take");

}  // namespace tlinformer::cuda
