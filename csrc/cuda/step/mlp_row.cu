// The MLP of a single sequence's token in one kernel. A block has 16 hidden units from both
// products of the first layer, then multiplies them with their columns of the second; the blocks of
// a cluster add these up through their shared memories.
#include "../attention/row_copy.cuh"
#include "../dsmem.cuh"
#include "folded_row.cuh"

namespace tlinformer::cuda {
namespace {

using namespace step;

constexpr int kThreads = 32 * kGateWarps;
constexpr int kOutputs = 32 / 2 * kGateWarps;  // of the block's tiles, one for each warp
constexpr int kCluster = 8;                    // the most blocks that any device allows
constexpr int kOnePass = 2;                    // tiles of a warp: then it has one slice, too
static_assert(kOnePass * kOutputs == kGateWarps * kGateAhead * kSlice);

// A block's 16 columns of a matrix, zeros past the last one, on tensor cores. Lane 4 g + q loads
// half q % 2 of the columns of an output, X = 2 g for q = 0, 1 and Y = 2 g + 1 for q = 2, 3. Its
// four words are an A operand as they lie, words 0 and 2 in row g, words 1 and 3 in row g + 8.
// Columns 0 and 1 of B have the inputs of the former and of the latter for X, zeros for Y; columns
// 2 and 3 for Y; 4 ... 7 are these again. So lane q has both sums of X in its accumulators if q is
// even, of Y if it is odd.
template <class T, int TILES>
class Columns {
 public:
  // Starts to fetch them.
  __device__ Columns(const void* matrix, int inputs, int outputs) {
    const int lane = threadIdx.x % 32, column = blockIdx.x * kTile + lane % 2 * 8;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      const int row = (warp_index() * TILES + i) * kTile + lane / 2;
      words_[i] = load_vector(static_cast<const T*>(matrix) + int64_t{row} * inputs + column,
                              row < outputs && column < inputs);
    }
  }
  // Of output 2 g + q % 2 of tile i; b: what the lane has of B.
  __device__ float sum(int i, uint2 b) const {
    float c[4] = {};
    mma<T>(c, {words_[i].x, words_[i].y, words_[i].z, words_[i].w}, b.x, b.y);
    return c[0] + c[3];
  }

 private:
  uint4 words_[TILES];
};

// The block's 16 inputs of T, where a lane finds its two words of B side by side.
template <class T>
struct Inputs {
  uint2 of_lanes[8];  // the second half is zero

  __device__ void clear() {
    if (threadIdx.x < 4) of_lanes[4 + threadIdx.x] = {0, 0};
  }
  __device__ uint32_t place(int input) const {
    const int word = input / 2, pair = word / 4 * 2 + word % 2;
    return shared_address(of_lanes + pair) + word / 2 % 2 * 4 + input % 2 * 2;
  }
  __device__ uint32_t place_of_lane() const {
    const int column = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    const bool zero = column / 2 % 2 != q / 2;
    return shared_address(of_lanes + (zero ? 4 : q % 2 * 2 + column % 2));
  }
  static __device__ void store(uint32_t place, T value) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(place),
                 "h"(*reinterpret_cast<const uint16_t*>(&value))
                 : "memory");
  }
  static __device__ uint2 load(uint32_t place) {
    uint2 words;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(words.x), "=r"(words.y)
                 : "r"(place)
                 : "memory");
    return words;
  }
};

