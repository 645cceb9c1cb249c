// The decode attention of a single sequence with a long history. Each head's rows, the window's
// first, are cut into as many parts as there are multiprocessors for them; their copies begin long
// before the query exists. The block of part 0 merges the head's softmaxes.
#pragma once

#include <algorithm>

#include "decode_attention.h"
#include "decode_rows.cuh"
#include "row_copy.cuh"

namespace tlinformer::cuda {

// Of all query heads of a pass: their outputs, tops and sums, each in a word with the launch's
// number above it, so that whoever finds the number has the value, too.
template <int D, int H>
constexpr int kRecordWords = H * (D + 2);

// A pass is one reading of a key/value head's rows, for H of its query heads. Blocks: (part, pass
// of the head, head).
struct HistoryParts {
  int parts;         // blocks of a pass
  uint32_t step;     // 2^32 / parts
  int window_units;  // of 16 rows, counted as if the window was full
  int heads;         // query heads of a key/value head
  int passes;        // of a key/value head
};
constexpr int kUnit = 16;  // rows: whole lines of 128 bytes, also of 72 bytes each

template <int D, int H>
struct HistoryPlaces {
  using Layout = RowLayout<D, H>;
  static constexpr int kStage = 2 * Layout::kTileBytes;  // keys, then values
  static constexpr int kSoftmaxes =
      2 * kDecodeWarps * static_cast<int>(sizeof(PartialSoftmax<D, H>));
  static constexpr int kMemory = 208 * 1024;  // leaves room for blocks of the neighbours
  static constexpr int kStages = (kMemory - kSoftmaxes) / (kDecodeWarps * kStage);
  static constexpr int kRing = kDecodeWarps * kStages * kStage;
  static constexpr int kMostParts = kRing / (kRecordWords<D, H> * 4) - 1;
};

// The scratch holds how often each pass was launched, then a record a block.
inline int64_t history_launches_bytes(int query_heads) {  // passes are never more than query heads
  return (int64_t{query_heads} * 4 + 15) / 16 * 16;
}

template <class T, int D, int H>
__global__ void __launch_bounds__(kDecodeThreads, 1)
    tlin_history_attention(const __grid_constant__ DecodeAttention a,
                           const __grid_constant__ HistoryParts p, uint32_t* launches,
                           uint2* records) {
#if __CUDA_ARCH__ >= 900
  using Layout = RowLayout<D, H>;
  using Places = HistoryPlaces<D, H>;
  constexpr int kStages = Places::kStages, kTile = Layout::kTile, kWarps = kDecodeWarps;
  constexpr int kWords = kRecordWords<D, H>, kStep = kWarps * kTile;
  extern __shared__ __align__(128) char memory[];
  __shared__ uint64_t arrived[kWarps][kStages];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  char* const ring = memory + warp * kStages * Places::kStage;
  using Softmax = PartialSoftmax<D, H>;
  Softmax* const softmaxes = reinterpret_cast<Softmax*>(memory + Places::kRing);
  let_next_start();

  // Of the context, before the previous kernel ends: nothing of it changes within a token. Up to
  // the first copy few instructions: their code comes from memory, too.
  __shared__ int lengths[2];  // one thread asks for them: a thousand warps would queue at one word
  const int part = blockIdx.x, head = blockIdx.z;
  if (threadIdx.x == 0) {
    const int64_t history = __ldcg(&a.state->history);
    lengths[0] = static_cast<int>(history);
    lengths[1] = a.context_rows == ContextRows::history ? static_cast<int>(history)
                                                        : __ldcg(&a.state->compressed);
  }
  if (lane < kStages) prepare_copies(&arrived[warp][lane]);
  __syncthreads();
  const int history = lengths[0], context = lengths[1];
  const unsigned units = p.window_units + (context + kUnit - 1) / kUnit;
  const int first_unit = static_cast<int>(__umulhi(units, part * p.step)) - p.window_units;
  const int end_unit =
      static_cast<int>(part + 1 == p.parts ? units : __umulhi(units, (part + 1) * p.step)) -
      p.window_units;
  const int begin = max(first_unit, 0) * kUnit + warp * kTile;
  const int end = min(max(end_unit, 0) * kUnit, context);
  const int64_t first = head * a.context.head_stride + int64_t{begin} * D;
  const T* keys = static_cast<const T*>(a.context.keys) + first;
  const T* values = static_cast<const T*>(a.context.values) + first;
  int stage = 0;  // of the next copy, and of the next tile to read
  const auto copy = [&](const T* from_keys, const T* from_values, int rows) {
    char* const to = ring + stage * Places::kStage;
    const int bytes = (rows * Layout::kRowBytes + 15) / 16 * 16;
    const uint32_t barrier = shared_address(&arrived[warp][stage]);
    expect_copies(2 * bytes, &arrived[warp][stage], lane);
    if (lane > 0) return;
    copy_bulk_once(to, from_keys, bytes, barrier);
    copy_bulk_once(to + Layout::kTileBytes, from_values, bytes, barrier);
  };
  int next = begin;  // row of the context to fetch
  const auto copy_context = [&] {
    copy(keys, values, min(kTile, end - next));
    next += kStep;
    keys += int64_t{kStep} * D;
    values += int64_t{kStep} * D;
  };
  const auto turn = [&](uint32_t& parity) {
    if (++stage == kStages) stage = 0, parity ^= 1;
  };
  uint32_t parity = 0;
  int free = kStages;
#pragma unroll 1
  for (; free > 0 && next < end; --free) {
    copy_context();
    turn(parity);
  }
  int fetched = stage;
  stage = parity = 0;

  wait_for_previous();
  order_copies_after_stores();
  const bool merges = part == 0;
  const int pass = head * p.passes + blockIdx.y;
  const int heads = min(p.heads - static_cast<int>(blockIdx.y) * H, H);
  const int first_head = head * p.heads + blockIdx.y * H;
  LaneRows<T, D, H> mine;
  mine.load_queries(a.query + first_head * D, heads, lane);
  __shared__ uint32_t launched_by_now;
  __shared__ int is_live;
  if (threadIdx.x == 0) {
    launched_by_now = __ldcg(launches + pass) + 1;
    is_live = __ldcg(&a.state->live);
  }
  // The window, by the block that merges.
  const int window = merges ? static_cast<int>(__ldcg(&a.state->last)) - history + 1 : 0;
  const int first_row = a.window_follows_history ? history : 0;
  const int shift = first_row & (Layout::kAligned - 1);
  int window_next = warp * kTile;
  const auto copy_next = [&] {
    const int reading = stage;
    stage = fetched;
    if (next < end) {
      copy_context();
    } else if (window_next < window) {
      const int64_t at = head * a.window.head_stride + int64_t{first_row + window_next - shift} * D;
      copy(static_cast<const T*>(a.window.keys) + at, static_cast<const T*>(a.window.values) + at,
           shift + min(kTile, window - window_next));
      window_next += kStep;
    } else {
      stage = reading;
      return false;
    }
    if (++fetched == kStages) fetched = 0;
    stage = reading;
    return true;
  };
#pragma unroll 1
  while (free > 0 && copy_next()) --free;

#pragma unroll 1
  for (int group = 0; group <= (merges ? 1 : 0); ++group) {
    const int last = group == 0 ? end : window;
    bool any = false;
    mine.clear();
#pragma unroll 1
    for (int row = group == 0 ? begin : warp * kTile; row < last; row += kStep) {
      await_tile<kStages>(&arrived[warp][stage], parity, false);
      mine.add(ring + stage * Places::kStage + (group == 0 ? 0 : shift * Layout::kRowBytes),
               min(kTile, last - row), lane);
      any = true;
      __syncwarp();
      turn(parity);
      copy_next();
    }
    Softmax& own = softmaxes[group * kWarps + warp];
    if (any) {
      mine.store(own, lane);
    } else if (lane < H) {
      own.top[lane] = kMinusInfinity;
      own.sum[lane] = 0;
    }
  }
  __syncthreads();
  if (is_live == 0) return;
  const uint32_t launched = launched_by_now;

  // Of the block's warps; `put` takes an element's head, number, share of the output, top and sum.
  const auto merge_warps = [&](const Softmax* of, auto put) {
#pragma unroll 1
    for (int i = threadIdx.x; i < H * D; i += kDecodeThreads) {
      const int h = i / D, e = i % D;
      float top = kMinusInfinity, sum = 0, output = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) top = fmaxf(top, of[w].top[h]);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (of[w].sum[h] == 0) continue;
        const float weight = exp2_fast(of[w].top[h] - top);
        sum += weight * of[w].sum[h];
        output += weight * of[w].output[h][e];
      }
      put(h, e, output, top, sum);
    }
  };
  uint2* const to = records + (int64_t{pass} * p.parts + part) * kWords;
  if (!merges) {
    const auto store = [&](int at, float x) {
      asm volatile("st.relaxed.gpu.global.v2.b32 [%0], {%1, %2};" ::"l"(to + at),
                   "r"(__float_as_uint(x)), "r"(launched)
                   : "memory");
    };
    merge_warps(softmaxes, [&](int h, int e, float output, float top, float sum) {
      store(h * (D + 2) + e, output);
      if (e < 2) store(h * (D + 2) + D + e, e == 0 ? top : sum);
    });
    return;
  }
  float* const gathered = reinterpret_cast<float*>(memory);  // of the parts, then the window's
  const auto keep = [&](float* record) {
    return [=](int h, int e, float output, float top, float sum) {
      record[h * (D + 2) + e] = output;
      if (e < 2) record[h * (D + 2) + D + e] = e == 0 ? top : sum;
    };
  };
  merge_warps(softmaxes, keep(gathered));
  merge_warps(softmaxes + kWarps, keep(gathered + p.parts * kWords));
  const int words = (p.parts - 1) * kWords;
  constexpr int kAhead = 4;
