// The kernel of prefill_attention on tensor cores: keys stream through shared memory, a warp holds
// 32 query rows, scores and outputs in registers and never writes a score (FlashAttention-2).
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "../numeric.cuh"
#include "dropout_bits.cuh"
#include "prefill_attention.h"

namespace tlinformer::cuda {

// By head size: warps of a block, and blocks whose registers a multiprocessor holds at once.
constexpr int prefill_warps(int d) { return d <= 40 ? 8 : 4; }
constexpr int prefill_blocks(int d) { return d == 48 || d == 64 ? 3 : 2; }
constexpr int prefill_rows(int d) { return 32 * prefill_warps(d); }
// Keys of a tile. Small heads have room for more, and then warps wait for each other half as often.
constexpr int kKeyTile = 64;
constexpr int prefill_keys(int d) { return d <= 40 ? 2 * kKeyTile : kKeyTile; }
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// A call, ready for the device.
struct PrefillPlan {
  PrefillAttention call;
  int parts[2];         // blocks that share the keys of a group; 0, 0: one block reads both groups
  int queries_per_key;  // heads
  float factor;         // > 0: from products to scores to base 2
  uint32_t sign;        // flips the queries where the scale is negative
  float* partial_output;   // (parts, batch, Hq, rows, d), normalised
  float* partial_log_sum;  // (parts, batch, Hq, rows), to base 2
};

template <int d>
struct PrefillTile {
  static constexpr int kThreads = 32 * prefill_warps(d);
  static constexpr int kRows = prefill_rows(d);
  static constexpr int kChunks = (d + 7) / 8;        // 8 elements: a row of ldmatrix's 8 x 8
  static constexpr int kStride = 8 * (kChunks | 1);  // odd, so that ldmatrix meets all banks
  static constexpr int kStages = d > 96 ? 2 : 3;     // each: a matrix of keys, one of values
  static constexpr int kKeys = prefill_keys(d);
  static constexpr int kStageBytes = 2 * kKeys * kStride * 2;
  static constexpr int kBytes = kStages * kStageBytes;
  static constexpr int kSavedBytes = kRows * kChunks * 8 * 4;
  // The values' padding has room for a column of ones, whose product is the softmax's sum.
  static constexpr bool kColumnOfOnes = d % 8 != 0;
};

template <int bytes>
__device__ inline void copy_async(uint32_t to, const void* from, int valid_bytes) {
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(valid_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from),
                 "r"(valid_bytes)
                 : "memory");
  }
}

// Four 8 x 8 matrices; lane i names row i % 8 of matrix i / 8.
template <bool transposed>
__device__ inline void load_matrices(uint32_t (&b)[4], uint32_t row) {
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(row)
                 : "memory");
  }
}

__device__ inline uint2 load_pair(uint32_t shared) {
  uint2 x;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(shared) : "memory");
  return x;
}

// As mma(), but 16 x 8 x 8.
template <class T>
__device__ inline void mma_k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
  }
}

