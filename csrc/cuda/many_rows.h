// The verbs over many rows of one sequence: prefill and slide.
#pragma once

#include "dense/dense.h"
#include "model.h"
#include "rows/rows.h"
#include "workspace.h"

namespace tlinformer::cuda {

class ManyRows {
 public:
  ManyRows(const Model& model, const Workspace& workspace, int lane, char* base,
           cudaStream_t stream);

  // All verbs but `head`; returns the device address of x's last row, float32 (D).
  const float* run(const Stage& stage, const Span& span);
  // A block's compressed history and, on the rows that follow, its window: layers that they have in
  // common are run once.
  const float* run_pair(const Stage& compressed, const Span& history, const Stage& window,
                        const Span& own);

 private:
  // A verb over some of the rows at work.
  struct Part {
    const Verb& verb;
    const Span& span;
    int64_t first;  // of the rows
  };
  using Parts = std::initializer_list<Part>;  // of a layer: one, or two that differ in their caches

  void take(float* x, int64_t rows, int64_t first);
  void run(Parts parts);
  void widen_biases();
  void prepare();
  void project_vocabulary();
  void norm(const Norm* norm);
  void project(Parts parts);
  void product_of_x(const Verb& verb, int64_t first, int64_t columns);
  CachePlace place(const Part& part) const;
  void attend(const Part& part);
  void finish(const Verb& verb);
  void gate(const LayerWeights& layer);
  void keep(const Span& span);
  void copy(float* to, const float* from) const;
  KeyGroup keys(Cache cache, const Verb& verb, const Span& span) const;
  int64_t line_columns() const { return m_.c.query_dim() + 2 * m_.c.kv_dim(); }

  const Model& m_;
  const Workspace& w_;
  const Workspace::Lane& lane_;
  char* base_;
  Launch how_;
  Dense dense_;
  const bool gated_;                 // norm, gate and up are one kernel
  const int32_t* tokens_ = nullptr;  // of an embed verb whose rows x does not hold yet
  float* x_ = nullptr;
  int64_t rows_ = 0;
  int64_t first_ = 0;   // of the queries: x's rows may be the last of those projected
  int64_t padded_ = 0;  // rows that products compute
};

}  // namespace tlinformer::cuda
