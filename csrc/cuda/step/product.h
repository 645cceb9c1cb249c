// The products of a token: few rows (one a sequence) against weight matrices read once.
#pragma once

#include <cstdint>

#include "../launch.cuh"
#include "../state.h"
#include "tlinformer/config.h"

namespace tlinformer::cuda {

struct Norm {  // of dtype, (D) each
  const void* weight = nullptr;
  const void* bias = nullptr;
  float epsilon = 1e-5f;
};

// Where a layer's new keys and values go: (sequences, Hkv, rows capacity, d).
struct NewRows {
  void* keys = nullptr;
  void* values = nullptr;
  int64_t sequence_stride = 0, head_stride = 0;  // in elements
  bool follows_history = false;  // the row's slot is state.last, else state.last - state.history
};

// Matrices are (outputs, inputs) row-major of dtype; the rows of x, query, hidden ... are
// sequences 0 ... batch - 1. Sequences that are not live keep what they had.
struct StepRows {
  DType dtype = DType::bfloat16;
  int batch = 1;
  const SequenceState* state = nullptr;
  int rows_of_block = 0;  // of several sequences that a thread block takes, 8 or 32; 0: chosen here
};

// Rows of float32 that are still to be added to a single sequence's x: (count, kPartPitch).
struct Parts {
  const float* rows = nullptr;
  int count = 0;
};
constexpr int kPartPitch = 1024, kFewParts = 6, kMostParts = 12;

// query, keys, values <- split(qkv norm(x) + bias); rotated, keys and values into the cache.
struct ProjectStep : StepRows {
  const float* x = nullptr;  // (batch, D)
  Parts parts{};
  int hidden_size = 0;
  Norm norm{};
  const void* weight = nullptr;  // ((Hq + 2 Hkv) d, D)
  const void* bias = nullptr;
  int query_heads = 0, kv_heads = 0, head_dim = 0;
  const float2* rotations = nullptr;  // (batch, d / 2): cos, sin of each pair at state.last
  float* query = nullptr;             // (batch, Hq d), rotated, times log2(e) / sqrt(d)
  NewRows new_rows{};
};
void project_step(const ProjectStep& p, const Launch& how);

// x <- x + its parts + input weight^T + bias (bias may be null).
struct AddStep : StepRows {
  const void* input = nullptr;   // (batch, inputs) of dtype
  const void* weight = nullptr;  // (outputs, inputs)
  const void* bias = nullptr;
  int inputs = 0, outputs = 0;
  float* x = nullptr;  // (batch, outputs)
  Parts parts{};
};
void add_step(const AddStep& p, const Launch& how);

// hidden <- silu(gate norm(x)) * (up norm(x)).
struct GateStep : StepRows {
  const float* x = nullptr;  // (batch, D)
  int hidden_size = 0, intermediate_size = 0;
  Norm norm{};
  const void* gate = nullptr;  // (F, D)
  const void* up = nullptr;    // (F, D)
  void* hidden = nullptr;      // (batch, F) of dtype
};
void gate_step(const GateStep& p, const Launch& how);

// logits <- embed norm(x), and each block's likeliest token of each row.
struct Candidate {
  float logit;    // NaN if any logit of the block is NaN
  int32_t token;  // the lowest id among equals
};
struct HeadStep : StepRows {
  const float* x = nullptr;
  Parts parts{};
  int hidden_size = 0, vocab_size = 0;
  Norm norm{};
  const void* embed = nullptr;      // (V, D)
  float* logits = nullptr;          // (batch, V)
  Candidate* candidates = nullptr;  // (batch, head_candidates())
};
int head_candidates(int vocab_size);  // candidates of a row
void head_step(const HeadStep& p, const Launch& how);

// The same for one sequence, which waits for each instruction of theirs.
void project_row(const ProjectStep& p, const Launch& how);
void add_row(const AddStep& p, const Launch& how);
void gate_row(const GateStep& p, const Launch& how);

// The same for one sequence of a wide model: of more columns (hidden_size) than others have, up to
// 8192, and a down projection of up to 16384. False, and nothing is launched, for others, and where
// the device does not allow it.
constexpr int kWideModel = kPartPitch;  // columns of others, at most
bool is_wide(int hidden_size);
bool project_wide(const ProjectStep& p, const Launch& how);
bool add_wide(const AddStep& p, const Launch& how);
bool gate_wide(const GateStep& p, const Launch& how);

// The same for several sequences, by blocks of at most 8, and whether these are chosen.
void project_few(const ProjectStep& p, const Launch& how);
void add_few(const AddStep& p, const Launch& how);
void gate_few(const GateStep& p, const Launch& how);
bool few_in_block(const ProjectStep& p);
bool few_in_block(const GateStep& p);

// Both products of an MLP: parts <- hidden down^T for each cluster's part of `hidden`, which is
// rounded to dtype as gate_step does, but not stored.
struct MlpStep : GateStep {
  const void* down = nullptr;  // (D, F)
  float* parts = nullptr;      // (mlp_parts(), kPartPitch)
};
int mlp_parts(const MlpStep& p);  // 0 where the device or the sizes do not allow it
void mlp_row(const MlpStep& p, const Launch& how);

// One sequence; at most 8. False, and nothing is launched, where the device, the width or the batch
// does not allow it.
bool head_row(const HeadStep& p, int candidates, const Launch& how);
bool head_few(const HeadStep& p, int candidates, const Launch& how);

}  // namespace tlinformer::cuda