// The thread's index, which the compiler must read again instead of keeping what follows from it
// in registers while keys stream.
__device__ inline unsigned thread_index() {
  unsigned x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// A thread's share of copying tiles: one column of pieces, in every kRows-th row.
template <class T, int d, int kThreads = PrefillTile<d>::kThreads,
          int kKeys = PrefillTile<d>::kKeys>
struct TileCopy {
  using Tile = PrefillTile<d>;
  static constexpr int kPiece = d % 8 == 0 ? 8 : 4;  // rows of 36 are 8-byte aligned only
  static constexpr int kPieces = d / kPiece;
  static constexpr int kRows = kThreads / kPieces;

  const T *keys, *values;  // of the next tile

  __device__ TileCopy(const KeyGroup& group, int64_t batch, int64_t head, int tile) {
    const int thread = thread_index(), row = thread / kPieces, column = thread % kPieces * kPiece;
    const int64_t key = int64_t{tile} * kKeys + row;
    const auto from = [&](const HeadTensor& x) {
      return static_cast<const T*>(x.data) + batch * x.batch_stride + head * x.head_stride +
             key * x.row_stride + column;
    };
    keys = from(group.keys);
    values = from(group.values);
  }

  // Starts copying the next tile into a stage; rows behind the `left` keys become 0.
  __device__ void start(const KeyGroup& group, uint32_t stage, int left) {
    const int thread = thread_index(), row = thread / kPieces;
    const int key_stride = static_cast<int>(group.keys.row_stride);
    const int value_stride = static_cast<int>(group.values.row_stride);
    const uint32_t to = stage + (row * Tile::kStride + thread % kPieces * kPiece) * sizeof(T);
#pragma unroll
    for (int i = 0; i < kKeys; i += kRows) {
      if (row >= kRows || (i + kRows > kKeys && row + i >= kKeys)) break;
      constexpr int kBytes = kPiece * sizeof(T), kValues = kKeys * Tile::kStride * sizeof(T);
      const int bytes = row + i < left ? kBytes : 0;
      const uint32_t place = to + i * Tile::kStride * sizeof(T);
      copy_async<kBytes>(place, keys + key_stride * i, bytes);
      copy_async<kBytes>(place + kValues, values + value_stride * i, bytes);
    }
    keys += key_stride * kKeys;
    values += value_stride * kKeys;
  }
};

// Dropout of a lane's four rows.
struct RowDropout {
  uint32_t rows[2][2];     // their bits
  uint32_t keys = 0;       // shared address of the bits of the step's keys
  uint32_t threshold = 0;  // 0: no dropout
};

// 32 query rows of a warp, as two operands of 16, and what the keys so far made of them. A lane
// holds rows g, g + 8, g + 16 and g + 24 (g = lane / 4), columns 2t and 2t + 1 (t = lane % 4) of
// every eight.
template <class T, int d, bool kDropout = false>
struct WarpRows {
  static constexpr int kChunks = PrefillTile<d>::kChunks;
  // The softmax's sum is that of the weights before dropout.
  static constexpr bool kColumnOfOnes = PrefillTile<d>::kColumnOfOnes && !kDropout;

  uint32_t query[2][(kChunks + 1) / 2][4];
  float output[2][kChunks][4];
  float shift[2][2];  // about minus the largest score; added to all exponents
  float sum[2][2];

  // Calls f(r, h, row) for the lane's rows, counted from the warp's first.
  template <class F>
  static __device__ void each_row(const F& f) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) f(r, h, 16 * r + 8 * h + g);
    }
  }

  // Calls f(chunk, column) for the lane's first column of each chunk, padding left out.
  template <class F>
  static __device__ void each_column(const F& f) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int column = 8 * c + threadIdx.x % 4 * 2;
      if (d % 8 == 0 || column < d) f(c, column);
    }
  }

  __device__ void load_query(const T* from, int64_t stride, int rows, uint32_t sign) {
    each_row([&](int r, int h, int row) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) query[r][c / 2][c % 2 * 2 + h] = 0;
      if (row >= rows) return;
      each_column([&](int c, int column) {
        const T* pair = from + row * stride + column;
        query[r][c / 2][c % 2 * 2 + h] = *reinterpret_cast<const uint32_t*>(pair) ^ sign;
      });
    });
  }

  __device__ void clear() {
    each_row([&](int r, int h, int) {
      shift[r][h] = FLT_MAX;  // finite, so that the exponents of a row without keys are no NaN
      sum[r][h] = 0;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) output[r][c][2 * h] = output[r][c][2 * h + 1] = 0;
    });
  }

  // 32 more keys, from these shared addresses on. Row i sees the first min(left, diagonal + i) of
  // them.
  __device__ void step(uint32_t keys, uint32_t values, float factor, int left, int diagonal,
                       const RowDropout& dropout = {}) {
    constexpr int kRowBytes = PrefillTile<d>::kStride * sizeof(T);
    const int lane = threadIdx.x % 32;
    // Matrices 0 and 1 are a pair of chunks of eight keys, 2 and 3 that of the next eight: the two
    // registers of an operand are neighbours.
    const uint32_t pairs = keys + (lane / 16 * 8 + lane % 8) * kRowBytes + lane / 8 % 2 * 16;
    float score[2][4][4] = {};
#pragma unroll
    for (int c = 0; c < kChunks; c += 2) {
      uint32_t key[2][4];
      if (c + 1 < kChunks) {
        load_matrices<false>(key[0], pairs + 16 * c);
        load_matrices<false>(key[1], pairs + 16 * kRowBytes + 16 * c);
      } else {
        load_matrices<false>(key[0], keys + lane * kRowBytes + 16 * c);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const auto& q = query[r][c / 2];
          if (c + 1 < kChunks) {
            mma<T>(score[r][n], q, key[n / 2][n % 2 * 2], key[n / 2][n % 2 * 2 + 1]);
          } else {
            mma_k8<T>(score[r][n], q[0], q[1], key[0][n]);
          }
        }
      }
    }
    if (min(left, diagonal) < 32) {
      each_row([&](int r, int h, int row) {
        const int visible = min(left, diagonal + row) - threadIdx.x % 4 * 2;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          if (8 * n >= visible) score[r][n][2 * h] = -INFINITY;
          if (8 * n + 1 >= visible) score[r][n][2 * h + 1] = -INFINITY;
        }
      });
    }
    keep_in_range(score, factor);
    uint32_t weight[2][2][4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float first = exp2_fast(fmaf(score[r][n][2 * h], factor, shift[r][h]));
          const float second = exp2_fast(fmaf(score[r][n][2 * h + 1], factor, shift[r][h]));
          if (!kColumnOfOnes) sum[r][h] += first + second;
          weight[r][n / 2][n % 2 * 2 + h] = pack<T>(first, second);
        }
      }
    }
    if (kDropout && dropout.threshold > 0) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const uint2 key = load_pair(dropout.keys + (8 * n + lane % 4 * 2) * sizeof(uint32_t));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t row = dropout.rows[r][h];
            weight[r][n / 2][n % 2 * 2 + h] &=
                kept_halves(row * key.x, row * key.y, dropout.threshold);
          }
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      uint32_t value[4];
      load_matrices<true>(value, values + lane * kRowBytes + 16 * c);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        mma<T>(output[r][c], weight[r][0], value[0], value[1]);
        mma<T>(output[r][c], weight[r][1], value[2], value[3]);
      }
    }
  }

  // Moves `shift` where a score exceeds it so far that weights would leave the range of T. The
  // common case costs a vote.
  __device__ void keep_in_range(const float (&score)[2][4][4], float factor) {
    constexpr float kSlack = 8;  // weights of at most 2^8
    float largest[2][2];
    bool exceeds = false;
    each_row([&](int r, int h, int) {
      float x = fmaxf(score[r][0][2 * h], score[r][0][2 * h + 1]);
#pragma unroll
      for (int n = 1; n < 4; ++n) {
        x = fmaxf(x, fmaxf(score[r][n][2 * h], score[r][n][2 * h + 1]));
      }
      largest[r][h] = x;
      exceeds |= fmaf(x, factor, shift[r][h]) > kSlack;
    });
    if (!__any_sync(0xffffffffu, exceeds)) return;
    each_row([&](int r, int h, int) {
      float x = largest[r][h];
      x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
      x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
      x = fminf(x * -factor, shift[r][h]);
      const float shrink = exp2_fast(x - shift[r][h]);
      shift[r][h] = x;
      if (!kColumnOfOnes) sum[r][h] *= shrink;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        output[r][c][2 * h] *= shrink;
        output[r][c][2 * h + 1] *= shrink;
      }
    });
  }

  // Divides by the sums; leaves the log-sum-exp to base 2 in `sum`, -inf where there was no key.
  __device__ void normalise(float scale = 1) {
    each_row([&](int r, int h, int) {
      float total;
      if constexpr (kColumnOfOnes) {
        total = __shfl_sync(0xffffffffu, output[r][d / 8][2 * h], d % 8 / 2, 4);
      } else {
        total = sum[r][h];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
      }
      const float inverse = total == 0 ? 0 : __fdividef(scale, total);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        output[r][c][2 * h] *= inverse;
        output[r][c][2 * h + 1] *= inverse;
      }
      sum[r][h] = __log2f(total) - shift[r][h];
    });
  }
};

