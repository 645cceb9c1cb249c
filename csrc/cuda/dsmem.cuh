// Distributed shared memory: blocks of a cluster run at the same time and store into each other's.
// On devices without clusters these do nothing.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace tlinformer::cuda::dsmem {

__device__ inline void barrier_init(uint32_t barrier, int count) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ inline void barrier_expect(uint32_t barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#endif
}

__device__ inline void barrier_arrive(uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

// A warp's arrival is one lane's, for all that the lanes have done before a __syncwarp(). racecheck
// does not follow that way: compiled for it, every lane arrives.
#ifdef TLINFORMER_RACECHECK
constexpr int kArrivalsOfWarp = 32;
#else
constexpr int kArrivalsOfWarp = 1;
#endif
__device__ inline void barrier_arrive_by_warp(uint32_t barrier, int lane) {
  if (lane < kArrivalsOfWarp) barrier_arrive(barrier);
}

__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
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
#endif
}

__device__ inline uint32_t address_in_block(uint32_t address, int block) {
#if __CUDA_ARCH__ >= 900
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(block));
  return remote;
#else
  return address;
#endif
}

// The other block's barrier counts the bytes once they are there: no fence is needed, which would
// be one of the whole device.
__device__ inline void send(uint32_t remote, float2 x, uint32_t remote_barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
          remote),
      "r"(__float_as_uint(x.x)), "r"(__float_as_uint(x.y)), "r"(remote_barrier));
#endif
}
__device__ inline void send(uint32_t remote, float x, uint32_t remote_barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(remote),
      "r"(__float_as_uint(x)), "r"(remote_barrier));
#endif
}

// All threads of all blocks arrive, then wait: after that every block is known to have started.
__device__ inline void arrive_at_blocks() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
__device__ inline void wait_for_blocks() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

}  // namespace tlinformer::cuda::dsmem
