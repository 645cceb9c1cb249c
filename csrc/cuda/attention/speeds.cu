// On a Hopper most multiprocessors share their way to the L2 cache with five others, some with only
// three: these read a third faster while all do. The driver does not tell which they are.
#include <algorithm>
#include <vector>

#include "../launch.cuh"
#include "row_copy.cuh"
#include "speeds.h"

namespace tlinformer::cuda {
namespace {

constexpr int kMost = 32 * static_cast<int>(sizeof(Speeds::fast) / sizeof(uint32_t));
constexpr int kCopy = 16 * 1024;                // bytes
[[maybe_unused]] constexpr int kAhead = 8;      // not where the kernel is empty
constexpr int kCopies = 120;                    // of each multiprocessor
constexpr int kShared = 8 * kCopy + 64 * 1024;  // one block fills a multiprocessor
constexpr int kRuns = 3;

// clocks: what a block needed to read its part of `from`, by the number of its multiprocessor.
__global__ void tlin_measure_speed(const char* from, unsigned* clocks) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char memory[];
  __shared__ uint64_t arrived[kAhead];
  for (uint64_t& barrier : arrived) prepare_copies(&barrier);
  const auto copy = [&](int i) {
    uint64_t* const barrier = &arrived[i % kAhead];
    expect_copies(kCopy, barrier, 0);
    copy_bulk_once(memory + i % kAhead * kCopy,
                   from + (int64_t{i} * gridDim.x + blockIdx.x) * kCopy, kCopy,
                   shared_address(barrier));
  };
  const long long begin = clock64();
  for (int i = 0; i < kAhead; ++i) copy(i);
  for (int i = 0; i < kCopies; ++i) {
    await_tile<1>(&arrived[i % kAhead], i / kAhead % 2, false);
    if (i + kAhead < kCopies) copy(i + kAhead);
  }
  unsigned number;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(number));
  if (number < kMost) clocks[number] = static_cast<unsigned>(clock64() - begin);
#endif
}

Speeds measure() {
  Speeds speeds;
  if (!compiled_for(tlin_measure_speed, 90)) return speeds;
  const size_t bytes = size_t{kCopy} * kCopies * static_cast<size_t>(multiprocessors());
  char* from = nullptr;
  if (cudaMalloc(&from, bytes + kMost * sizeof(unsigned)) != cudaSuccess) {
    cudaGetLastError();
    return speeds;
  }
  unsigned* const clocks = reinterpret_cast<unsigned*>(from + bytes);
  cudaStream_t stream = nullptr;
  std::vector<unsigned> runs[kRuns];
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  check(cudaMemsetAsync(from, 0, bytes + kMost * sizeof(unsigned), stream), "cudaMemset");
  for (std::vector<unsigned>& run : runs) {
    run.resize(kMost);
    launch({stream}, tlin_measure_speed, "speeds", static_cast<unsigned>(multiprocessors()), 1,
           kShared, from, clocks);
    check(cudaMemcpyAsync(run.data(), clocks, kMost * sizeof(unsigned), cudaMemcpyDeviceToHost,
                          stream),
          "cudaMemcpy");
    check(cudaStreamSynchronize(stream), "speeds");
  }
  cudaStreamDestroy(stream);
  cudaFree(from);
  std::vector<unsigned> middle(kMost), measured;
  for (int i = 0; i < kMost; ++i) {
    unsigned of_runs[] = {runs[0][i], runs[1][i], runs[2][i]};
    std::sort(of_runs, of_runs + kRuns);
    middle[i] = of_runs[kRuns / 2];
    if (middle[i] > 0) measured.push_back(middle[i]);
  }
  if (measured.empty()) return speeds;
  std::nth_element(measured.begin(), measured.begin() + measured.size() / 2, measured.end());
  const unsigned usual = measured[measured.size() / 2];
  for (int i = 0; i < kMost; ++i) {
    if (middle[i] == 0 || middle[i] > usual * 7 / 8) continue;
    speeds.fast[i / 32] |= 1u << i % 32;
    ++speeds.count;
  }
  return speeds;
}

}  // namespace

const Speeds& multiprocessor_speeds() {
  static const Speeds speeds = measure();
  return speeds;
}

}  // namespace tlinformer::cuda
