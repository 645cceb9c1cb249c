// The frame of a product whose beginning and end are its caller's. A block makes all outputs of its
// 128 rows, or a share of them. The rows' inputs come to shared memory once and stay; tiles of 128
// rows of both weights stream past them, 64 inputs at a time. One warp issues the copies, two
// groups of four warps multiply 64 rows each; while one stores its outputs the other has the tensor
// cores.
#pragma once

#include <algorithm>

#include "../dsmem.cuh"
#include "../launch.cuh"
#include "wgmma.cuh"

namespace tlinformer::cuda {

constexpr int kMatrices = 2;
constexpr int kBlockRows = 128;
constexpr int kTileColumns = 128;  // of each matrix
constexpr int kWarpGroups = kBlockRows / 64;
constexpr int kStationaryThreads = 128 * kWarpGroups + 32;
constexpr int kMostChunks = 8;                           // of kTileInputs inputs
constexpr int kInputBytes = kBlockRows * kTileRowBytes;  // a chunk of the block's rows
constexpr int kMatrixBytes = kTileColumns * kTileRowBytes;
constexpr int kStageBytes = kMatrices * kMatrixBytes;
constexpr int kStages = 3;

// A thread's columns of a tile are pairs, eight apart. Were the weights' rows in their own order,
// it had no more than two neighbours to store at once. So in every kTogether columns, output
// 2 kPairs q + 2 j + e lies in row 8 j + 2 q + e of the tile (q < 4, j < kPairs, e < 2): the boxes
// that are copied have a dimension for each letter, and a thread has 2 kPairs neighbours.
constexpr int kPairs = 4;  // 16 bytes of a thread
constexpr int kTogether = 8 * kPairs;

struct Stationary {
  CUtensorMap matrices[kMatrices];  // (outputs / kTogether, j, q, e, inputs)
  int64_t rows;
  int inputs;
  int outputs;     // of each matrix
  int chunks;      // of the inputs
  int last_steps;  // of 16 inputs, in the last chunk

  __host__ __device__ int stages_at() const { return chunks * kInputBytes; }
  // 1024 bytes more than needed, to begin where tiles may.
  size_t shared_bytes() const {
    return static_cast<size_t>(stages_at() + kStages * kStageBytes + 1024);
  }
};

// Shared address of 4 inputs, from `input` on, of a row of the block.
__device__ inline uint32_t input_place(uint32_t inputs, int row, int input) {
  const int piece = input % kTileInputs * 2 ^ (row & 7) << 4;
  return inputs + input / kTileInputs * kInputBytes + row * kTileRowBytes + piece;
}

// The body of a kernel. load(inputs) is called by each thread of a warp that multiplies: it puts
// 16 rows of the block, from its warp's 16 * (threadIdx.x / 32) on, where input_place says, and
// zeros behind them up to the end of the last chunk. store(sums, row, column) takes a tile from
// that column on: rows `row` and `row` + 8, sums as multiply_tile leaves them, one matrix behind
// the other.
template <class T, class Load, class Store>
__device__ inline void multiply_stationary(const Stationary& p, const Load& load,
                                           const Store& store) {
  extern __shared__ unsigned char unaligned[];
  __shared__ uint64_t barriers[2 * kStages];
  const uint32_t inputs =
      (static_cast<uint32_t>(__cvta_generic_to_shared(unaligned)) + 1023) & ~1023u;
  const uint32_t stages = inputs + p.stages_at();
  const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(barriers));
  const auto arrived = [&](int stage) { return here + 8 * stage; };
  const auto read = [&](int stage) { return here + 8 * (kStages + stage); };
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      dsmem::barrier_init(arrived(i), 1);
      dsmem::barrier_init(read(i), 4 * kWarpGroups);  // warps
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();

  const int tiles = (p.outputs + kTileColumns - 1) / kTileColumns;
  const int first = tiles * blockIdx.y / gridDim.y, end = tiles * (blockIdx.y + 1) / gridDim.y;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  int stage = 0, parity = 0;
  const auto turn = [&] {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  };

  if (warp == 4 * kWarpGroups) {
    if (lane > 0) return;
    for (int tile = first; tile < end; ++tile) {
      for (int chunk = 0; chunk < p.chunks; ++chunk, turn()) {
        dsmem::barrier_wait(read(stage), parity ^ 1);  // the first time at once
        dsmem::barrier_expect(arrived(stage), kStageBytes);
        const int place[5] = {chunk * kTileInputs, 0, 0, 0, tile * (kTileColumns / kTogether)};
#pragma unroll
        for (int m = 0; m < kMatrices; ++m) {
          copy_box(stages + stage * kStageBytes + m * kMatrixBytes, &p.matrices[m], arrived(stage),
                   place);
        }
      }
    }
    return;
  }

