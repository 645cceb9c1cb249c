// Which kernel does a decode attention, and the scratch of all of them.
#include <algorithm>

#include "batch_attention.cuh"
#include "decode_attention.h"
#include "general_attention.cuh"
#include "history_attention.cuh"
#include "window_attention.cuh"

namespace tlinformer::cuda {
namespace {

// Where things lie in the scratch.
struct Scratch {
  uint32_t* arrivals;
  float* partials;
  void* history;  // of a single sequence; of more none
};

// False, and nothing is launched, where the general kernel has to do it.
template <class T, int D, int H>
bool with_history_attention(const DecodeAttention& a, const Scratch& scratch, const Launch& how) {
  const HistoryParts parts = history_parts<T, D, H>(a);
  if (parts.parts == 0) return false;
  launch_history_attention<T, D, H>(a, parts, scratch.history, how);
  return true;
}

template <class T, int D>
bool with_history_attention(const DecodeAttention& a, const Scratch& scratch, const Launch& how) {
  const int group = a.query_heads / a.kv_heads;
  if (scratch.history == nullptr) return false;
  if (group == 1) return with_history_attention<T, D, 1>(a, scratch, how);
  // Records of many query heads leave room for few parts: then less are better, in more passes.
  if (group > 4 && with_history_attention<T, D, kMostHeadsOfPass>(a, scratch, how)) return true;
  return with_history_attention<T, D, 4>(a, scratch, how);
}

// Of at most kMostSequences.
template <class T>
void decode_attention_of(const DecodeAttention& a, const Scratch& scratch, const Launch& how) {
  const bool grouped = a.query_heads > a.kv_heads;
  switch (a.head_dim) {
#define TLINFORMER_CASE(D)                                                                 \
  case D:                                                                                  \
    if (a.batch == 1 && !grouped && launch_window_attention<T, D>(a, how)) return;         \
    if ((a.batch > 1 || grouped) && launch_batch_attention<T, D>(a, how)) return;          \
    if (with_history_attention<T, D>(a, scratch, how)) return;                             \
    if (!grouped)                                                                          \
      return launch_decode_attention<T, D, 1>(a, scratch.arrivals, scratch.partials, how); \
    return launch_decode_attention<T, D, heads_of_pass(D, true)>(a, scratch.arrivals,      \
                                                                 scratch.partials, how);
    TLINFORMER_HEAD_SIZES(TLINFORMER_CASE)
#undef TLINFORMER_CASE
    default:
      require(false, "decode attention: no kernel for heads of ", a.head_dim, " elements");
  }
}

// Passes are never more than query heads.
int64_t arrivals_bytes(int batch, int query_heads) {
  return (int64_t{std::min(batch, kMostSequences)} * query_heads * 4 + 15) / 16 * 16;
}

int64_t partials_bytes(int batch, int query_heads, int head_dim) {
  // The heads of all passes, those that fill a pass up included, are at most twice the query heads.
  const int64_t partials = multiprocessors() * heads_of_pass(head_dim, true) +
                           2 * int64_t{std::min(batch, kMostSequences)} * (2 * query_heads);
  return (partials * (head_dim + kPartialExtra) * 4 + 15) / 16 * 16;
}

}  // namespace

void check_shared_memory() {
  constexpr int kLeast = 163 * 1024;  // what compute capability 8.0 has
  const int most = shared_memory_of_block();
  require(most >= kLeast, "a block of this GPU has at most ", most,
          " bytes of shared memory; on CUDA ", kLeast,
          " are needed, which A100, H100 and H200 have (the CPU engine runs everywhere)");
}

int64_t decode_attention_scratch(int batch, int query_heads, int head_dim) {
  const int64_t records = int64_t{multiprocessors()} * kMostHeadsOfPass * (head_dim + 2) * 8;
  return arrivals_bytes(batch, query_heads) + partials_bytes(batch, query_heads, head_dim) +
         (batch == 1 ? history_counts_bytes(query_heads) + records : 0);
}

void decode_attention(const DecodeAttention& a, const Launch& how) {
  require(a.kv_heads > 0 && a.query_heads % a.kv_heads == 0, "decode attention: ", a.query_heads,
          " query heads are no multiple of ", a.kv_heads, " key/value heads");
  require(a.most_rows < int64_t{1} << 31, "decode attention: ", a.most_rows, " rows of a head");
  char* const arrivals = static_cast<char*>(a.scratch);
  char* const partials = arrivals + arrivals_bytes(a.batch, a.query_heads);
  char* const history = partials + partials_bytes(a.batch, a.query_heads, a.head_dim);
  const Scratch scratch{reinterpret_cast<uint32_t*>(arrivals), reinterpret_cast<float*>(partials),
                        a.batch == 1 ? history : nullptr};
  for (int first = 0; first < a.batch; first += kMostSequences) {
    DecodeAttention part = a;
    part.batch = std::min(a.batch - first, kMostSequences);
    part.state += first;
    const int64_t skipped = int64_t{first} * a.query_heads * a.head_dim;
    part.query += skipped;
    part.output = static_cast<char*>(a.output) + skipped * size_of(a.dtype);
    for (CachedRows* rows : {&part.context, &part.window}) {
      const int64_t bytes = first * rows->sequence_stride * size_of(a.dtype);
      rows->keys = static_cast<const char*>(rows->keys) + bytes;
      rows->values = static_cast<const char*>(rows->values) + bytes;
    }
    with_type(a.dtype, [&](auto tag) {
      decode_attention_of<typename decltype(tag)::type>(part, scratch, how);
    });
  }
}

}  // namespace tlinformer::cuda