// Which rows and keys are a warp's. Made anew where it is needed, not kept while keys stream.
template <int d>
struct Place {
  int row, rows;  // the warp's first row, and how many there are from it on
  int end_row;    // behind the block's last
  int part, head, batch;
  int64_t index, count;  // of the first row among all

  // A grid is (row tiles, heads, parts * batch).
  __device__ explicit Place(const PrefillAttention& a) {
    constexpr int kRows = PrefillTile<d>::kRows;
    const unsigned sequences = static_cast<unsigned>(a.batch);
    head = blockIdx.y;
    part = blockIdx.z / sequences;
    batch = blockIdx.z % sequences;
    // The last rows first, since causal ones read the most keys.
    const int all = static_cast<int>(a.rows), first = (gridDim.x - 1 - blockIdx.x) * kRows;
    // The shuffle tells the compiler that the whole warp branches alike.
    row = first + __shfl_sync(0xffffffffu, thread_index() / 32, 0) * 32;
    rows = all - row;
    end_row = min(first + kRows, all);
    index = (int64_t{batch} * a.query_heads + head) * a.rows + row;
    count = a.batch * a.query_heads * a.rows;
  }

  template <class T>
  __device__ T* rows_of(const HeadTensor& x) const {
    return static_cast<T*>(x.data) + batch * x.batch_stride + head * x.head_stride +
           row * x.row_stride;
  }
};