#pragma unroll 1
  for (int base = threadIdx.x; base < words; base += kAhead * kDecodeThreads) {
    uint2 word[kAhead];
    bool all;
    do {
      all = true;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int at = min(base + i * kDecodeThreads, words - 1);
        asm volatile("ld.relaxed.gpu.global.v2.b32 {%0, %1}, [%2];"
                     : "=r"(word[i].x), "=r"(word[i].y)
                     : "l"(to + kWords + at)
                     : "memory");
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) all &= word[i].y == launched;
    } while (!all);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = min(base + i * kDecodeThreads, words - 1);
      gathered[kWords + at] = __uint_as_float(word[i].x);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) launches[pass] = launched;  // all blocks of the pass have read it
  T* const output = static_cast<T*>(a.output) + first_head * D;
#pragma unroll 1
  for (int i = threadIdx.x; i < H * D; i += kDecodeThreads) {
    const int h = i / D, e = i % D;
    if (h >= heads) continue;
    const float* const head_records = gathered + h * (D + 2);
    float top = kMinusInfinity, sum = 0, total = 0;
#pragma unroll 8
    for (int r = 0; r < p.parts; ++r) top = fmaxf(top, head_records[r * kWords + D]);
#pragma unroll 8
    for (int r = 0; r < p.parts; ++r) {
      const float* const record = head_records + r * kWords;
      const float weight = record[D + 1] == 0 ? 0.0f : exp2_fast(record[D] - top);
      sum += weight * record[D + 1];
      total += weight * record[e];
    }
    const float* const of_window = head_records + p.parts * kWords;
    output[i] = from_float<T>((sum == 0 ? 0.0f : total / sum) + of_window[e] / of_window[D + 1]);
  }
