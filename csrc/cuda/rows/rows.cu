// Bound by memory: every value is read and written once, by as many warps as the device holds.
#include "norm.cuh"
#include "rows.h"

namespace tlinformer::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

unsigned blocks(int64_t items, int64_t of_a_block) {
  return static_cast<unsigned>((items + of_a_block - 1) / of_a_block);
}

// A warp a row. Of the row's chunks of 4 values each lane takes every 32nd: it keeps kKept of them
// in registers, or (0) reads them again in each of the three passes.
template <class T, int kKept, bool kGather>
__global__ void __launch_bounds__(kThreads) tlin_norm_rows(NormRows n, Norm norm) {
  let_next_start();
  wait_for_previous();
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= n.rows) return;
  const int lane = threadIdx.x % 32, chunks = n.hidden_size / 4;
  const uint2* const embed = kGather
                                 ? static_cast<const uint2*>(n.embed) +
                                       (n.tokens != nullptr ? n.tokens[row] : row) * chunks + lane
                                 : nullptr;
  float4* const x = reinterpret_cast<float4*>(n.x) + row * chunks + lane;

  const auto read = [&](int chunk) {
    if constexpr (kGather) {
      return widened<T>(embed[chunk]);
    } else {
      return x[chunk];
    }
  };
  float4 kept[kKept > 0 ? kKept : 1];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    kept[i] = lane + 32 * i < chunks ? read(32 * i) : float4{0, 0, 0, 0};
  }
  const auto each = [&](const auto& take) {
    if constexpr (kKept > 0) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        if (lane + 32 * i < chunks) take(32 * i, kept[i]);
      }
    } else {
      for (int chunk = 0; lane + chunk < chunks; chunk += 32) take(chunk, read(chunk));
    }
  };

  float sum = 0;
  each([&](int chunk, float4 v) {
    if (kGather && n.x != nullptr) x[chunk] = v;
    sum += sum_of(v);
  });
  if (norm.weight == nullptr) return;
  const float mean = warp_sum(sum) / static_cast<float>(n.hidden_size);
  float squares = 0;
  each([&](int, float4 v) { squares += squares_of(v, mean); });
  const float scale = rsqrtf(warp_sum(squares) / static_cast<float>(n.hidden_size) + norm.epsilon);
  const uint2* const weight = static_cast<const uint2*>(norm.weight) + lane;
  const uint2* const bias = static_cast<const uint2*>(norm.bias) + lane;
  uint2* const to = static_cast<uint2*>(n.normed) + row * chunks + lane;
  each([&](int chunk, float4 v) {
    to[chunk] = normed<T>(v, mean, scale, weight[chunk], bias[chunk]);
  });
}

template <class T, bool kGather>
auto norm_kernel(int hidden_size) {
  if (hidden_size <= 4 * 128) return tlin_norm_rows<T, 4, kGather>;
  if (hidden_size <= 8 * 128) return tlin_norm_rows<T, 8, kGather>;
  return tlin_norm_rows<T, 0, kGather>;
}

struct Heads {  // neighbours in a line, and where its row of them goes
  const void* from = nullptr;
  void* to = nullptr;
  int64_t row_stride = 0, head_stride = 0;  // of `to`
  int64_t first = 0, rows = 0;              // of the lines
  int count = 0;
  bool rotated = false;
};

struct HeadParts {
  Heads parts[5]{};  // q, k, v, and k, v of the rows apart, or some of them
  int64_t line_stride = 0, begin = 0;
  const int32_t* tokens = nullptr;
  Rope rope{};
};

template <class T>
__device__ inline uint32_t rotate(uint32_t word, float2 by) {
  const float2 pair = cuda::rotate(unpack<T>(word), by);
  return pack<T>(pair.x, pair.y);
}

// A thread takes 4 elements of every head of a row and part: the same two angles, computed once.
// Threads are (d / 4, rows), so that neighbours write neighbouring rows of a head of the cache.
template <class T>
__global__ void __launch_bounds__(kThreads, 8)
    tlin_rotate_rows(const __grid_constant__ HeadParts p) {
  let_next_start();
  wait_for_previous();
  const Heads& heads = p.parts[blockIdx.y];
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y, place = heads.first + row;
  if (row >= heads.rows) return;
  float2 first{}, second{};
  if (heads.rotated) {
    first = rotation(p.rope.turns[2 * threadIdx.x], p.begin + place);
    second = rotation(p.rope.turns[2 * threadIdx.x + 1], p.begin + place);
  }
  const int64_t line = p.tokens != nullptr ? p.tokens[place] : place;
  const T* from = static_cast<const T*>(heads.from) + line * p.line_stride + 4 * threadIdx.x;
  T* to = static_cast<T*>(heads.to) + row * heads.row_stride + 4 * threadIdx.x;
  constexpr int kAtOnce = 4;  // loads under way
  for (int h = 0; h < heads.count; h += kAtOnce) {
    uint2 words[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (h + i < heads.count) words[i] = *reinterpret_cast<const uint2*>(from);
      from += 4 * blockDim.x;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (h + i >= heads.count) break;
      if (heads.rotated) words[i] = {rotate<T>(words[i].x, first), rotate<T>(words[i].y, second)};
      *reinterpret_cast<uint2*>(to) = words[i];
      to += heads.head_stride;
    }
  }
}

