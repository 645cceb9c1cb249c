// The products of a single sequence's token for models so wide that the bytes of their weights, not
// the latency of their kernels, take the time. Each multiprocessor has one block, which streams its
// share of a matrix through a ring in shared memory: whole rows, as they lie in memory. The ring
// fills the memory: where there is room for two blocks, the first kernel puts two on half of the
// multiprocessors, and all that follow do the same. The vector stays in registers, in float32, and
// CUDA cores suffice: they need a fifth of the issue slots.
#include <cmath>

#include "../attention/row_copy.cuh"
#include "../dsmem.cuh"
#include "../rope.cuh"
#include "../warp_state.cuh"
#include "product.h"
#include "weight_stream.cuh"

namespace tlinformer::cuda {
namespace {

using namespace step;

constexpr int kWarps = 8, kThreads = 32 * kWarps;  // that multiply; one more warp copies
constexpr int kWide = 8;                           // elements of a load
constexpr int kLoads = 8;                          // of a thread in a stage
constexpr int kStages = 6, kStageBytes = kLoads * kThreads * kWide * 2;

// The threads that multiply.
[[maybe_unused]] __device__ inline void meet() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// Of an output, each warp's part.
using WarpSums = float[kWarps];

template <int N>
__device__ float sum_of(const float (&parts)[N]) {
  float sum = 0;
#pragma unroll
  for (const float part : parts) sum += part;
  return sum;
}

// A block's outputs, whole units of them: as many as any other block's, or one unit more.
struct Share {
  int begin, count;

  __device__ Share(int outputs, int unit) {
    const unsigned units = outputs / unit;
    begin = units * blockIdx.x / gridDim.x * unit;
    count = units * (blockIdx.x + 1) / gridDim.x * unit - begin;
  }
  static int most(int outputs, int unit, int blocks) {
    return (outputs / unit + blocks - 1) / blocks * unit;
  }
};

// A vector of `width` elements. Of these a thread has kWide behind each of its V columns, the
// others are zero.
template <int V>
struct WideVector {
  float elements[V][kWide];

  __device__ static int column(int i) { return (i * kThreads + threadIdx.x) * kWide; }

  // Past the L1 cache: a kernel that may still have run when this one began has written it.
  __device__ void load(const float* from, int width) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
#pragma unroll
      for (int e = 0; e < kWide; e += 4) {
        float4 x = {0, 0, 0, 0};
        if (column(i) < width) x = __ldcg(reinterpret_cast<const float4*>(from + column(i) + e));
        elements[i][e] = x.x, elements[i][e + 1] = x.y;
        elements[i][e + 2] = x.z, elements[i][e + 3] = x.w;
      }
    }
  }
  template <class T>
  __device__ void load(const T* from, int width) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      uint4 x = {0, 0, 0, 0};
      if (column(i) < width) x = __ldcg(reinterpret_cast<const uint4*>(from + column(i)));
      widen<T>(x, elements[i]);
    }
  }

  template <class T>
  __device__ static void widen(uint4 words, float (&to)[kWide]) {
    const float2 a = unpack<T>(words.x), b = unpack<T>(words.y), c = unpack<T>(words.z),
                 d = unpack<T>(words.w);
    to[0] = a.x, to[1] = a.y, to[2] = b.x, to[3] = b.y;
    to[4] = c.x, to[5] = c.y, to[6] = d.x, to[7] = d.y;
  }
};

// A LayerNorm of such a vector.
template <class T, int V>
class WideNorm {
 public:
  // Starts to fetch the parameters, which do not change within a token.
  __device__ WideNorm(const Norm& norm, int width) : epsilon_(norm.epsilon) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int at = WideVector<V>::column(i);
      weight_[i] = load_vector(static_cast<const T*>(norm.weight) + at, at < width);
      bias_[i] = load_vector(static_cast<const T*>(norm.bias) + at, at < width);
    }
  }
  __device__ void apply(WideVector<V>& x, float per_width) const {
    __shared__ float2 measures[kWarps];
    float2 sums = {0, 0};  // of the elements and of their squares
#pragma unroll
    for (int i = 0; i < V; ++i) {
#pragma unroll
      for (const float e : x.elements[i]) sums.x += e, sums.y += e * e;
    }
    float both[2] = {sums.x, sums.y};
    warp_sums(both);
    if (threadIdx.x % 32 == 0) measures[threadIdx.x / 32] = {both[0], both[1]};
    meet();
    float2 all = {0, 0};
#pragma unroll
    for (const float2 part : measures) all = {all.x + part.x, all.y + part.y};
    const float mean = all.x * per_width;
    const float scale = rsqrtf(fmaxf(all.y * per_width - mean * mean, 0.0f) + epsilon_);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float weight[kWide], bias[kWide];
      WideVector<V>::template widen<T>(weight_[i], weight);
      WideVector<V>::template widen<T>(bias_[i], bias);
#pragma unroll
      for (int e = 0; e < kWide; ++e) {
        x.elements[i][e] = (x.elements[i][e] - mean) * scale * weight[e] + bias[e];
      }
    }
  }

 private:
  float epsilon_;
  uint4 weight_[V], bias_[V];
};