#endif
}

template <class T, int D, int H>
void launch_history_attention(const DecodeAttention& a, const HistoryParts& p, void* scratch,
                              const Launch& how) {
  using Places = HistoryPlaces<D, H>;
  launch(how, tlin_history_attention<T, D, H>, "history attention",
         dim3(p.parts, p.passes, a.kv_heads), dim3(kDecodeThreads),
         Places::kRing + Places::kSoftmaxes, a, p, static_cast<uint32_t*>(scratch),
         reinterpret_cast<uint2*>(static_cast<char*>(scratch) +
                                  history_launches_bytes(a.query_heads)));
}

// How a single sequence's rows are cut; no parts: the general kernel has to do it.
template <class T, int D, int H>
HistoryParts history_parts(const DecodeAttention& a) {
  HistoryParts p{};
  if (a.batch != 1 || a.blocks > 0 || a.most_window_rows <= 0 ||
      a.context_rows == ContextRows::none || !compiled_for(tlin_history_attention<T, D, H>, 90)) {
    return p;
  }
  p.heads = a.query_heads / a.kv_heads;
  p.passes = (p.heads + H - 1) / H;
  p.window_units = (a.most_window_rows + kUnit - 1) / kUnit;
  const int passes = a.kv_heads * p.passes;
  p.parts = std::min(multiprocessors() / passes, HistoryPlaces<D, H>::kMostParts);
  if (a.most_rows > 0) {
    constexpr int kLeast = kDecodeWarps * RowLayout<D, H>::kTile;
    p.parts = static_cast<int>(std::min<int64_t>(p.parts, (a.most_rows + kLeast - 1) / kLeast));
  } else if (p.parts * passes < multiprocessors() * 4 / 5) {
    p.parts = 0;
  }
  if (p.parts > 0) p.step = static_cast<uint32_t>((uint64_t{1} << 32) / p.parts);
  return p;
}

}  // namespace tlinformer::cuda