// Streams a group's keys past the warp: a whole one, or the block's part of it.
template <class T, int d>
__device__ inline void attend(const PrefillPlan& p, int g, uint32_t stages, WarpRows<T, d>& warp) {
  using Tile = PrefillTile<d>;
  constexpr int kStages = Tile::kStages;
  const Place<d> at(p.call);
  const KeyGroup& group = p.call.groups[g];
  const int offset = static_cast<int>(group.offset);
  int left = static_cast<int>(group.count);
  const int visible = group.causal ? min(left, at.end_row + offset) : left;
  int first = 0, end = (visible - 1) / Tile::kKeys + 1;
  if (p.parts[g] > 0) {
    const int64_t tiles = end, share = at.part - (g == 0 ? 0 : p.parts[0]);
    first = static_cast<int>(tiles * share / p.parts[g]);
    end = static_cast<int>(tiles * (share + 1) / p.parts[g]);
  }
  TileCopy<T, d> copy(group, at.batch, at.head / p.queries_per_key, first);
  int more = end - first;
  left -= first * Tile::kKeys;
  // Row i of the warp sees the first min(left, diagonal + i) keys from here on.
  int diagonal = group.causal ? at.row + offset + 1 - first * Tile::kKeys : left;
  if (at.rows <= 0) diagonal = -(1 << 30);
  warp.clear();
  __syncthreads();  // all have read the last tile of the group before
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < more) copy.start(group, stages + i * Tile::kStageBytes, left - i * Tile::kKeys);
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
#pragma unroll 1
  for (int stage = 0; more > 0; stage = stage + 1 == kStages ? 0 : stage + 1) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
    __syncthreads();  // all of this tile has arrived, and all have read the one before
    if (more >= kStages) {
      const int next = stage == 0 ? kStages - 1 : stage - 1;
      copy.start(group, stages + next * Tile::kStageBytes, left - (kStages - 1) * Tile::kKeys);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    const uint32_t keys = stages + stage * Tile::kStageBytes;
#pragma unroll
    for (int i = 0; i < Tile::kKeys; i += 32) {
      if (min(left, diagonal + 31) <= i) break;
      const uint32_t key = keys + i * Tile::kStride * sizeof(T);
      warp.step(key, key + Tile::kStageBytes / 2, p.factor, left - i, diagonal - i);
    }
    left -= Tile::kKeys;
    diagonal -= Tile::kKeys;
    --more;
  }
  warp.normalise();
}

// Behind the d elements of a row of keys lie zeros, of values a one and zeros: the copies never
// touch them.
template <class T, int d>
__device__ void fill_padding(unsigned char* shared, int stages) {
  using Tile = PrefillTile<d>;
  if constexpr (Tile::kColumnOfOnes) {
    for (int i = threadIdx.x; i < stages * 2 * Tile::kKeys; i += Tile::kThreads) {
      T* padding = reinterpret_cast<T*>(shared) + i * Tile::kStride + d;
      const bool values = i / Tile::kKeys % 2 != 0;
#pragma unroll
      for (int j = 0; j < Tile::kChunks * 8 - d; ++j) {
        padding[j] = from_float<T>(values && j == 0 ? 1.0f : 0.0f);
      }
    }
  }
}

