// What moves data in the cluster's kernel: the instructions, and the ring of stages through which
// a block's share of the weights and the cached rows of its heads stream, in the order of use.
#pragma once

#include <algorithm>

#include "../launch.cuh"
#include "../numeric.cuh"
#include "plan.cuh"

namespace tlinformer::cuda::cluster {

constexpr int kThreads = kBlocks * 32;  // that compute

#if __CUDA_ARCH__ >= 900

__device__ inline void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// The barrier counts the bytes when they have arrived. All a multiple of 16 bytes.
__device__ inline void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

__device__ inline uint32_t address_in_block(uint32_t address, int block) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(block));
  return remote;
}

__device__ inline void send(uint32_t remote, uint32_t remote_barrier, uint2 words) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
          remote),
      "r"(words.x), "r"(words.y), "r"(remote_barrier));
}

__device__ inline void arrive_at_cluster() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

__device__ inline void wait_for_cluster() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

__device__ inline void sync_workers() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// As warp_max; the order of floats, negative ones turned around, is that of their bits.
__device__ inline float greatest(float x) {
  int bits = __float_as_int(x);
  bits = __reduce_max_sync(0xffffffffu, bits ^ (bits >> 31 & 0x7fffffff));
  return __int_as_float(bits ^ (bits >> 31 & 0x7fffffff));
}

struct Ring {
  uint32_t barriers, stages;  // addresses
  int count;
  int slot = 0;
  uint32_t parity = 0;

  __device__ uint32_t full() const { return barriers + kFull + 8 * slot; }
  __device__ uint32_t empty() const { return barriers + kEmpty + 8 * slot; }
  __device__ uint32_t stage() const { return stages + slot * kStageBytes; }
  __device__ void advance() {
    if (++slot < count) return;
    slot = 0;
    parity ^= 1;
  }
};

// Which rows of a head's cache the token attends to: of the context, of the window (the last is
// the token's own, which is not read from the cache).
struct CachedCounts {
  int context, window;
};

__device__ inline CachedCounts counts_of(const SequenceState& state) {
  return {state.compressed, static_cast<int>(state.last - state.history) + 1};
}

// Rows of one head in a stage: first the keys, then, as far apart as all of them, the values.
template <int d>
constexpr int kChunkRows = std::min(kStageBytes / (4 * d) / kUnitRows, kBlocks) * kUnitRows;
template <int d>
constexpr int kChunkBytes = kChunkRows<d> * d * 2;

// Owned heads are block, block + 16, ...
__device__ inline int owned_heads(const ClusterParameters& p, int block) {
  return (p.kv_heads - block + kBlocks - 1) / kBlocks;
}

// The thread that fills the ring. Weights may be read before earlier kernels have ended.
template <class T, int d>
__device__ void produce(const ClusterParameters& p, int block, Ring ring) {
  const Share& share = p.shares[block];
  const int heads = owned_heads(p, block);
  const Ring first = ring;
  int issued = 0;
  bool awake = false, live = true;
  CachedCounts counts{};

  const auto wake = [&] {
    if (awake) return;
    awake = true;
    wait_for_previous();
    const SequenceState state = *p.state;
    live = state.live != 0;
    counts = counts_of(state);
  };
  // Both of `bytes`; the second, if any, begins at kChunkBytes.
  const auto feed = [&](const void* from, const void* second, int bytes) {
    if (issued == ring.count) wake();
    if (!live) return;
    barrier_wait(ring.empty(), ring.parity ^ 1);
    barrier_expect(ring.full(), second != nullptr ? 2 * bytes : bytes);
    if (bytes > 0) copy_bulk(ring.stage(), from, bytes, ring.full());
    if (bytes > 0 && second != nullptr) {
      copy_bulk(ring.stage() + kChunkBytes<d>, second, bytes, ring.full());
    }
    ring.advance();
    ++issued;
  };

#pragma unroll 1
  for (int visit = 0; visit < p.visits && live; ++visit) {
    const char* from =
        p.packed + share.stream + int64_t{share.layer_bytes} * (p.first_layer + visit);
    from += share.vector_bytes;
    const bool projects = visit > 0 || !p.resumes, finishes = p.resumes && visit < p.depth;
#pragma unroll 1
    for (int i = 0; i < kMatrices; ++i) {
      const Product& product = share.matrices[i];
      if (i == kQkv ? projects : finishes) {
        const int step_bytes = product.warps() * product.per_warp * kTileBytes;
#pragma unroll 1
        for (int k = 0; k < product.k; k += product.stage_k) {
          feed(from + k * step_bytes, nullptr, min(product.stage_k, product.k - k) * step_bytes);
        }
      }
      from += product.tiles() * kTileBytes;
      if (i != kQkv || !projects || !finishes || heads <= 0) continue;
      wake();
      if (!live) break;
      const Place& place = p.places[visit];
#pragma unroll 1
      for (int own = 0; own < heads; ++own) {
#pragma unroll 1
        for (int kind = 0; kind < 2; ++kind) {
          const int64_t head = (block + own * kBlocks) *
                               (kind == 0 ? place.context_head_stride : place.window_head_stride);
          const void* keys = kind == 0 ? place.context_keys : place.window_keys;
          const void* values = kind == 0 ? place.context_values : place.window_values;
          const int rows = kind == 0 ? counts.context : counts.window;
          const int cached = kind == 0 ? counts.context : counts.window - 1;
#pragma unroll 1
          for (int row = 0; row < rows; row += kChunkRows<d>) {
            const int64_t offset = head + int64_t{row} * d;
            const int bytes = (min(kChunkRows<d>, cached - row) * d * 2 + 15) / 16 * 16;
            feed(static_cast<const T*>(keys) + offset, static_cast<const T*>(values) + offset,
                 bytes);
          }
        }
      }
    }
  }
  wake();
  if (live) return;
  // Nobody will use them, but a copy must not arrive after the block has ended.
  ring = first;
#pragma unroll 1
  for (int i = 0; i < issued; ++i, ring.advance()) barrier_wait(ring.full(), ring.parity);
  barrier_wait(ring.barriers + kVectors, 0);
}

#endif

}  // namespace tlinformer::cuda::cluster