// The rows of the block's share, of one matrix after the other.
template <class T, int MATRICES, int V>
class WideStream {
  static constexpr int kRows = kLoads / V;  // of a stage

 public:
  struct Shared {
    uint64_t arrived[kStages], freed[kStages];
  };

  // By the first thread of the last warp. `memory`: the stages.
  __device__ static void prepare(Shared& shared) {
    for (int stage = 0; stage < kStages; ++stage) {
      dsmem::barrier_init(shared_address(&shared.arrived[stage]), 1);
      dsmem::barrier_init(shared_address(&shared.freed[stage]), kWarps * dsmem::kArrivalsOfWarp);
    }
  }
  __device__ static void copy(Shared& shared, char* memory, const void* const (&matrices)[MATRICES],
                              int width, const Share& share) {
    int stage = 0, round = 0;
#pragma unroll 1
    for (int m = 0; m < MATRICES; ++m) {
      const T* from = static_cast<const T*>(matrices[m]) + int64_t{share.begin} * width;
#pragma unroll 1
      for (int left = share.count; left > 0; left -= kRows, from += kRows * width) {
        if (round > 0) dsmem::barrier_wait(shared_address(&shared.freed[stage]), (round - 1) & 1);
        const int bytes = min(left, kRows) * width * 2;
        const uint32_t barrier = shared_address(&shared.arrived[stage]);
        dsmem::barrier_expect(barrier, bytes);
        copy_bulk_once(memory + stage * kStageBytes, from, bytes, barrier);
        if (++stage == kStages) stage = 0, ++round;
      }
    }
  }

  // By all warps but the last: sums[m * share.count + i] <- row i of matrix m times x. They meet.
  __device__ static void multiply(Shared& shared, const char* memory, const WideVector<V>& x,
                                  int width, const Share& share, WarpSums* sums) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int stage = 0;
    uint32_t parity = 0;
#pragma unroll 1
    for (int m = 0; m < MATRICES; ++m) {
#pragma unroll 1
      for (int row = 0; row < share.count; row += kRows) {
        const char* const from = memory + stage * kStageBytes + threadIdx.x * (2 * kWide);
        dsmem::barrier_wait(shared_address(&shared.arrived[stage]), parity);
        // What lies behind the last row is anything, and is not stored.
        uint4 words[kRows][V];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const int at = r * 2 * width + i * (2 * kWide * kThreads);
            words[r][i] = {0, 0, 0, 0};
            if (WideVector<V>::column(i) < width) {
              words[r][i] = *reinterpret_cast<const uint4*>(from + at);
            }
          }
        }
        float own[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float even = 0, odd = 0;
#pragma unroll
          for (int i = 0; i < V; ++i) {
            float row_elements[kWide];
            WideVector<V>::template widen<T>(words[r][i], row_elements);
#pragma unroll
            for (int e = 0; e < kWide; e += 2) {
              even += row_elements[e] * x.elements[i][e];
              odd += row_elements[e + 1] * x.elements[i][e + 1];
            }
          }
          own[r] = even + odd;
        }
        __syncwarp();
        dsmem::barrier_arrive_by_warp(shared_address(&shared.freed[stage]), lane);
        if (++stage == kStages) stage = 0, parity ^= 1;
        int first = row, count = kRows;
        sum_scattered<kRows, 1, 0>(own, lane, first, count);
        if (count > 0 && first < share.count) sums[m * share.count + first][warp] = own[0];
      }
    }
    meet();
  }
};

// What the three kernels have in common. inputs(x) makes the vector, after the wait, and returns
// what the end needs beside the sums, so that memory does not idle there for it.
// finish(sums, needed) is called by the threads that multiply.
template <class T, int MATRICES, int V, class Inputs, class Finish>
__device__ void wide_product(const void* const (&matrices)[MATRICES], int width, const Share& share,
                             const Inputs& inputs, const Finish& finish) {
  using Stream = WideStream<T, MATRICES, V>;
  extern __shared__ __align__(128) char memory[];
  __shared__ typename Stream::Shared shared;
  if (threadIdx.x == kThreads) Stream::prepare(shared);
  __syncthreads();
  if (threadIdx.x >= kThreads) {
    if (threadIdx.x == kThreads) Stream::copy(shared, memory, matrices, width, share);
    return wait_for_previous();
  }
  WideVector<V> x;
  const auto needed = inputs(x);
  WarpSums* const sums = reinterpret_cast<WarpSums*>(memory + kStages * kStageBytes);
  Stream::multiply(shared, memory, x, width, share, sums);
  finish(sums, needed);
}