  load(inputs);
  // The products see what was stored once its thread has said so and the whole group has met.
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("bar.sync %0, 128;" ::"r"(1 + warp / 4) : "memory");
  const auto release = [&](int done) {
    if (lane == 0) {
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(read(done)) : "memory");
    }
  };
  const uint32_t own_inputs = inputs + warp / 4 * 64 * kTileRowBytes;
  const int64_t row = int64_t{blockIdx.x} * kBlockRows + warp * 16 + lane / 4;
  float sums[64 * kMatrices];
#pragma unroll 1
  for (int tile = first; tile < end; ++tile) {
    int before = 0;  // the stage of the chunk before
#pragma unroll 1
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      dsmem::barrier_wait(arrived(stage), parity);
      uint64_t a = tile_descriptor(own_inputs + chunk * kInputBytes);
      uint64_t b = tile_descriptor(stages + stage * kStageBytes);
      const int steps = chunk + 1 < p.chunks ? kTileInputs / 16 : p.last_steps;
      begin_products();
#pragma unroll 1
      for (int step = 0; step < steps; ++step, a += 2, b += 2) {
        multiply_tile<T>(sums, a, b, chunk + step == 0);
      }
      end_products();
      if (chunk > 0) {
        wait_for_products<1>();
        release(before);
      }
      before = stage;
      turn();
    }
    wait_for_products<0>();
    release(before);
    store(sums, row, tile * kTileColumns);
  }
}

// Where the instructions are missing a kernel is empty and needs no memory for barriers.
template <class Kernel>
bool has_products(Kernel* kernel) {
  cudaFuncAttributes attributes{};
  const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  if (status != cudaSuccess) cudaGetLastError();
  return status == cudaSuccess && attributes.sharedSizeBytes > 0;
}

inline bool stationary_takes(int64_t inputs, int64_t outputs) {
  return inputs <= kMostChunks * kTileInputs && inputs % 8 == 0 && outputs % kTogether == 0;
}

// The driver's function, which no library of ours links.
inline auto tensor_encoder() {
  static const auto encoder = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                           cudaEnableDefault, &result),
          "cuTensorMapEncodeTiled");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result),
          "cuTensorMapEncodeTiled");
#endif
    require<Error>(result == cudaDriverEntryPointSuccess, "the driver has no tensor copies");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return encoder;
}

// weights (outputs, inputs) each, as boxes of a tile and a chunk; outside are zeros.
inline Stationary stationary(DType dtype, int64_t rows, int64_t inputs,
                             const void* const (&weights)[kMatrices], int64_t outputs) {
  Stationary s;
  const auto d = static_cast<cuuint64_t>(inputs), line = 2 * d;  // bytes
  const cuuint64_t sizes[5] = {d, 2, 4, kPairs, static_cast<cuuint64_t>(outputs / kTogether)};
  const cuuint64_t strides[4] = {line, 2 * kPairs * line, 2 * line, kTogether * line};
  const cuuint32_t box[5] = {kTileInputs, 2, 4, kPairs, kTileColumns / kTogether};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  for (int m = 0; m < kMatrices; ++m) {
    const CUresult status =
        tensor_encoder()(&s.matrices[m],
                         dtype == DType::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                         5, const_cast<void*>(weights[m]), sizes, strides, box, steps,
                         CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                         CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    require<Error>(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", int{status});
  }
  s.rows = rows;
  s.inputs = static_cast<int>(inputs);
  s.outputs = static_cast<int>(outputs);
  s.chunks = static_cast<int>((inputs + kTileInputs - 1) / kTileInputs);
  s.last_steps = static_cast<int>((inputs - (s.chunks - 1) * kTileInputs + 15) / 16);
  return s;
}

// Few rows: several blocks share their outputs, so that all multiprocessors have work.
inline dim3 stationary_grid(const Stationary& s) {
  const int64_t blocks = (s.rows + kBlockRows - 1) / kBlockRows;
  const int64_t tiles = (s.outputs + kTileColumns - 1) / kTileColumns;
  const int64_t shares = std::clamp<int64_t>(multiprocessors() / blocks, 1, tiles);
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(shares));
}

}  // namespace tlinformer::cuda
