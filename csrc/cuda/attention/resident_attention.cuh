// Many rows that all see the same few keys: a block keeps the keys of a head in shared memory and
// its warps take 32 rows at a time, without waiting for one another.
#pragma once

#include "prefill_attention.cuh"

namespace tlinformer::cuda {

// Bytes for keys and values with as many blocks as a multiprocessor's registers hold; a block takes
// one kilobyte of its own.
inline int64_t resident_bytes(int d) {
  static const int shared = [] {
    int device = 0, bytes = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
          "cudaDeviceGetAttribute");
    return bytes;
  }();
  return shared / prefill_blocks(d) - 1024;
}

// A grid is (shares of the rows, heads, batch).
template <class T, int d>
__global__ void __launch_bounds__(PrefillTile<d>::kThreads, prefill_blocks(d))
    tlin_resident_attention(const __grid_constant__ PrefillPlan p) {
  using Tile = PrefillTile<d>;
  extern __shared__ __align__(16) unsigned char shared[];
  let_next_start();
  const PrefillAttention& a = p.call;
  const KeyGroup& group = a.groups[0];
  const int count = static_cast<int>(group.count), tiles = (count - 1) / Tile::kKeys + 1;
  fill_padding<T, d>(shared, tiles);
  wait_for_previous();

  const uint32_t stages = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int head = blockIdx.y, batch = blockIdx.z;
  {
    TileCopy<T, d> copy(group, batch, head / p.queries_per_key, 0);
    for (int i = 0; i < tiles; ++i) {
      copy.start(group, stages + i * Tile::kStageBytes, count - i * Tile::kKeys);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  }
  __syncthreads();

  const auto rows_of = [&](const HeadTensor& x, int64_t row) {
    return static_cast<T*>(x.data) + batch * x.batch_stride + head * x.head_stride +
           row * x.row_stride;
  };
  // The shuffle tells the compiler that the whole warp branches alike.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  WarpRows<T, d> own;
  for (int64_t row = 32 * (int64_t{warp} * gridDim.x + blockIdx.x); row < a.rows;
       row += int64_t{gridDim.x} * Tile::kRows) {
    const int rows = static_cast<int>(min(a.rows - row, int64_t{32}));
    own.load_query(rows_of(a.query, row), a.query.row_stride, rows, p.sign);
    own.clear();
#pragma unroll 1
    for (int key = 0; key < count; key += 32) {
      const uint32_t at = stages + key / Tile::kKeys * Tile::kStageBytes +
                          key % Tile::kKeys * Tile::kStride * static_cast<int>(sizeof(T));
      own.step(at, at + Tile::kStageBytes / 2, p.factor, count - key, 1 << 30);
    }
    own.normalise();
    T* const to = rows_of(a.output, row);
    own.each_row([&](int r, int h, int i) {
      if (i >= rows) return;
      own.each_column([&](int c, int column) {
        *reinterpret_cast<uint32_t*>(to + i * a.output.row_stride + column) =
            pack<T>(own.output[r][c][2 * h], own.output[r][c][2 * h + 1]);
      });
    });
  }
}

// False, and nothing is launched, where the keys are too many, masked, or of two groups.
template <class T>
bool launch_resident(const PrefillPlan& plan, const Launch& how) {
  PrefillPlan own = plan;
  PrefillAttention& a = own.call;
  if (a.groups[0].count == 0) std::swap(a.groups[0], a.groups[1]);
  const KeyGroup& group = a.groups[0];
  if (group.count == 0 || group.causal || a.groups[1].count > 0 || a.log_sum_exp != nullptr) {
    return false;
  }
  const auto launch_for = [&](auto size) {
    constexpr int d = decltype(size)::value;
    using Tile = PrefillTile<d>;
    const int64_t bytes = ((group.count - 1) / Tile::kKeys + 1) * Tile::kStageBytes;
    if (bytes > resident_bytes(d)) return false;
    const int64_t heads = a.batch * a.query_heads;
    const int64_t shares = std::clamp<int64_t>(multiprocessors() * prefill_blocks(d) / heads, 1,
                                               (a.rows - 1) / 32 + 1);
    const dim3 grid(static_cast<unsigned>(shares), static_cast<unsigned>(a.query_heads),
                    static_cast<unsigned>(a.batch));
    launch(how, tlin_resident_attention<T, d>, "tlin_resident_attention", grid, Tile::kThreads,
           static_cast<size_t>(bytes), own);
    return true;
  };
#define TLINFORMER_LAUNCH(size) \
  if (a.head_dim == size) return launch_for(std::integral_constant<int, size>{});
  TLINFORMER_HEAD_SIZES(TLINFORMER_LAUNCH)
#undef TLINFORMER_LAUNCH
  return false;
}

}  // namespace tlinformer::cuda
