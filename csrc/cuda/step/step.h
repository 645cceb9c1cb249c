// A token through the model: which kernels run.
#pragma once

#include "../model.h"
#include "../workspace.h"

namespace tlinformer::cuda {

class Step {
 public:
  Step(const Model& model, const Workspace& workspace, char* base);

  // Draws the tokens of live sequences, or takes the given ones; either sets x.
  void sample(const Launch& how) const;
  void feed(const Launch& how) const;
  // x through all layers to the logits, for live sequences; `first` follows no other kernel.
  void push(const Launch& first) const;
  // x to the logits alone.
  void head(const Launch& how) const { head({}, how); }

  void set_ring(int32_t* ring, int64_t rows);

 private:
  // What is still to be added to x goes from one to the next.
  void project(const Verb& verb, const Parts& parts, const Launch& how) const;
  void attend(const Verb& verb, const Launch& how) const;
  Parts finish(const Verb& verb, const Parts& parts, const Launch& how) const;
  Parts mlp(const Verb& verb, const Launch& how) const;
  void head(const Parts& parts, const Launch& how) const;

  template <class P>
  P of_rows() const {
    P p;
    p.dtype = m_.dtype;
    p.batch = static_cast<int>(m_.plan.options().batch_size);
    p.state = at<const SequenceState>(w_.state);
    return p;
  }
  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

  const Model& m_;
  const Workspace& w_;
  char* base_;
  Stage window_;
  SampleStep sample_;
};

}  // namespace tlinformer::cuda
