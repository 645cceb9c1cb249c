// What the CUDA tests share: device arrays, random values, and the time of a launch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../cpp/check.h"
#include "cuda/launch.cuh"
#include "cuda/numeric.cuh"

namespace gpu {

using tlinformer::cuda::check;

// An array of the device; every byte 0xFF (NaN in all floating-point types) until written.
template <class T>
class Array {
 public:
  explicit Array(size_t count) : count_(count) {
    check(cudaMalloc(&data_, bytes() + 1), "cudaMalloc");
    check(cudaMemset(data_, 0xFF, bytes()), "cudaMemset");
  }
  explicit Array(const std::vector<T>& from) : Array(from.size()) { set(from); }
  ~Array() { cudaFree(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  void set(const std::vector<T>& from) {
    check(cudaMemcpy(data_, from.data(), bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  std::vector<T> get() const {
    std::vector<T> to(count_);
    check(cudaMemcpy(to.data(), data_, bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return to;
  }
  T* data() const { return data_; }
  size_t size() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }

 private:
  T* data_ = nullptr;
  size_t count_;
};

template <class T>
constexpr tlinformer::DType kDType = tlinformer::DType::bfloat16;
template <>
constexpr tlinformer::DType kDType<tlinformer::cuda::f16> = tlinformer::DType::float16;
template <class T>
constexpr double kRounding = 1.0 / 256;  // half a unit in the last place
template <>
constexpr double kRounding<tlinformer::cuda::f16> = 1.0 / 2048;

// Every byte still as Array made it.
template <class T>
bool untouched(const T* data, size_t count) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(data);
  return std::all_of(bytes, bytes + count * sizeof(T), [](unsigned char b) { return b == 0xFF; });
}

// Standard normal values times `scale`, rounded to T, and the same as doubles.
template <class T>
std::vector<T> normal(size_t count, unsigned seed, float scale = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution;
  std::vector<T> values;
  values.reserve(count);
  for (size_t i = 0; i < count; ++i) values.push_back(T(scale * distribution(generator)));
  return values;
}

template <class T>
std::vector<double> doubles(const std::vector<T>& from) {
  std::vector<double> to;
  to.reserve(from.size());
  for (const T& x : from) to.push_back(static_cast<double>(static_cast<float>(x)));
  return to;
}

// Random values, too many to make one by one.
inline void randomise(const Array<tlinformer::cuda::bf16>& array) {
  using tlinformer::cuda::bf16;
  static const std::vector<bf16> some = normal<bf16>(1 << 20, 7);
  for (size_t i = 0; i < array.size(); i += some.size()) {
    const size_t part = std::min(array.size() - i, some.size());
    check(cudaMemcpy(array.data() + i, some.data(), part * sizeof(bf16), cudaMemcpyHostToDevice),
          "cudaMemcpy");
  }
}

// Median microseconds of the graph, launched so many times.
inline double microseconds(cudaGraph_t graph, cudaStream_t stream, int launches) {
  cudaGraphExec_t exec;
  check(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<float> times;
  for (int i = 0; i < launches; ++i) {
    cudaEventRecord(begin, stream);
    check(cudaGraphLaunch(exec, stream), "cudaGraphLaunch");
    cudaEventRecord(end, stream);
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(exec);
  return times[times.size() / 2] * 1000.0;
}

// Median microseconds of one `work(stream)`, captured `repeats` times in a row into a graph.
inline double microseconds(const std::function<void(cudaStream_t)>& work, int repeats = 50) {
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  work(stream);  // one-time settings outside the capture
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < repeats; ++i) work(stream);
  cudaGraph_t graph;
  check(cudaStreamEndCapture(stream, &graph), "capture");
  const double all = microseconds(graph, stream, 7);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  return all / repeats;
}

// Prints one line of the kernel table.
inline void report(const std::string& name, double us, double bytes, double flops) {
  std::printf("%-58s %10.2f us %9.3f MB %7.3f TB/s %9.3f GFLOP %8.1f TFLOP/s\n", name.c_str(), us,
              bytes / 1e6, bytes / us / 1e6, flops / 1e9, flops / us / 1e6);
  std::fflush(stdout);  // seen at once through a pipe, too
}

}  // namespace gpu