template <class T, int d>
__global__ void __launch_bounds__(PrefillTile<d>::kThreads, prefill_blocks(d))
    tlin_prefill_attention(const __grid_constant__ PrefillPlan p) {
  using Tile = PrefillTile<d>;
  extern __shared__ __align__(16) unsigned char shared[];
  let_next_start();
  fill_padding<T, d>(shared, Tile::kStages);
  wait_for_previous();

  const PrefillAttention& a = p.call;
  const uint32_t stages = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const bool partial = p.parts[0] + p.parts[1] > 0;
  WarpRows<T, d> warp;
  int g = 0;
  {
    const Place<d> at(a);
    warp.load_query(at.template rows_of<T>(a.query), a.query.row_stride, at.rows, p.sign);
    if (partial) {
      g = at.part < p.parts[0] ? 0 : 1;
    }
  }
  warp.clear();
#pragma unroll 1
  for (; g < 2; ++g) {
    if (a.groups[g].count > 0) attend(p, g, stages, warp);
    const Place<d> at(a);
    float* log_sum_exp =
        partial ? p.partial_log_sum + at.part * at.count : a.log_sum_exp + g * at.count;
    if ((partial || a.log_sum_exp != nullptr) && threadIdx.x % 4 == 0) {
      warp.each_row([&](int r, int h, int i) {
        if (i >= at.rows) return;
        const float exponent = a.groups[g].count > 0 ? warp.sum[r][h] : -INFINITY;
        log_sum_exp[at.index + i] = partial ? exponent : exponent * kLn2;
      });
    }
    if (partial) break;
    if (a.groups[0].count == 0 || a.groups[1].count == 0) continue;
    float* saved = reinterpret_cast<float*>(shared + Tile::kBytes) + threadIdx.x;
    warp.each_row([&](int r, int h, int) {  // every thread keeps its own
#pragma unroll
      for (int c = 0; c < Tile::kChunks; ++c) {
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          float& x = saved[((r * Tile::kChunks + c) * 4 + i) * Tile::kThreads];
          if (g == 0) {
            x = warp.output[r][c][i];
          } else {
            warp.output[r][c][i] += x;
          }
        }
      }
    });
  }

  const Place<d> at(a);
  warp.each_row([&](int r, int h, int i) {
    if (i >= at.rows) return;
    warp.each_column([&](int c, int column) {
      const float low = warp.output[r][c][2 * h], high = warp.output[r][c][2 * h + 1];
      if (partial) {
        float* to = p.partial_output + (at.part * at.count + at.index + i) * d + column;
        *reinterpret_cast<float2*>(to) = {low, high};
      } else {
        T* to = at.template rows_of<T>(a.output) + i * a.output.row_stride + column;
        *reinterpret_cast<uint32_t*>(to) = pack<T>(low, high);
      }
    });
  });
}

// Launches the kernel; with `both`, a block reads two groups that have keys.
template <class T>
void launch_prefill(const PrefillPlan& plan, bool both, const Launch& how) {
  const PrefillAttention& a = plan.call;
  const auto launch_for = [&](auto size) {
    constexpr int d = decltype(size)::value;
    using Tile = PrefillTile<d>;
    const int64_t tiles = (a.rows - 1) / Tile::kRows + 1;
    const int parts = plan.parts[0] + plan.parts[1];
    const dim3 grid(static_cast<unsigned>(tiles), a.query_heads,
                    static_cast<unsigned>(a.batch * (parts > 0 ? parts : 1)));
    launch(how, tlin_prefill_attention<T, d>, "tlin_prefill_attention", grid, Tile::kThreads,
           Tile::kBytes + (both ? Tile::kSavedBytes : 0), plan);
  };
#define TLINFORMER_LAUNCH(size) \
  if (a.head_dim == size) return launch_for(std::integral_constant<int, size>{});
  TLINFORMER_HEAD_SIZES(TLINFORMER_LAUNCH)
#undef TLINFORMER_LAUNCH
}

}  // namespace tlinformer::cuda