template <class T, int TILES>
__global__ void __launch_bounds__(kThreads, TILES == kOnePass ? 2 : 1)
    tlin_mlp_row(const __grid_constant__ MlpStep p, float per_width) {
  let_next_start();
  using Product = NormedProduct<T, 2, kGateWarps, kGateAhead, 0>;
  __shared__ typename Product::Shared shared;
  __shared__ Inputs<T> hidden;
  // Of the outputs that this block adds, from all blocks of the cluster.
  __shared__ float sums[kCluster][TILES * kOutputs / kCluster];
  __shared__ uint64_t all_sums;
  Product product(shared, {p.gate, p.up}, p.intermediate_size, p.norm, p.x, {}, p.hidden_size);
  const Columns<T, TILES> down(p.down, p.intermediate_size, p.hidden_size);
  const int width = p.hidden_size, slice = ceil_div(width, kCluster);
  const int rank = blockIdx.x % kCluster, first = rank * slice;
  const int own = min(slice, width - first);
  const uint32_t barrier = shared_address(&all_sums);
  hidden.clear();
  if (threadIdx.x == 0) {
    dsmem::barrier_init(barrier, 1);
    dsmem::barrier_expect(barrier, max(own, 0) * kCluster * static_cast<int>(sizeof(float)));
  }
  dsmem::arrive_at_blocks();
  // A lane sends one output of each pair of tiles to the block that adds it.
  const int lane = threadIdx.x % 32, warp = warp_index();
  uint32_t to[TILES / 2], to_barrier[TILES / 2];
  bool sends[TILES / 2];
#pragma unroll
  for (int i = 0; i < TILES / 2; ++i) {
    const int output = (warp * TILES + 2 * i + lane / 2 % 2) * kTile + lane / 4 * 2 + lane % 2;
    sends[i] = output < width;
    const int owner = sends[i] ? output / slice : 0;
    to[i] = dsmem::address_in_block(
        shared_address(&sums[rank][sends[i] ? output - owner * slice : 0]), owner);
    to_barrier[i] = dsmem::address_in_block(barrier, owner);
  }
  const uint32_t inputs = keep(hidden.place_of_lane());
  const uint32_t own_input = keep(hidden.place(product.output()));
  float* const part = p.parts + blockIdx.x / kCluster * kPartPitch + first + threadIdx.x;
  dsmem::wait_for_blocks();

  wait_for_previous();
  product.start();
  const int live = load_now(&p.state->live, warp * 32 < own);
  product.template multiply<TILES == kOnePass>();
  if (product.finishes()) {
    const float gate = product.value(per_width);
    const float up = __shfl_xor_sync(0xffffffffu, gate, 4);
    if (lane < 4) hidden.store(own_input, from_float<T>(silu(gate) * up));
  }
  __syncthreads();
  const uint2 b = hidden.load(inputs);
#pragma unroll
  for (int i = 0; i < TILES / 2; ++i) {
    const float even = down.sum(2 * i, b), odd = down.sum(2 * i + 1, b);
    if (sends[i]) dsmem::send(to[i], lane / 2 % 2 == 0 ? even : odd, to_barrier[i]);
  }
  if (static_cast<int>(threadIdx.x) >= own) return;
  // Also of a sequence that is not live: no block ends before it has got what others send.
  dsmem::barrier_wait(barrier, 0);
  float sum[4] = {};
#pragma unroll
  for (int block = 0; block < kCluster; ++block) sum[block % 4] += sums[block][threadIdx.x];
  if (live != 0) *part = (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <class F>
void with_kernel(const MlpStep& p, const F& f) {
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    f(p.hidden_size <= kOnePass * kOutputs ? tlin_mlp_row<T, kOnePass> : tlin_mlp_row<T, 4>);
  });
}

int clusters(const MlpStep& p) { return ceil_div(p.intermediate_size, kTile * kCluster); }

}  // namespace

static_assert(kPartPitch == 4 * kOutputs);

int mlp_parts(const MlpStep& p) {
  if (p.hidden_size > kPartPitch || clusters(p) > kMostParts) return 0;
  bool possible = false;
  with_kernel(p, [&](auto kernel) { possible = compiled_for(kernel, 90); });
  return possible ? clusters(p) : 0;
}

void mlp_row(const MlpStep& p, const Launch& how) {
  Launch clustered = how;
  clustered.cluster = kCluster;
  with_kernel(p, [&](auto kernel) {
    launch(clustered, kernel, "mlp_row", static_cast<unsigned>(clusters(p) * kCluster), kThreads, 0,
           p, 1.0f / static_cast<float>(p.hidden_size));
  });
}

}  // namespace tlinformer::cuda
