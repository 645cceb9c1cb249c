// Where the time of a captured step goes: each kind of kernel alone, one after the other as they
// follow in the step, and what the step takes without it.
#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include "gpu.h"

namespace gpu {

class StepProfile {
 public:
  // Of `repeats` calls of work(launch), which launches nothing but kernels, one after the other.
  StepProfile(int repeats, const std::function<void(const tlinformer::cuda::Launch&)>& work)
      : repeats_(repeats) {
    check(cudaStreamCreate(&stream_), "cudaStreamCreate");
    work({stream_, false});
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < repeats; ++i) work({stream_, i > 0});
    check(cudaStreamEndCapture(stream_, &graph_), "capture");
    order_ = in_order(graph_);
    for (cudaGraphNode_t node : order_) names_.push_back(name_of(node));
  }
  ~StepProfile() {
    cudaGraphDestroy(graph_);
    cudaStreamDestroy(stream_);
  }

  // Prints a line for each kind, in microseconds; returns those of a step.
  double report() const {
    const std::set<std::string> kinds(names_.begin(), names_.end());
    const double whole = microseconds([](const std::string&) { return true; });
    std::printf("  %-52s %5s %9s %9s %9s\n", "kernels of a step", "count", "us each", "us alone",
                "us saved");
    for (const std::string& kind : kinds) {
      const auto count = std::count(names_.begin(), names_.end(), kind) / repeats_;
      const double alone = microseconds([&](const std::string& name) { return name == kind; });
      const double rest = microseconds([&](const std::string& name) { return name != kind; });
      std::printf("  %-52s %5ld %9.2f %9.2f %9.2f\n", kind.c_str(), static_cast<long>(count),
                  alone / static_cast<double>(count), alone, whole - rest);
    }
    std::printf("  %-52s %5zu %9s %9.2f\n", "all", order_.size() / static_cast<size_t>(repeats_),
                "", whole);
    return whole;
  }

 private:
  static std::vector<cudaGraphNode_t> in_order(cudaGraph_t graph) {
    size_t nodes = 0, edges = 0;
    check(cudaGraphGetNodes(graph, nullptr, &nodes), "cudaGraphGetNodes");
    check(cudaGraphGetEdges(graph, nullptr, nullptr, nullptr, &edges), "cudaGraphGetEdges");
    CHECK(edges + 1 == nodes);  // a chain
    std::vector<cudaGraphNode_t> from(edges), to(edges), all(nodes), order;
    std::vector<cudaGraphEdgeData> data(edges);
    check(cudaGraphGetNodes(graph, all.data(), &nodes), "cudaGraphGetNodes");
    check(cudaGraphGetEdges(graph, from.data(), to.data(), data.data(), &edges),
          "cudaGraphGetEdges");
    std::map<cudaGraphNode_t, cudaGraphNode_t> next;
    std::set<cudaGraphNode_t> first(all.begin(), all.end());
    for (size_t i = 0; i < edges; ++i) {
      next[from[i]] = to[i];
      first.erase(to[i]);
    }
    for (cudaGraphNode_t node = *first.begin(); node != nullptr; node = next[node]) {
      order.push_back(node);
    }
    CHECK(order.size() == nodes);
    return order;
  }

  static std::string name_of(cudaGraphNode_t node) {
    cudaKernelNodeParams params{};
    check(cudaGraphKernelNodeGetParams(node, &params), "cudaGraphKernelNodeGetParams");
    const char* mangled = "?";
    if (cudaFuncGetName(&mangled, params.func) != cudaSuccess) cudaGetLastError();
    const std::string whole(mangled);
    const size_t at = whole.find("tlin_"), end = at == std::string::npos ? at : whole.find('I', at);
    char shape[64];
    std::snprintf(shape, sizeof shape, " (%u,%u)x%u %uB", params.gridDim.x, params.gridDim.y,
                  params.blockDim.x, params.sharedMemBytes);
    return (at == std::string::npos ? whole : whole.substr(at, end - at)) + shape;
  }

  // Of a step with the wanted kernels alone, each of which may begin early as in the step.
  template <class Wanted>
  double microseconds(const Wanted& wanted) const {
    cudaGraph_t graph;
    check(cudaGraphClone(&graph, graph_), "cudaGraphClone");
    cudaGraphNode_t last = nullptr;
    bool gap = false;
    for (size_t i = 0; i < order_.size(); ++i) {
      cudaGraphNode_t node;
      check(cudaGraphNodeFindInClone(&node, order_[i], graph), "cudaGraphNodeFindInClone");
      if (!wanted(names_[i])) {
        check(cudaGraphDestroyNode(node), "cudaGraphDestroyNode");
        gap = true;
        continue;
      }
      if (gap && last != nullptr) {
        cudaGraphEdgeData edge{};
        edge.from_port = cudaGraphKernelNodePortProgrammatic;
        edge.type = cudaGraphDependencyTypeProgrammatic;
        check(cudaGraphAddDependencies(graph, &last, &node, &edge, 1), "cudaGraphAddDependencies");
      }
      last = node;
      gap = false;
    }
    const double all = gpu::microseconds(graph, stream_, 9);
    cudaGraphDestroy(graph);
    return all / repeats_;
  }

  int repeats_;
  cudaStream_t stream_ = nullptr;
  cudaGraph_t graph_ = nullptr;
  std::vector<cudaGraphNode_t> order_;
  std::vector<std::string> names_;
};

}  // namespace gpu
