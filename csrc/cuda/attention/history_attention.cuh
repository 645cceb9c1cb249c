// The decode attention of a single sequence with a long history. Each head's rows, the window's
// first, are cut into as many parts as there are multiprocessors for them. A block's copies begin
// long before the query exists; that of part 0 merges the head's softmaxes.
#pragma once

#include <algorithm>

#include "../dsmem.cuh"
#include "decode_attention.h"
#include "decode_rows.cuh"
#include "mma_rows.cuh"
#include "row_copy.cuh"
#include "speeds.h"

namespace tlinformer::cuda {

// Of all query heads of a pass: their outputs, tops and sums, each in a word with the launch's
// number above it, so that whoever finds the number has the value, too.
template <int D, int H>
constexpr int kRecordWords = H * (D + 2);

// A pass is one reading of a key/value head's rows, for H of its query heads. Its parts are a
// block's work each; the last ones are larger, for multiprocessors that read faster.
struct HistoryParts {
  int parts, passes, passes_each;  // parts of a pass; passes of all heads, and of each
  uint64_t inverse;                // 2^32 / passes, rounded up
  int first_fast;                  // part
  uint32_t step, fast_step;        // what a part and a faster one have, of 2^32
  int window_units;                // of 16 rows, counted as if the window was full
  int heads;                       // query heads of a key/value head
  Speeds speeds;
};
constexpr int kMostHeadsOfPass = 8;
constexpr int kUnit = 16;  // rows: whole lines of 128 bytes, also of 72 bytes each
constexpr int kHistoryThreads = kDecodeThreads + 32;  // the last warp copies

template <int D, int H>
struct HistoryPlaces {
  using Layout = RowLayout<D, 1>;
  using Softmax = PartialSoftmax<D, H>;
  static constexpr int kTile = H == 1 && Layout::kRows >= 8 ? Layout::kRows : 16;  // of a warp
  // That have a stage's rows; others have the next stage's.
  static constexpr int kStageWarps = H > 1 && D > 64 ? kDecodeWarps / 2 : kDecodeWarps;
  static constexpr int kTurns = kDecodeWarps / kStageWarps;
  static constexpr int kRows = kStageWarps * kTile;  // of a stage
  static constexpr int kValues =
      ((kRows + Layout::kAligned - 1) * Layout::kRowBytes + 127) / 128 * 128;  // behind the keys
  static constexpr int kStage = 2 * kValues;
  static constexpr int kSoftmaxes = 2 * kDecodeWarps * static_cast<int>(sizeof(Softmax));
  static constexpr int kMemory = 208 * 1024;  // leaves room for blocks of the neighbours
  static constexpr int kStages = (kMemory - kSoftmaxes) / kStage;
  static constexpr int kRing = kStages * kStage;
  static constexpr int kMostParts = kRing / (kRecordWords<D, H> * 4) - 1;
  static_assert(kStages >= 2);
};

// The scratch holds a count of blocks that have begun, how often each pass was launched, then a
// record a block.
inline int64_t history_counts_bytes(int query_heads) {  // passes are never more than query heads
  return (int64_t{1 + query_heads} * 4 + 15) / 16 * 16;
}

// A warp's rows of a pass, on tensor cores for several query heads.
template <class T, int D, int H>
class MmaPass {
  static constexpr int kRows = HistoryPlaces<D, H>::kTile;
  using Rows = MmaRows<T, D, kRows>;