// A warp a row, 8 values a lane.
template <class T>
__global__ void __launch_bounds__(kThreads, 8)
    tlin_silu_rows(const T* gate_up, T* hidden, int64_t rows, int64_t columns) {
  let_next_start();
  wait_for_previous();
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32, chunks = columns / 8;
  if (row >= rows) return;
  const uint4* const gate = reinterpret_cast<const uint4*>(gate_up) + row * 2 * chunks;
  uint4* const to = reinterpret_cast<uint4*>(hidden) + row * chunks;
  const auto activate = [](uint32_t gate_word, uint32_t up_word) {
    const float2 g = unpack<T>(gate_word), u = unpack<T>(up_word);
    return pack<T>(silu(g.x) * u.x, silu(g.y) * u.y);
  };
  for (int64_t i = threadIdx.x % 32; i < chunks; i += 32) {
    const uint4 g = gate[i], u = gate[chunks + i];
    to[i] = {activate(g.x, u.x), activate(g.y, u.y), activate(g.z, u.z), activate(g.w, u.w)};
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) tlin_widen(const T* from, float* to, int64_t count) {
  let_next_start();
  wait_for_previous();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count) to[i] = to_float(from[i]);
}

}  // namespace

void norm_rows(const NormRows& n, const Launch& how) {
  if (n.rows == 0) return;
  with_type(n.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto kernel = n.embed != nullptr ? norm_kernel<T, true>(n.hidden_size)
                                           : norm_kernel<T, false>(n.hidden_size);
    launch(how, kernel, "norm_rows", blocks(n.rows, kWarps), kThreads, 0, n,
           n.norm != nullptr ? *n.norm : Norm{});
  });
}

void rotate_rows(const RotateRows& r, const Launch& how) {
  if (r.rows == 0) return;
  const int64_t d = r.head_dim;
  require(d % 4 == 0 && d <= 128, "rotate_rows takes heads of up to 128 in steps of 4, not ", d);
  HeadParts p;
  p.begin = r.begin;
  p.rope = r.rope;
  p.line_stride = r.line_stride;
  p.tokens = r.tokens;
  unsigned count = 0;
  int64_t columns = 0;
  const auto take = [&](int64_t column, const Heads& heads) {
    p.parts[count] = heads;
    p.parts[count++].from = static_cast<const char*>(r.lines) + column * size_of(r.dtype);
  };
  if (r.query != nullptr) {
    take(0, {nullptr, r.query, r.query_heads * d, d, 0, r.rows, r.query_heads, true});
    columns = r.query_heads * d;
  }
  const auto cache = [&](const CachePlace& to, int64_t first, int64_t rows) {
    if (to.keys == nullptr || rows == 0) return;
    const int64_t skipped = to.slot * d * size_of(r.dtype);
    Heads heads{
        nullptr, static_cast<char*>(to.keys) + skipped, d, to.head_stride, first, rows, r.kv_heads,
        true};
    take(columns, heads);
    heads.to = static_cast<char*>(to.values) + skipped;
    heads.rotated = false;
    take(columns + r.kv_heads * d, heads);
  };
  cache(r.own, 0, r.apart);
  cache(r, r.apart, r.rows - r.apart);
  if (count == 0) return;
  const dim3 threads(static_cast<unsigned>(d / 4), static_cast<unsigned>(kThreads / (d / 4)));
  with_type(r.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(how, tlin_rotate_rows<T>, "rotate_rows", dim3(blocks(r.rows, threads.y), count), threads,
           0, p);
  });
}

void silu_rows(DType dtype, const void* gate_up, void* hidden, int64_t rows, int64_t columns,
               const Launch& how) {
  if (rows == 0) return;
  with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(how, tlin_silu_rows<T>, "silu_rows", blocks(rows, kWarps), kThreads, 0,
           static_cast<const T*>(gate_up), static_cast<T*>(hidden), rows, columns);
  });
}

void widen(DType dtype, const void* from, float* to, int64_t count, const Launch& how) {
  if (count == 0) return;
  with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(how, tlin_widen<T>, "widen", blocks(count, kThreads), kThreads, 0,
           static_cast<const T*>(from), to, count);
  });
}

}  // namespace tlinformer::cuda
