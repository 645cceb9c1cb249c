// The decode attention of layers that read few rows, compressed history and window: one block for
// a head, which has its rows in shared memory before the query exists.
#pragma once

#include "decode_attention.h"
#include "row_score.cuh"

namespace tlinformer::cuda {

constexpr int kWindowThreads = 512;
constexpr int kUnit = 32;  // rows that a warp attends to at a time

__device__ inline void copy_async(void* to, const void* from) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}

// Elements begin ... end - 1, both even, by `threads` threads; whole vectors of 16 bytes do not
// wait.
template <class T>
__device__ void copy_rows(T* to, const void* from, int begin, int end, int thread = threadIdx.x,
                          int threads = kWindowThreads) {
  const T* source = static_cast<const T*>(from);
  const int first = (begin + 7) / 8 * 8, last = end / 8 * 8;
  for (int i = first + 8 * thread; i < last; i += 8 * threads) {
    copy_async(to + i, source + i);
  }
  // What is left before the first vector and behind the last.
  const int head_end = min(first, end), tail = max(last, head_end);
  const int words = (head_end - begin) / 2 + (end - tail) / 2;
  for (int i = thread; i < words; i += threads) {
    const int at = 2 * i < head_end - begin ? begin + 2 * i : tail + 2 * i - (head_end - begin);
    *reinterpret_cast<uint32_t*>(to + at) = __ldcg(reinterpret_cast<const uint32_t*>(source + at));
  }
}

// Up to 32 rows against one query. put(i, pair) stores floats 2 i and 2 i + 1 of a record: greatest
// score, sum of the weights relative to it, weighted sum of the values.
template <class T, int d, class Put>
__device__ void attend_unit(const T* keys, const T* values, int rows, const float* query,
                            const Put& put) {
  constexpr int kQuads = d / 4;
  const int lane = threadIdx.x % 32;
  const float score = lane < rows ? row_score<T, d>(keys, query, lane) : -INFINITY;
  const float most = warp_max(score);
  const float weight = exp2_fast(score - most);
  const float sum = warp_sum(weight);

  constexpr int kAtOnce = 32 / kQuads;  // rows
  const int offset = lane / kQuads, quad = lane % kQuads;
  float4 mixed{};
#pragma unroll
  for (int first = 0; first < kUnit; first += kAtOnce) {
    const int row = first + offset;
    const float w = __shfl_sync(0xffffffffu, weight, row % 32);
    if (offset < kAtOnce && row < rows) {  // values beyond may be NaN
      const uint2 words = reinterpret_cast<const uint2*>(values + row * d)[quad];
      const float2 low = unpack<T>(words.x), high = unpack<T>(words.y);
      mixed.x += w * low.x;
      mixed.y += w * low.y;
      mixed.z += w * high.x;
      mixed.w += w * high.y;
    }
  }
  float4 all = mixed;
#pragma unroll
  for (int i = 1; i < kAtOnce; ++i) {
    all.x += __shfl_down_sync(0xffffffffu, mixed.x, i * kQuads);
    all.y += __shfl_down_sync(0xffffffffu, mixed.y, i * kQuads);
    all.z += __shfl_down_sync(0xffffffffu, mixed.z, i * kQuads);
    all.w += __shfl_down_sync(0xffffffffu, mixed.w, i * kQuads);
  }
  if (lane == 0) put(0, float2{most, sum});
  if (lane < kQuads) {
    put(1 + 2 * lane, float2{all.x, all.y});
    put(2 + 2 * lane, float2{all.z, all.w});
  }
}

// A value of softmax(scores) values, from records begin ... end - 1.
__device__ inline float merge_units(const float* records, int begin, int end, int stride,
                                    int column) {
  if (begin == end) return 0;
  float most = -INFINITY;
#pragma unroll 4
  for (int i = begin; i < end; ++i) most = fmaxf(most, records[i * stride]);
  float sum = 0, mixed = 0;
#pragma unroll 4
  for (int i = begin; i < end; ++i) {
    const float weight = exp2_fast(records[i * stride] - most);
    sum += weight * records[i * stride + 1];
    mixed += weight * records[i * stride + 2 + column];
  }
  return mixed / sum;
}

// Rows in shared memory, in elements: keys and values of the context, then of the window.
struct RowPlaces {
  int context_values, window_keys, window_values, end;
  __host__ __device__ RowPlaces(int context_rows, int window_rows, int d) {
    context_values = (context_rows * d + 7) / 8 * 8;
    window_keys = 2 * context_values;
    window_values = window_keys + (window_rows * d + 7) / 8 * 8;
    end = window_values + window_values - window_keys;
  }
};

