// A block makes all outputs of its 128 rows, or a share of them. The rows' inputs come to shared
// memory once and stay; tiles of 128 rows of gate and as many of up stream past them, 64 inputs at
// a time. One warp issues the copies, two groups of four warps multiply 64 rows each: their sums
// are 128 columns of gate beside the same ones of up, so that a thread activates what it has. A
// group that stores its outputs leaves the tensor cores to the other one.
#include <algorithm>

#include "../dsmem.cuh"
#include "gated.h"
#include "wgmma.cuh"

namespace tlinformer::cuda {
namespace {

constexpr int kRows = 128;
constexpr int kColumns = 128;  // of a tile, in gate and in up
constexpr int kGroups = kRows / 64;
constexpr int kThreads = 128 * kGroups + 32;
constexpr int kStages = 3;
constexpr int kMostChunks = 8;                      // of kTileInputs inputs
constexpr int kInputBytes = kRows * kTileRowBytes;  // a chunk of the block's rows
constexpr int kMatrixBytes = kColumns * kTileRowBytes;
constexpr int kStageBytes = 2 * kMatrixBytes;

// A thread's columns of a tile are in fours of pairs, eight apart. Were the rows of gate and up in
// their own order, no thread had eight neighbours to store at once: so columns 8 q + 2 j + e of
// every 32 lie in row 8 j + 2 q + e of the tile. Such a box has a dimension for each letter.
constexpr int kTogether = 32;

struct Gated {
  CUtensorMap input;     // (rows, D)
  CUtensorMap gate, up;  // (F / 32, 4 (j), 4 (q), 2 (e), D)
  void* hidden;
  int64_t rows;
  int chunks;      // of the inputs
  int last_steps;  // of 16 inputs, in the last chunk
  int outputs;
};

template <class T>
__device__ inline void store_activated(const float (&c)[128], T* to, int64_t stride, bool low,
                                       bool high, int columns) {
#pragma unroll
  for (int group = 0; group < kColumns / kTogether; ++group) {
    if (group * kTogether >= columns) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int gate = 4 * (4 * group + j) + 2 * half, up = gate + kColumns / 2;
        words[j] = pack<T>(silu(c[gate]) * c[up], silu(c[gate + 1]) * c[up + 1]);
      }
      if (half == 0 ? low : high) {
        *reinterpret_cast<uint4*>(to + 8 * half * stride + group * kTogether) = {
            words[0], words[1], words[2], words[3]};
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) tlin_gated_product(const __grid_constant__ Gated p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char unaligned[];
  __shared__ uint64_t barriers[kMostChunks + 2 * kStages];
  const uint32_t inputs =
      (static_cast<uint32_t>(__cvta_generic_to_shared(unaligned)) + 1023) & ~1023u;
  const uint32_t stages = inputs + p.chunks * kInputBytes;
  const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(barriers));
  const auto input_arrived = [&](int chunk) { return here + 8 * chunk; };
  const auto arrived = [&](int stage) { return here + 8 * (kMostChunks + stage); };
  const auto read = [&](int stage) { return here + 8 * (kMostChunks + kStages + stage); };
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.chunks; ++i) dsmem::barrier_init(input_arrived(i), 1);
    for (int i = 0; i < kStages; ++i) {
      dsmem::barrier_init(arrived(i), 1);
      dsmem::barrier_init(read(i), 4 * kGroups);  // warps
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();

  const int tiles = (p.outputs + kColumns - 1) / kColumns;
  const int first = tiles * blockIdx.y / gridDim.y, end = tiles * (blockIdx.y + 1) / gridDim.y;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  int stage = 0, parity = 0;
  const auto turn = [&] {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  };

  if (warp == 4 * kGroups) {
    if (lane > 0) return;
    for (int tile = first; tile < end; ++tile) {
      for (int chunk = 0; chunk < p.chunks; ++chunk, turn()) {
        if (tile == first) {
          dsmem::barrier_expect(input_arrived(chunk), kInputBytes);
          copy_box(inputs + chunk * kInputBytes, &p.input, input_arrived(chunk),
                   {chunk * kTileInputs, static_cast<int>(blockIdx.x) * kRows});
        }
        dsmem::barrier_wait(read(stage), parity ^ 1);  // the first time at once
        dsmem::barrier_expect(arrived(stage), kStageBytes);
        const uint32_t to = stages + stage * kStageBytes;
        const int place[5] = {chunk * kTileInputs, 0, 0, 0, tile * (kColumns / kTogether)};
        copy_box(to, &p.gate, arrived(stage), place);
        copy_box(to + kMatrixBytes, &p.up, arrived(stage), place);
      }
    }
    return;
  }

  const auto release = [&](int done) {
    if (lane == 0) {
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(read(done)) : "memory");
    }
  };
  const uint32_t own_inputs = inputs + warp / 4 * 64 * kTileRowBytes;
  const int64_t row = int64_t{blockIdx.x} * kRows + warp * 16 + lane / 4;
  float sums[128];
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
    const int column = tile * kColumns;
    T* to = static_cast<T*>(p.hidden) + row * p.outputs + column + lane % 4 * 8;
    store_activated<T>(sums, to, p.outputs, row < p.rows, row + 8 < p.rows, p.outputs - column);
  }
#endif
}

