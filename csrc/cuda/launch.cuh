// Launching kernels: checked, on a stream, optionally before the previous kernel has ended.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

#include "tlinformer/error.h"

namespace tlinformer::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a failed launch must not fail the next call too
  throw Error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Percent of a multiprocessor's memory that is shared memory, the rest is its L1 cache.
constexpr int kLeastShared = 14, kAllShared = 100;

struct Launch {
  cudaStream_t stream = nullptr;
  // Programmatic dependent launch: the kernel may start while its predecessor still runs, and
  // must call wait_for_previous() in every thread before it touches what the token changes.
  bool early = false;
  int cluster = 1;  // blocks of the grid's x that share their memory
  // Of a kernel that may start early. Weights pass through the L1 cache on their way into
  // registers: the kernels of a step leave it most of the memory, if they can. Kernels that differ
  // in this do not run beside each other on a multiprocessor.
  int shared_percent = kLeastShared;
};

// Threads of every block call this before they read or write anything that an earlier kernel of
// the same token writes or reads: it returns once all earlier kernels have ended. Weights, and
// cached rows of earlier tokens, may be read before it. No block may end without calling it.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks start as soon as every block of this one has said so or ended. The
// head does so only after its wait: then no kernel of a token starts before all but the draw of the
// token before has ended, and finds the state at most one token behind.
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Sets an attribute of a kernel to `value`, or leaves more where more does no harm. Asking the
// runtime takes a microsecond or two, so what was set is remembered, for each device; by all
// threads together, or one could take back the memory that another's launch needs.
template <class Kernel>
void set_attribute(Kernel* kernel, cudaFuncAttribute attribute, int value, const char* name) {
  const bool more = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, cudaFuncAttribute>, int> known;
  int device = 0;
  check(cudaGetDevice(&device), name);
  const void* const function = reinterpret_cast<const void*>(kernel);
  const std::lock_guard<std::mutex> lock(mutex);
  int& set = known.try_emplace({device, function, attribute}, -1).first->second;
  if (more ? set >= value : set == value) return;
  check(cudaFuncSetAttribute(function, attribute, value), name);
  set = value;
}

// Of the current device; asked once. Without one a plan can still be made, as for an H200.
template <cudaDeviceAttr ATTRIBUTE>
int of_device(int of_h200) {
  static const int value = [&] {
    int device = 0, n = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return of_h200;
    check(cudaDeviceGetAttribute(&n, ATTRIBUTE, device), "cudaDeviceGetAttribute");
    return n;
  }();
  return value;
}
inline int multiprocessors() { return of_device<cudaDevAttrMultiProcessorCount>(132); }
inline int shared_memory_of_block() {  // at most, in bytes
  return of_device<cudaDevAttrMaxSharedMemoryPerBlockOptin>(227 * 1024);
}

template <class... Parameters, class... Arguments>
void launch(const Launch& how, void (*kernel)(Parameters...), const char* name, dim3 grid,
            dim3 block, size_t shared_bytes, Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = how.stream;
  cudaLaunchAttribute attributes[2]{};
  config.attrs = attributes;
  if (how.early) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  if (how.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(how.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  if (shared_bytes > 32 * 1024) {  // 48 KiB come unasked, for the kernel's own variables, too
    const int most = shared_memory_of_block();
    require(shared_bytes <= static_cast<size_t>(most), name, " takes ", shared_bytes,
            " bytes of shared memory; a block of this GPU has at most ", most,
            ". A100, H100 and H200 have enough");
    set_attribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                  static_cast<int>(shared_bytes), name);
  }
  if (how.early) {
    set_attribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, how.shared_percent, name);
  }
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

// Whether the code that runs here was compiled for an architecture of this number or above: newer
// devices may run that of older ones, too.
template <class Kernel>
bool compiled_for(Kernel* kernel, int architecture) {
  cudaFuncAttributes compiled{};
  const cudaError_t status = cudaFuncGetAttributes(&compiled, kernel);
  if (status != cudaSuccess) cudaGetLastError();
  return status == cudaSuccess && compiled.ptxVersion >= architecture;
}

}  // namespace tlinformer::cuda