 public:
  // Of `heads` heads; the others are the last one again.
  __device__ void load_queries(const float* from, int heads, int) {
    query_ = Rows::round(Rows::load(Rows::own_query(from, heads)));
  }
  __device__ void clear() { rows_ = Rows(); }
  // What follows the rows may be NaN.
  __device__ void add(const char* keys, char* values, int rows, int lane) {
    T* const of_values = reinterpret_cast<T*>(values);
    if (rows < kRows) {  // weights of zero do no harm to zeros
      uint2* const to = reinterpret_cast<uint2*>(of_values);
#pragma unroll 1
      for (int i = rows * (D / 4) + lane; i < kRows * (D / 4); i += 32) to[i] = {0, 0};
      order_copies_after_own_stores();
      __syncwarp();
    }
    rows_.add(query_, reinterpret_cast<const T*>(keys), of_values, rows);
  }
  __device__ void store(PartialSoftmax<D, H>& to, int lane) const {
    const int h = lane / 4;
    rows_.finish(H, [&](int at, float2 pair) {
      if (at < D) {
        *reinterpret_cast<float2*>(&to.output[h][at]) = pair;
      } else {
        to.top[h] = pair.x;
        to.sum[h] = pair.y;
      }
    });
  }

 private:
  typename Rows::Query query_;
  Rows rows_;
};
template <class T, int D, int H>
using PassRows = std::conditional_t<H == 1, LaneRows<T, D, 1>, MmaPass<T, D, H>>;

// What the copying warp finds out for the others.
struct HistoryShare {
  int pass, part;
  int begin, end;        // rows of the context
  int history, context;  // rows of a head
};

// Which part this block does: slow multiprocessors count from the first, fast ones from the last.
__device__ inline int next_piece(const HistoryParts& p, uint32_t* begun) {
  unsigned number;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(number));
  const bool fast = number < 256 && p.speeds.fast[number / 32] >> number % 32 & 1;
  const unsigned before = atomicAdd(begun, fast ? 1u << 16 : 1u);
  const int slow_ones = before & 0xffff, fast_ones = before >> 16, all = p.parts * p.passes;
  if (slow_ones + fast_ones == all - 1) {  // for the next launch
    atomicExch(begun, 0u);
    __threadfence();
  }
  return fast ? all - 1 - fast_ones : slow_ones;
}

