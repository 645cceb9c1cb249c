// Weight matrices streamed through registers into tensor cores, for products with few rows.
#pragma once

#include "../launch.cuh"
#include "../numeric.cuh"

namespace tlinformer::cuda::step {

// A warp multiplies tiles of 16 outputs by slices of 32 inputs, two mma a slice, with the weights
// as their A operand and the rows of the batch as columns of B. A dot product allows any order of
// its inputs: lane 4 g + q takes inputs 8 q ... 8 q + 7 of outputs g and g + 8, two loads of 16
// bytes, and the same inputs of row g of the batch. The words of these vectors are its fragments.
constexpr int kTile = 16;
constexpr int kSlice = 32;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The same value in all lanes, and known to be: all lanes must call.
__device__ inline int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }

// Zeros if not `inside`. Not ld.global.nc, which the assembler moves behind wait_for_previous().
__device__ inline uint4 load_vector(const void* from, bool inside) {
  uint4 v = {0, 0, 0, 0};
  asm volatile(
      "{ .reg .pred inside; setp.ne.s32 inside, %5, 0;\n"
      "@inside ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4]; }"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(from), "r"(int{inside}));
  return v;
}

// Results of a warp: of 16 outputs of each matrix for NT x 8 rows, as mma leaves them.
template <int MATRICES, int NT>
struct Sums {
  static constexpr int kChains = NT == 1 ? 2 : 1;  // one chain of dependent mma would take longer
  float c[MATRICES][NT][kChains][4] = {};

  // Of output g + 8 (i / 2) and row 8 n + 2 q + i % 2.
  __device__ float at(int m, int n, int i) const {
    float sum = c[m][n][0][i];
    if constexpr (kChains == 2) sum += c[m][n][1][i];
    return sum;
  }
};

// Keeps AHEAD slices of a tile in flight; slices first, first + step, ... of every tile are its
// own. ONCE: the weights are too many to stay in L2 until the next token, so they leave it first.
template <class T, int MATRICES, int AHEAD, bool ONCE = false>
class WeightStream {
 public:
  __device__ WeightStream(const void* const (&matrices)[MATRICES], int inputs, int outputs,
                          int first, int step)
      : inputs_(inputs), outputs_(outputs), first_(first), step_(step) {
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) matrices_[m] = static_cast<const T*>(matrices[m]);
    if constexpr (ONCE) {
      asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy_));
    }
  }

  __device__ void start(int tile) {
    aim(tile);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) load(i, first_ + i * step_);
  }

  static constexpr int kNone = -1;

  // Adds the products of the tile started last, and starts the next (which need not exist).
  // `inputs` gives the B fragments: load(i, slice) is called ahead of at(i, slice, n).
  template <int NT, class Inputs>
  __device__ void multiply(Inputs& inputs, Sums<MATRICES, NT>& sums, int next_tile = kNone) {
    const int slices = ceil_div(inputs_, kSlice);
    const int stride = AHEAD * step_;
#pragma unroll 1
    for (int slice = first_; slice < slices; slice += stride) {
      const bool last = slice + stride >= slices;
      const bool refill = !last || next_tile != kNone;
      if (last && refill) aim(next_tile);
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const int now = slice + i * step_;
        if (now < slices) {
          uint4 b[NT];
#pragma unroll
          for (int n = 0; n < NT; ++n) b[n] = inputs.at(i, now, n);
#pragma unroll
          for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int m = 0; m < MATRICES; ++m) {
              const uint4 low = low_[i][m], high = high_[i][m];
              auto& c = sums.c[m][n];
              mma<T>(c[0], {low.x, high.x, low.y, high.y}, b[n].x, b[n].y);
              mma<T>(c[Sums<MATRICES, NT>::kChains - 1], {low.z, high.z, low.w, high.w}, b[n].z,
                     b[n].w);
            }
          }
        }
        if (refill) load(i, last ? first_ + i * step_ : now + stride);
        if (!last) inputs.load(i, now + stride);
      }
    }
  }

 private:
  __device__ void aim(int tile) {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    const bool exists = tile < ceil_div(outputs_, kTile);
    limit_ = exists ? inputs_ - 8 * q : 0;
    const int output = exists ? tile * kTile + g : 0;
    // Outputs past the end repeat the last one; nobody stores them.
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
      from_low_[m] = matrices_[m] + int64_t{min(output, outputs_ - 1)} * inputs_ + 8 * q;
      from_high_[m] = matrices_[m] + int64_t{min(output + 8, outputs_ - 1)} * inputs_ + 8 * q;
    }
  }

  __device__ void load(int i, int slice) {
    const int k = slice * kSlice;
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
      low_[i][m] = load_once(from_low_[m] + k, k < limit_);
      high_[i][m] = load_once(from_high_[m] + k, k < limit_);
    }
  }

  __device__ uint4 load_once(const T* from, bool inside) const {
    if constexpr (!ONCE) return load_vector(from, inside);
    uint4 v = {0, 0, 0, 0};
    asm volatile(
        "{ .reg .pred inside; setp.ne.s32 inside, %6, 0;\n"
        "@inside ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5; }"
        : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
        : "l"(from), "l"(policy_), "r"(int{inside}));
    return v;
  }

  const T *matrices_[MATRICES], *from_low_[MATRICES], *from_high_[MATRICES];
  int inputs_, outputs_, first_, step_;
  int limit_ = 0;  // inputs from here on are outside
  uint64_t policy_ = 0;
  uint4 low_[AHEAD][MATRICES], high_[AHEAD][MATRICES];
};

// The sums of a block whose warps shared out the slices, brought together in shared memory.
template <int WARPS, int MATRICES, int NT>
class BlockSums {
 public:
  static constexpr int kColumn = kTile + 4;  // puts the lanes of a store into different banks
  static constexpr int kBytes = sizeof(float) * WARPS * MATRICES * NT * 8 * kColumn;

  __device__ explicit BlockSums(void* shared) : shared_(static_cast<float*>(shared)) {}

  __device__ void put(const Sums<MATRICES, NT>& sums, int warp, int rows) {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = 8 * n + 2 * q + i % 2;
          if (row < rows) *place(warp, m, row, g + i / 2 * 8) = sums.at(m, n, i);
        }
      }
    }
    __syncthreads();
  }

  // Of an even output and the next one.
  __device__ float2 pair(int m, int row, int output) const {
    float2 sum = {0, 0};
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) {
      const float2 part = *reinterpret_cast<const float2*>(place(warp, m, row, output));
      sum.x += part.x;
      sum.y += part.y;
    }
    return sum;
  }

 private:
  __device__ float* place(int warp, int m, int row, int output) const {
    return shared_ + ((warp * MATRICES + m) * NT * 8 + row) * kColumn + output;
  }

  float* shared_;
};

}  // namespace tlinformer::cuda::step