template <class T>
bool compiled() {
  // Where the instructions are missing the kernel is empty and needs no memory for barriers.
  static const bool has = [] {
    cudaFuncAttributes attributes{};
    const cudaError_t status = cudaFuncGetAttributes(&attributes, tlin_gated_product<T>);
    if (status != cudaSuccess) cudaGetLastError();
    return status == cudaSuccess && attributes.sharedSizeBytes > 0;
  }();
  return has;
}

// The driver's function, which no library of ours links.
auto tensor_encoder() {
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

}  // namespace

bool takes_gated_product(DType dtype, int64_t inputs, int64_t outputs) {
  bool takes = inputs <= kMostChunks * kTileInputs && inputs % 8 == 0 && outputs % kTogether == 0;
  with_type(dtype, [&](auto tag) { takes = takes && compiled<typename decltype(tag)::type>(); });
  return takes;
}

void gated_product(const GatedProduct& p, const Launch& how) {
  require(takes_gated_product(p.dtype, p.inputs, p.outputs), "no kernel multiplies ", p.inputs,
          " inputs by ", p.outputs, " gated outputs here");
  if (p.rows == 0) return;
  const auto d = static_cast<cuuint64_t>(p.inputs), line = 2 * d;  // bytes
  Gated g;
  g.input = tensor<2>(p.dtype, p.input, {d, static_cast<cuuint64_t>(p.rows)}, {line},
                      {kTileInputs, kRows});
  const auto matrix = [&](const void* data) {
    return tensor<5>(p.dtype, data, {d, 2, 4, 4, static_cast<cuuint64_t>(p.outputs / kTogether)},
                     {line, 8 * line, 2 * line, kTogether * line},
                     {kTileInputs, 2, 4, 4, kColumns / kTogether});
  };
  g.gate = matrix(p.gate);
  g.up = matrix(p.up);
  g.hidden = p.hidden;
  g.rows = p.rows;
  g.chunks = static_cast<int>((p.inputs + kTileInputs - 1) / kTileInputs);
  g.last_steps = static_cast<int>((p.inputs - (g.chunks - 1) * kTileInputs + 15) / 16);
  g.outputs = static_cast<int>(p.outputs);
  const int64_t blocks = (p.rows + kRows - 1) / kRows,
                tiles = (p.outputs + kColumns - 1) / kColumns;
  // Few rows: several blocks share their outputs, so that all multiprocessors have work.
  const int64_t shares = std::clamp<int64_t>(multiprocessors() / blocks, 1, tiles);
  const size_t shared = static_cast<size_t>(g.chunks * kInputBytes + kStages * kStageBytes + 1024);
  with_type(p.dtype, [&](auto tag) {
    launch(how, tlin_gated_product<typename decltype(tag)::type>, "gated_product",
           dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(shares)), kThreads, shared, g);
  });
}

}  // namespace tlinformer::cuda