// Enough for any share of context and window.
inline size_t window_attention_bytes(const DecodeAttention& a) {
  const size_t rows = static_cast<size_t>(a.most_rows), d = static_cast<size_t>(a.head_dim);
  const size_t group = static_cast<size_t>(a.query_heads / a.kv_heads);
  return 4 * (rows * d + 16) + 4 * group * (d + (rows / kUnit + 2) * (d + 2));
}

template <class T, int d>
__global__ void __launch_bounds__(kWindowThreads, 1)
    tlin_window_attention(const __grid_constant__ DecodeAttention a) {
  let_next_start();
  extern __shared__ uint4 shared[];
  T* const rows = reinterpret_cast<T*>(shared);
  const int head = blockIdx.x, sequence = blockIdx.y, group = a.query_heads / a.kv_heads;
  const int most = static_cast<int>(a.most_rows);
  const auto base = [&](const void* data, const CachedRows& of) {
    return static_cast<const T*>(data) + sequence * of.sequence_stride + head * of.head_stride;
  };

  // Before the token's own row exists: all others are where they will be. Only `last` may be one
  // behind; then the window's last row but one comes later, too.
  const volatile SequenceState* state = a.state + sequence;
  const int compressed =
      a.context_rows == ContextRows::compressed ? min(max(state->compressed, 0), most) : 0;
  const int cached = static_cast<int>(
      min(max(state->last - state->history, int64_t{0}), int64_t{most - compressed}));
  const RowPlaces places(compressed, most - compressed, d);
  const T* const window_keys = base(a.window.keys, a.window);
  const T* const window_values = base(a.window.values, a.window);
  if (compressed > 0) {
    copy_rows(rows, base(a.context.keys, a.context), 0, compressed * d);
    copy_rows(rows + places.context_values, base(a.context.values, a.context), 0, compressed * d);
  }
  const int begun = cached * d / 8 * 8;
  copy_rows(rows + places.window_keys, window_keys, 0, begun);
  copy_rows(rows + places.window_values, window_values, 0, begun);

  wait_for_previous();
  const bool live = state->live != 0;
  const int window = static_cast<int>(state->last - state->history) + 1;
  float* const queries = reinterpret_cast<float*>(rows + places.end);
  float* const records = queries + group * d;
  if (live) {
    const float* from = a.query + (int64_t{sequence} * a.query_heads + head * group) * d;
    for (int i = threadIdx.x; i < group * d; i += kWindowThreads) queries[i] = __ldcg(from + i);
    copy_rows(rows + places.window_keys, window_keys, begun, window * d);
    copy_rows(rows + places.window_values, window_values, begun, window * d);
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  if (!live) return;
  __syncthreads();

  const int context_units = (compressed + kUnit - 1) / kUnit;
  const int units = context_units + (window + kUnit - 1) / kUnit;
  constexpr int kRecord = d + 2;
  for (int unit = threadIdx.x / 32; unit < units; unit += kWindowThreads / 32) {
    const bool of_context = unit < context_units;
    const int first = (of_context ? unit : unit - context_units) * kUnit;
    const T* keys = rows + (of_context ? 0 : places.window_keys) + first * d;
    const T* values =
        rows + (of_context ? places.context_values : places.window_values) + first * d;
    const int here = min(kUnit, (of_context ? compressed : window) - first);
    for (int i = 0; i < group; ++i) {
      float* const record = records + (i * units + unit) * kRecord;
      attend_unit<T, d>(keys, values, here, queries + i * d,
                        [&](int at, float2 pair) { reinterpret_cast<float2*>(record)[at] = pair; });
    }
  }
  __syncthreads();
  T* const to = static_cast<T*>(a.output) + (int64_t{sequence} * a.query_heads + head * group) * d;
  for (int i = threadIdx.x; i < group * d; i += kWindowThreads) {
    const float* of_query = records + i / d * units * kRecord;
    to[i] = from_float<T>(merge_units(of_query, 0, context_units, kRecord, i % d) +
                          merge_units(of_query, context_units, units, kRecord, i % d));
  }
}

// Whether the rows fit; they must begin where vectors of 16 bytes do.
inline bool takes_window_attention(const DecodeAttention& a) {
  constexpr size_t kRoom = 160 * 1024;
  return a.context_rows != ContextRows::history && !a.window_follows_history && a.most_rows > 0 &&
         a.most_rows < 4096 && window_attention_bytes(a) <= kRoom;
}

template <class T, int d>
void launch_window_attention(const DecodeAttention& a, const Launch& how) {
  launch(how, tlin_window_attention<T, d>, "window attention",
         dim3(static_cast<unsigned>(a.kv_heads), static_cast<unsigned>(a.batch)), kWindowThreads,
         window_attention_bytes(a), a);
}

}  // namespace tlinformer::cuda