struct BiasAndRotation {
  int bias;  // of two outputs
  float2 rotation;
};
struct ProjectNeeds {
  WarpState state;
  BiasAndRotation first;  // of the thread's outputs
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads + 32, 1)
    tlin_project_wide(const __grid_constant__ ProjectStep p, float scale, float per_width) {
#if __CUDA_ARCH__ >= 900
  let_next_start();
  const Share share((p.query_heads + 2 * p.kv_heads) * p.head_dim, 2);  // pairs, to be rotated
  const WideNorm<T, V> norm(p.norm, threadIdx.x < kThreads ? p.hidden_size : 0);
  const auto fetch = [&](int i) {
    const unsigned output = share.begin + i, pair = output % p.head_dim / 2;
    const bool wanted = i < share.count;
    return BiasAndRotation{load_now(static_cast<const int*>(p.bias) + output / 2, wanted),
                           load_now(p.rotations + pair, wanted)};
  };
  wide_product<T, 1, V>(
      {p.weight}, p.hidden_size, share,
      [&](WideVector<V>& x) {
        wait_for_previous();
        x.load(p.x, p.hidden_size);
        const WarpState state(p.state, static_cast<int>(threadIdx.x) / 32 * 64 < share.count);
        const BiasAndRotation first = fetch(threadIdx.x * 2);
        norm.apply(x, per_width);
        return ProjectNeeds{state, first};
      },
      [&](const WarpSums* sums, const ProjectNeeds& needed) {
        const WarpState& state = needed.state;
        const NewRows& rows = p.new_rows;
        const int64_t slot = state.last() - (rows.follows_history ? 0 : state.history());
        if (state.live() == 0) return;
        BiasAndRotation own = needed.first;
        for (int i = threadIdx.x * 2; i < share.count; own = fetch(i += 2 * kThreads)) {
          const int output = share.begin + i, head = output / p.head_dim;
          const int element = output - head * p.head_dim;
          const float2 bias = unpack<T>(static_cast<uint32_t>(own.bias));
          const float2 plain = {sum_of(sums[i]) + bias.x, sum_of(sums[i + 1]) + bias.y};
          const float2 turned = rotate(plain, own.rotation);
          if (head < p.query_heads) {
            *reinterpret_cast<float2*>(p.query + output) = {turned.x * scale, turned.y * scale};
            continue;
          }
          const bool is_key = head < p.query_heads + p.kv_heads;
          const int kv_head = head - p.query_heads - (is_key ? 0 : p.kv_heads);
          T* const to = static_cast<T*>(is_key ? rows.keys : rows.values) +
                        kv_head * rows.head_stride + slot * p.head_dim + element;
          *reinterpret_cast<uint32_t*>(to) =
              is_key ? pack<T>(turned.x, turned.y) : pack<T>(plain.x, plain.y);
        }
      });
#endif
}

struct AddNeeds {
  int live;
  float x;  // of the thread's first output
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads + 32, 1)
    tlin_add_wide(const __grid_constant__ AddStep p) {
#if __CUDA_ARCH__ >= 900
  let_next_start();
  const Share share(p.outputs, 1);
  const auto x_before = [&](int i) {
    const float* const from = p.x + share.begin + i;
    return __int_as_float(load_now(reinterpret_cast<const int*>(from), i < share.count));
  };
  wide_product<T, 1, V>(
      {p.weight}, p.inputs, share,
      [&](WideVector<V>& x) {
        wait_for_previous();
        x.load(static_cast<const T*>(p.input), p.inputs);
        const bool finishes = static_cast<int>(threadIdx.x) < share.count;
        return AddNeeds{load_now(&p.state->live, finishes), x_before(threadIdx.x)};
      },
      [&](const WarpSums* sums, const AddNeeds& needed) {
        if (needed.live == 0) return;
        float x = needed.x;
        for (int i = threadIdx.x; i < share.count; x = x_before(i += kThreads)) {
          const int output = share.begin + i;
          float bias = 0;
          if (p.bias != nullptr) bias = to_float(static_cast<const T*>(p.bias)[output]);
          p.x[output] = x + (sum_of(sums[i]) + bias);
        }
      });
#endif
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads + 32, 1)
    tlin_gate_wide(const __grid_constant__ GateStep p, float per_width) {
#if __CUDA_ARCH__ >= 900
  let_next_start();
  const Share share(p.intermediate_size, 1);
  const WideNorm<T, V> norm(p.norm, threadIdx.x < kThreads ? p.hidden_size : 0);
  wide_product<T, 2, V>(
      {p.gate, p.up}, p.hidden_size, share,
      [&](WideVector<V>& x) {
        wait_for_previous();
        x.load(p.x, p.hidden_size);
        const int live = load_now(&p.state->live, static_cast<int>(threadIdx.x) < share.count);
        norm.apply(x, per_width);
        return live;
      },
      [&](const WarpSums* sums, int live) {
        if (live == 0) return;
        for (int i = threadIdx.x; i < share.count; i += kThreads) {
          const float gate = sum_of(sums[i]), up = sum_of(sums[share.count + i]);
          static_cast<T*>(p.hidden)[share.begin + i] = from_float<T>(silu(gate) * up);
        }
      });
#endif
}

