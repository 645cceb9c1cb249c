// Asynchronous copies of a warp's tiles of keys and values into shared memory: by the bulk copy
// engine, or 16 bytes at a time where there is none.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace tlinformer::cuda {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Whether one lane starts a copy, which then needs no others.
__device__ constexpr bool copies_in_bulk() {
#if __CUDA_ARCH__ >= 900
  return true;
#else
  return false;
#endif
}

// Before the first copy, by one thread; the warp synchronises after it.
__device__ inline void prepare_copies(uint64_t* arrived) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(arrived)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// What other kernels stored before is read by copies issued after this.
__device__ inline void order_copies_after_stores() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

// By one thread; all a multiple of 16. The barrier counts the bytes when they have arrived.
__device__ inline void copy_bulk(void* to, const void* from, int bytes, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}

// The same, for what is too much to stay in the L2 cache until it is read again: it leaves first,
// so that weights and code stay.
__device__ inline void copy_bulk_once(void* to, const void* from, int bytes, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
#endif
}

// By all lanes, converged: announces `bytes` of copies by this warp, which follow.
__device__ inline void expect_copies(uint32_t bytes, uint64_t* arrived, int lane) {
#if __CUDA_ARCH__ >= 900
  if (lane == 0) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrived)),
        "r"(bytes)
        : "memory");
  }
#endif
}

// By all lanes, converged; addresses and `bytes` are multiples of 16. The lanes have synchronised
// since they last read what is overwritten.
__device__ inline void copy_rows(char* to, const void* from, uint32_t bytes, uint64_t* arrived,
                                 int lane) {
#if __CUDA_ARCH__ >= 900
  if (lane == 0) copy_bulk(to, from, static_cast<int>(bytes), shared_address(arrived));
#else
  for (uint32_t at = 16 * lane; at < bytes; at += 16 * 32) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to) + at),
                 "l"(__cvta_generic_to_global(from) + at)
                 : "memory");
  }
#endif
}

// By all lanes: copies which follow may overwrite what the warp has stored.
__device__ inline void order_copies_after_own_stores() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// The copies since the last call are a tile.
__device__ inline void commit_copies() {
#if __CUDA_ARCH__ < 900
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

__device__ inline void copy_tile(char* to_keys, const void* keys, char* to_values,
                                 const void* values, uint32_t bytes, uint64_t* arrived, int lane) {
  expect_copies(2 * bytes, arrived, lane);
  copy_rows(to_keys, keys, bytes, arrived, lane);
  copy_rows(to_values, values, bytes, arrived, lane);
  commit_copies();
}

// By all lanes: the oldest tile not yet waited for has arrived. `parity` counts the rounds of the
// ring modulo 2; `full`: all `kStages` stages are in flight.
template <int kStages>
__device__ inline void await_tile(uint64_t* arrived, uint32_t parity, bool full) {
#if __CUDA_ARCH__ >= 900
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(shared_address(arrived)), "r"(parity)
        : "memory");
  }
#else
  if (full) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
  } else {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  }
  __syncwarp();
#endif
}

}  // namespace tlinformer::cuda