template <class T, int D, int H>
__global__ void __launch_bounds__(kHistoryThreads, 1)
    tlin_history_attention(const __grid_constant__ DecodeAttention a,
                           const __grid_constant__ HistoryParts p, uint32_t* counts,
                           uint2* records) {
#if __CUDA_ARCH__ >= 900
  using Layout = RowLayout<D, 1>;
  using Places = HistoryPlaces<D, H>;
  using Softmax = typename Places::Softmax;
  constexpr int kStages = Places::kStages, kTile = Places::kTile, kWarps = kDecodeWarps;
  constexpr int kRows = Places::kRows, kWords = kRecordWords<D, H>;
  constexpr int kStageWarps = Places::kStageWarps, kTurns = Places::kTurns;
  extern __shared__ __align__(128) char memory[];
  __shared__ uint64_t arrived[kStages], freed[kStages];
  __shared__ HistoryShare share;
  __shared__ uint32_t launched;
  __shared__ int live;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t* const launches = counts + 1;

  // Of the context, before the previous kernel ends: nothing of it changes within a token.
  if (threadIdx.x == kDecodeThreads) {
    const int history = static_cast<int>(__ldcg(&a.state->history));
    const int compressed = __ldcg(&a.state->compressed);
    const int piece = next_piece(p, counts);
    for (int stage = 0; stage < kStages; ++stage) {
      dsmem::barrier_init(shared_address(&arrived[stage]), 1);
      dsmem::barrier_init(shared_address(&freed[stage]), kWarps * dsmem::kArrivalsOfWarp);
    }
    const int part = static_cast<int>(piece * p.inverse >> 32);
    const int context = a.context_rows == ContextRows::history ? history : compressed;
    const unsigned units = p.window_units + (context + kUnit - 1) / kUnit;
    const auto bound = [&](int i) {
      const uint32_t share_of_fast = max(i - p.first_fast, 0) * p.fast_step;
      const unsigned unit =
          i == p.parts ? units : __umulhi(units, min(i, p.first_fast) * p.step + share_of_fast);
      return min(max(static_cast<int>(unit) - p.window_units, 0) * kUnit, context);
    };
    share = {piece - part * p.passes, part, bound(part), bound(part + 1), history, context};
  }
  __syncthreads();
  let_next_start();
  const int pass = share.pass, part = share.part;
  const int kv_head = H == 1 ? pass : pass / p.passes_each;
  const int pass_of_head = H == 1 ? 0 : pass - kv_head * p.passes_each;
  const bool merges = part == 0;  // and attends to the window
  const int first_row = a.window_follows_history ? share.history : 0;
  const int shift = first_row & (Layout::kAligned - 1);
  const auto window_rows = [&] {
    return merges ? static_cast<int>(__ldcg(&a.state->last)) - share.history + 1 : 0;
  };

  if (warp == kWarps) {
    if (lane > 0) return wait_for_previous();
    int stage = 0, round = 0;
    const auto copy = [&](const CachedRows& from, int first, int shifted, int rows) {
      if (round > 0) dsmem::barrier_wait(shared_address(&freed[stage]), (round - 1) & 1);
      const int64_t at = kv_head * from.head_stride + int64_t{first - shifted} * D;
      const int bytes = ((shifted + min(rows, kRows)) * Layout::kRowBytes + 15) / 16 * 16;
      char* const to = memory + stage * Places::kStage;
      const uint32_t barrier = shared_address(&arrived[stage]);
      dsmem::barrier_expect(barrier, 2 * bytes);
      copy_bulk_once(to, static_cast<const T*>(from.keys) + at, bytes, barrier);
      copy_bulk_once(to + Places::kValues, static_cast<const T*>(from.values) + at, bytes, barrier);
      if (++stage == kStages) stage = 0, ++round;
    };
#pragma unroll 1
    for (int row = share.begin; row < share.end; row += kRows) {
      copy(a.context, row, 0, share.end - row);
    }
    wait_for_previous();
    order_copies_after_stores();
    const int window = window_rows();
#pragma unroll 1
    for (int row = 0; row < window; row += kRows) {
      copy(a.window, first_row + row, shift, window - row);
    }
    return;
  }

  wait_for_previous();
  const int heads = min(p.heads - pass_of_head * H, H);
  const int first_head = kv_head * p.heads + pass_of_head * H;
  PassRows<T, D, H> mine;
  mine.load_queries(a.query + first_head * D, heads, lane);
  if (threadIdx.x == 0) {
    launched = __ldcg(launches + pass) + 1;
    live = __ldcg(&a.state->live);
  }
  const int window = window_rows();
  Softmax* const softmaxes = reinterpret_cast<Softmax*>(memory + Places::kRing);
  int stage = 0, turn = warp / kStageWarps;  // turn 0: the stage's rows are of this warp
  uint32_t parity = 0;
#pragma unroll 1
  for (int group = 0; group <= (merges ? 1 : 0); ++group) {
    const int begin = group == 0 ? share.begin : 0, end = group == 0 ? share.end : window;
    char* const own =
        memory + (warp % kStageWarps * kTile + (group == 0 ? 0 : shift)) * Layout::kRowBytes;
    bool any = false;
    mine.clear();
#pragma unroll 1
    for (int row = begin; row < end; row += kRows) {
      // All wait for each stage, also who skips it: a barrier tells a phase from the next alone.
      dsmem::barrier_wait(shared_address(&arrived[stage]), parity);
      if (turn == 0) {
        char* const keys = own + stage * Places::kStage;
        const int rows = min(kTile, end - row - warp % kStageWarps * kTile);
        if (rows > 0) {
          mine.add(keys, keys + Places::kValues, rows, lane);
          any = true;
        }
        __syncwarp();
      }
      dsmem::barrier_arrive_by_warp(shared_address(&freed[stage]), lane);
      if (--turn < 0) turn = kTurns - 1;
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
    Softmax& to = softmaxes[group * kWarps + warp];
    if (any) {
      mine.store(to, lane);
    } else if (lane < H) {
      to.top[lane] = kMinusInfinity;
      to.sum[lane] = 0;
    }
  }
  const auto meet = [] { asm volatile("bar.sync 1, %0;" ::"n"(kDecodeThreads) : "memory"); };
  meet();
  if (live == 0) return;

  const auto merge_warps = [&](const Softmax* of, auto put) {
#pragma unroll 1
    for (int i = threadIdx.x; i < H * D; i += kDecodeThreads) {
      const int h = i / D, e = i % D;
      put(h, e, MergedElement(of, h, e));
    }
  };
  uint2* const to = records + (int64_t{pass} * p.parts + part) * kWords;
  const uint32_t number = launched;
  if (!merges) {
    const auto store = [&](int at, float x) {
      asm volatile("st.relaxed.gpu.global.v2.b32 [%0], {%1, %2};" ::"l"(to + at),
                   "r"(__float_as_uint(x)), "r"(number)
                   : "memory");
    };
    merge_warps(softmaxes, [&](int h, int e, const MergedElement& merged) {
      store(h * (D + 2) + e, merged.output);
      if (e < 2) store(h * (D + 2) + D + e, e == 0 ? merged.top : merged.sum);
    });
    return;
  }
  float* const gathered = reinterpret_cast<float*>(memory);  // of the parts, then the window's
  const auto keep = [&](float* record) {
    return [=](int h, int e, const MergedElement& merged) {
      record[h * (D + 2) + e] = merged.output;
      if (e < 2) record[h * (D + 2) + D + e] = e == 0 ? merged.top : merged.sum;
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
      for (int i = 0; i < kAhead; ++i) all &= word[i].y == number;
    } while (!all);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = min(base + i * kDecodeThreads, words - 1);
      gathered[kWords + at] = __uint_as_float(word[i].x);
    }
  }
  meet();
  if (threadIdx.x == 0) launches[pass] = number;  // all blocks of the pass have read it
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
  launch(
      how, tlin_history_attention<T, D, H>, "history attention", dim3(p.passes * p.parts),
      dim3(kHistoryThreads), Places::kRing + Places::kSoftmaxes, a, p,
      static_cast<uint32_t*>(scratch),
      reinterpret_cast<uint2*>(static_cast<char*>(scratch) + history_counts_bytes(a.query_heads)));
}

