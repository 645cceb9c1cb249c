// Exact attention of query rows over one or two caches, one softmax each, outputs added.
#pragma once

#include <vector>

#include "kernels.h"
#include "tlinformer/config.h"

namespace tlinformer::cpu {

// The keys and values of one sequence in one cache: head h at k + h * head_stride, (rows, d).
struct Keys {
  const void* k = nullptr;
  const void* v = nullptr;
  int64_t head_stride = 0;  // elements
  int64_t begin = 0;        // first row read
  int64_t count = 0;        // rows read by the last query row
  bool causal = false;      // query row i of n reads n - 1 - i rows fewer
};

// Some query rows of one sequence, and the caches they read (those with count 0 are skipped).
struct Queries {
  const float* q = nullptr;  // (rows, Hq d), rotated, times kScoreScale / sqrt(d)
  float* out = nullptr;      // (rows, Hq d)
  int64_t rows = 0;
  Keys keys[2];
};

class Attend {
 public:
  Attend(const Config& config, DType dtype, int threads, int64_t batch_size, float* second,
         float* softmax);

  // One row each of several sequences: the keys are split over the threads.
  void one_row_each(const std::vector<Queries>& queries);

  // Many rows of one sequence; tells `poll` the share done between pieces of a fraction of a
  // second.
  template <class Poll>
  void many_rows(const Queries& queries, const Poll& poll) {
    begin(queries.rows, queries.out);
    bool first = true;
    for (const Keys& keys : queries.keys) {
      if (keys.count == 0) continue;
      float* out = first ? queries.out : second_;
      if (!first) begin(queries.rows, second_);
      const int64_t piece = piece_keys(queries.rows);
      for (int64_t done = 0; done < keys.count; done += piece) {
        if (done > 0) poll(static_cast<double>(done) / static_cast<double>(keys.count));
        add_keys(queries, keys, done, std::min(keys.count, done + piece), out);
      }
      end(queries.rows, out, first ? nullptr : queries.out);
      first = false;
    }
  }

 private:
  void begin(int64_t rows, float* out);
  void add_keys(const Queries& queries, const Keys& keys, int64_t from, int64_t to, float* out);
  void end(int64_t rows, float* out, float* add_to);
  int64_t piece_keys(int64_t rows) const;
  template <class T>
  void one_row_each_typed(const std::vector<Queries>& queries);
  template <class T>
  void add_keys_typed(const Queries& queries, const Keys& keys, int64_t from, int64_t to,
                      float* out);

  int64_t heads_, kv_heads_, d_;
  DType dtype_;
  int threads_;
  float* second_;   // (rows, Hq d): output of the second softmax
  float* softmax_;  // (rows, Hq, 2): running maximum and sum
  std::vector<float> partials_;
  std::vector<float> scratch_;  // of every thread

  struct Part {  // of the keys of one query row and key/value head
    int64_t row, kv_head, cache, begin, end;
  };
  std::vector<Part> parts_;
};

}  // namespace tlinformer::cpu
