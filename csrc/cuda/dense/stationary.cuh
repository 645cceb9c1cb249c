// The frame of the products whose epilogues are our own. A block makes all outputs of its 128 rows,
// or a share of them. The rows' inputs come to shared memory once and stay; tiles of 128 rows of
// the weights stream past them, 64 inputs at a time. One warp issues the copies, two groups of four
// warps multiply 64 rows each; while one stores its outputs the other has the tensor cores.
#pragma once

#include <algorithm>

#include "../dsmem.cuh"
#include "../launch.cuh"
#include "wgmma.cuh"

namespace tlinformer::cuda {

constexpr int kBlockRows = 128;
constexpr int kTileColumns = 128;  // of each matrix
constexpr int kWarpGroups = kBlockRows / 64;
constexpr int kStationaryThreads = 128 * kWarpGroups + 32;
constexpr int kMostChunks = 8;                           // of kTileInputs inputs
constexpr int kInputBytes = kBlockRows * kTileRowBytes;  // a chunk of the block's rows
constexpr int kMatrixBytes = kTileColumns * kTileRowBytes;

template <int kMatrices>
constexpr int kStages = kMatrices == 2 ? 3 : 4;

// A thread's columns of a tile are pairs, eight apart. Were the weights' rows in their own order,
// it had no more than two neighbours to store at once. So in every kTogether = 8 pairs' columns,
// output 2 pairs q + 2 j + e lies in row 8 j + 2 q + e of the tile (q < 4, j < pairs, e < 2): the
// boxes that are copied have a dimension for each letter, and a thread has 2 pairs neighbours.
template <int kMatrices>
struct Stationary {
  CUtensorMap input;                // (rows, inputs)
  CUtensorMap matrices[kMatrices];  // (outputs / kTogether, j, q, e, inputs)
  int64_t rows;
  int outputs;     // of each matrix
  int together;    // kTogether
  int chunks;      // of the inputs
  int last_steps;  // of 16 inputs, in the last chunk

  __host__ __device__ int stages_at() const { return chunks * kInputBytes; }
  __host__ __device__ int end() const {
    return stages_at() + kStages<kMatrices> * kMatrices * kMatrixBytes;
  }
};

// Where a block's shared memory begins: 1024 bytes more than needed are taken.
__device__ inline uint32_t aligned_memory() {
  extern __shared__ unsigned char unaligned[];
  return (static_cast<uint32_t>(__cvta_generic_to_shared(unaligned)) + 1023) & ~1023u;
}

// The body of a kernel. begin(group) is called by each thread of a group before its first product;
// store(sums, row, column) takes a tile from that column on: rows `row` and `row` + 8, sums as
// multiply_tile leaves them, one matrix behind the other.
template <class T, int kMatrices, class Begin, class Store>
__device__ inline void multiply_stationary(const Stationary<kMatrices>& p, const Begin& begin,
                                           const Store& store) {
  constexpr int kRing = kStages<kMatrices>, kStageBytes = kMatrices * kMatrixBytes;
  __shared__ uint64_t barriers[kMostChunks + 2 * kRing];
  const uint32_t inputs = aligned_memory(), stages = inputs + p.stages_at();
  const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(barriers));
  const auto input_arrived = [&](int chunk) { return here + 8 * chunk; };
  const auto arrived = [&](int stage) { return here + 8 * (kMostChunks + stage); };
  const auto read = [&](int stage) { return here + 8 * (kMostChunks + kRing + stage); };
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.chunks; ++i) dsmem::barrier_init(input_arrived(i), 1);
    for (int i = 0; i < kRing; ++i) {
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
    if (++stage < kRing) return;
    stage = 0;
    parity ^= 1;
  };

  if (warp == 4 * kWarpGroups) {
    if (lane > 0) return;
    for (int tile = first; tile < end; ++tile) {
      for (int chunk = 0; chunk < p.chunks; ++chunk, turn()) {
        if (tile == first) {
          dsmem::barrier_expect(input_arrived(chunk), kInputBytes);
          copy_box(inputs + chunk * kInputBytes, &p.input, input_arrived(chunk),
                   {chunk * kTileInputs, static_cast<int>(blockIdx.x) * kBlockRows});
        }
        dsmem::barrier_wait(read(stage), parity ^ 1);  // the first time at once
        dsmem::barrier_expect(arrived(stage), kStageBytes);
        const int place[5] = {chunk * kTileInputs, 0, 0, 0, tile * (kTileColumns / p.together)};
#pragma unroll
        for (int m = 0; m < kMatrices; ++m) {
          copy_box(stages + stage * kStageBytes + m * kMatrixBytes, &p.matrices[m], arrived(stage),
                   place);
        }
      }
    }
    return;
  }

  begin(warp / 4);
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
      dsmem::barrier_wait(input_arrived(chunk), 0);
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

inline bool stationary_takes(int64_t inputs, int64_t outputs, int together) {
  return inputs <= kMostChunks * kTileInputs && inputs % 8 == 0 && outputs % together == 0;
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

// A tensor of 16-bit elements as boxes of 64 of its innermost dimension; outside are zeros.
template <int kDimensions>
CUtensorMap tensor(DType dtype, const void* data, const cuuint64_t (&sizes)[kDimensions],
                   const cuuint64_t (&strides)[kDimensions - 1],
                   const cuuint32_t (&box)[kDimensions]) {
  CUtensorMap map;
  cuuint32_t steps[kDimensions];
  std::fill(steps, steps + kDimensions, 1);
  const CUresult status = tensor_encoder()(
      &map,
      dtype == DType::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      kDimensions, const_cast<void*>(data), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  require<Error>(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", int{status});
  return map;
}

// input (rows, inputs), weights (outputs, inputs) each; `pairs` neighbours for a thread.
template <int kMatrices>
Stationary<kMatrices> stationary(DType dtype, const void* input, int64_t rows, int64_t inputs,
                                 const void* const (&weights)[kMatrices], int64_t outputs,
                                 int pairs) {
  Stationary<kMatrices> s;
  const auto d = static_cast<cuuint64_t>(inputs), line = 2 * d;  // bytes
  const auto j = static_cast<cuuint32_t>(pairs);
  s.together = 8 * pairs;
  s.input = tensor<2>(dtype, input, {d, static_cast<cuuint64_t>(rows)}, {line},
                      {kTileInputs, kBlockRows});
  for (int m = 0; m < kMatrices; ++m) {
    s.matrices[m] =
        tensor<5>(dtype, weights[m], {d, 2, 4, j, static_cast<cuuint64_t>(outputs / s.together)},
                  {line, 2 * j * line, 2 * line, 8 * j * line},
                  {kTileInputs, 2, 4, j, static_cast<cuuint32_t>(kTileColumns / s.together)});
  }
  s.rows = rows;
  s.outputs = static_cast<int>(outputs);
  s.chunks = static_cast<int>((inputs + kTileInputs - 1) / kTileInputs);
  s.last_steps = static_cast<int>((inputs - (s.chunks - 1) * kTileInputs + 15) / 16);
  return s;
}

// Few rows: several blocks share their outputs, so that all multiprocessors have work.
template <int kMatrices>
dim3 stationary_grid(const Stationary<kMatrices>& s) {
  const int64_t blocks = (s.rows + kBlockRows - 1) / kBlockRows;
  const int64_t tiles = (s.outputs + kTileColumns - 1) / kTileColumns;
  const int64_t shares = std::clamp<int64_t>(multiprocessors() / blocks, 1, tiles);
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(shares));
}

}  // namespace tlinformer::cuda