// Calls f with the loads of a row that a thread has, a power of two up to MOST: more do not fit
// into registers.
template <int MOST, class F>
bool with_loads(int width, const F& f) {
  const int loads = ceil_div(width, kThreads * kWide);
  if (loads <= 1) return f(std::integral_constant<int, 1>{});
  if (loads <= 2) return f(std::integral_constant<int, 2>{});
  if (loads <= 4) return f(std::integral_constant<int, 4>{});
  if constexpr (MOST == kLoads) {
    if (loads <= kLoads) return f(std::integral_constant<int, kLoads>{});
  }
  return false;
}

// False, and nothing is launched, where the device has no bulk copies or there is no room.
template <class Kernel, class... Arguments>
bool launch_wide(const Launch& how, Kernel* kernel, const char* name, int outputs, int unit,
                 int matrices, const Arguments&... arguments) {
  const int blocks = multiprocessors();
  const size_t memory =
      kStages * kStageBytes + sizeof(WarpSums) * matrices * Share::most(outputs, unit, blocks);
  if (!compiled_for(kernel, 90) || memory + 1024 > shared_memory_of_block()) return false;
  Launch wide = how;
  wide.shared_percent = kAllShared;
  launch(wide, kernel, name, static_cast<unsigned>(blocks), kThreads + 32, memory, arguments...);
  return true;
}

// Calls f with the tags of a type and of the loads of a row of `width`, if the model is wide.
template <int MOST, class F>
bool with_kernel(DType dtype, int hidden_size, int width, const F& f) {
  bool launched = false;
  if (hidden_size <= kWideModel) return false;
  with_type(dtype, [&](auto type) {
    launched = with_loads<MOST>(width, [&](auto loads) { return f(type, loads); });
  });
  return launched;
}

constexpr int kMostLoads = 4;  // of a vector whose norm's parameters are in registers, too

}  // namespace

bool is_wide(int hidden_size) {
  return hidden_size > kWideModel && hidden_size <= kMostLoads * kThreads * kWide &&
         compiled_for(tlin_add_wide<bf16, 1>, 90) &&
         kStages * kStageBytes < shared_memory_of_block();
}

bool project_wide(const ProjectStep& p, const Launch& how) {
  const float scale = 1.4426950408889634f / std::sqrt(static_cast<float>(p.head_dim));
  const auto launch = [&](auto type, auto loads) {
    const auto kernel = tlin_project_wide<typename decltype(type)::type, decltype(loads)::value>;
    const int outputs = (p.query_heads + 2 * p.kv_heads) * p.head_dim;
    return launch_wide(how, kernel, "project_wide", outputs, 2, 1, p, scale,
                       1.0f / static_cast<float>(p.hidden_size));
  };
  return with_kernel<kMostLoads>(p.dtype, p.hidden_size, p.hidden_size, launch);
}

bool add_wide(const AddStep& p, const Launch& how) {
  const auto launch = [&](auto type, auto loads) {
    const auto kernel = tlin_add_wide<typename decltype(type)::type, decltype(loads)::value>;
    return launch_wide(how, kernel, "add_wide", p.outputs, 1, 1, p);
  };
  return with_kernel<kLoads>(p.dtype, p.outputs, p.inputs, launch);
}

bool gate_wide(const GateStep& p, const Launch& how) {
  const auto launch = [&](auto type, auto loads) {
    const auto kernel = tlin_gate_wide<typename decltype(type)::type, decltype(loads)::value>;
    return launch_wide(how, kernel, "gate_wide", p.intermediate_size, 1, 2, p,
                       1.0f / static_cast<float>(p.hidden_size));
  };
  return with_kernel<kMostLoads>(p.dtype, p.hidden_size, p.hidden_size, launch);
}

}  // namespace tlinformer::cuda