// How a single sequence's rows are cut; no parts: the general kernel has to do it.
template <class T, int D, int H>
HistoryParts history_parts(const DecodeAttention& a) {
  using Places = HistoryPlaces<D, H>;
  HistoryParts p{};
  if (a.batch != 1 || a.blocks > 0 || a.most_window_rows <= 0 ||
      a.context_rows == ContextRows::none || !compiled_for(tlin_history_attention<T, D, H>, 90)) {
    return p;
  }
  p.heads = a.query_heads / a.kv_heads;
  p.passes_each = (p.heads + H - 1) / H;
  p.passes = a.kv_heads * p.passes_each;
  p.inverse = ((uint64_t{1} << 32) + p.passes - 1) / p.passes;
  p.window_units = (a.most_window_rows + kUnit - 1) / kUnit;
  p.parts = std::min(multiprocessors() / p.passes, Places::kMostParts);
  if (p.parts * p.passes < multiprocessors() * 4 / 5) p.parts = 0;
  if (a.most_rows > 0) {
    p.parts = static_cast<int>(
        std::min<int64_t>(p.parts, (a.most_rows + Places::kRows - 1) / Places::kRows));
  }
  if (p.parts == 0) return p;
  p.speeds = multiprocessor_speeds();
  // The sums are the same wherever as many are fast: which part a block does changes nothing.
  constexpr double kFaster = 1.3;
  const int fast = std::min(p.speeds.count / p.passes, p.parts - 1);
  p.first_fast = p.parts - fast;
  const double step = 4294967296.0 / (p.first_fast + fast * kFaster);
  p.step = static_cast<uint32_t>(std::min(step, 4294967295.0));
  p.fast_step = static_cast<uint32_t>(std::min(step * kFaster, 4294967295.0));
  return p;
}

}  // namespace tlinformer::cuda
