#include <limits>

#include "cluster_step.h"
#include "kernel.cuh"
#include "tlinformer/error.h"

namespace tlinformer::cuda {
namespace {

constexpr int kPackThreads = 256;

int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Everything of the parameters that follows from the sizes.
ClusterParameters planned(const Config& config) {
  ClusterParameters p{};
  p.width = static_cast<int32_t>(config.hidden_size);
  p.hidden = static_cast<int32_t>(config.intermediate_size);
  p.query_heads = static_cast<int32_t>(config.num_attention_heads);
  p.kv_heads = static_cast<int32_t>(config.num_key_value_heads);
  p.head_dim = static_cast<int32_t>(config.head_dim());
  p.epsilon = static_cast<float>(config.layer_norm_eps);
  p.scale =
      static_cast<float>(1.44269504088896341 / std::sqrt(static_cast<double>(config.head_dim())));
  const int64_t width_tiles = rounded(config.hidden_size, 16) / 16;
  const int64_t hidden_eights = rounded(config.intermediate_size, 8) / 8;
  const int64_t head_rows =
      (config.num_attention_heads / config.num_key_value_heads + 2) * config.head_dim();
  int64_t stream = 0;
  for (int64_t block = 0; block < kBlocks; ++block) {
    Share& share = p.shares[block];
    const int64_t heads =
        std::max<int64_t>(0, (config.num_key_value_heads - block + kBlocks - 1) / kBlocks);
    const int64_t qkv = heads * head_rows;
    const int64_t out = width_tiles * block / kBlocks;
    const int64_t out_tiles = width_tiles * (block + 1) / kBlocks - out;
    const int64_t out_rows = std::min(out_tiles * 16, config.hidden_size - out * 16);
    const int64_t gate = hidden_eights * block / kBlocks;
    const int64_t gate_tiles = hidden_eights * (block + 1) / kBlocks - gate;
    share.matrices[kQkv] = Product::of(0, qkv, rounded(qkv, 16) / 16, config.hidden_size);
    share.matrices[kOut] = Product::of(out * 16, out_rows, out_tiles, config.hidden_size);
    share.matrices[kGateUp] = Product::of(gate * 8, gate_tiles * 8, gate_tiles, config.hidden_size);
    share.matrices[kDown] = Product::of(out * 16, out_rows, out_tiles, config.intermediate_size);
    share.vector_bytes =
        static_cast<int32_t>(rounded(2 * (4 * config.hidden_size + qkv + out_rows), 16));
    share.layer_bytes = share.vector_bytes;
    for (const Product& product : share.matrices) share.layer_bytes += product.tiles() * kTileBytes;
    share.stream = stream;
    stream += share.layer_bytes * config.num_layers();
  }
  return p;
}

int64_t stream_bytes(const Config& config, const ClusterParameters& p) {
  const Share& last = p.shares[kBlocks - 1];
  return last.stream + last.layer_bytes * config.num_layers();
}

Layout layout_of(const ClusterParameters& p, int64_t most_window_rows, int64_t most_context_rows,
                 int64_t limit) {
  const int64_t group = p.query_heads / p.kv_heads;
  const int64_t heads = (p.kv_heads + kBlocks - 1) / kBlocks;
  const int64_t units = rounded(most_window_rows, kUnitRows) / kUnitRows +
                        rounded(most_context_rows, kUnitRows) / kUnitRows;
  int64_t vectors = 0, partial = 0, inputs[kMatrices] = {};
  for (const Share& share : p.shares) {
    vectors = std::max<int64_t>(vectors, share.vector_bytes);
    for (int i = 0; i < kMatrices; ++i) {
      const Product& product = share.matrices[i];
      inputs[i] = std::max<int64_t>(inputs[i], product.slices * product.k * 32);
      partial = std::max<int64_t>(partial, product.warps() * product.per_warp * 16 * 4);
    }
  }
  Layout layout{};
  int64_t bytes = kBarrierBytes;
  const auto place = [&](int64_t size) {
    const int64_t begin = rounded(bytes, 16);
    bytes = begin + size;
    return static_cast<int32_t>(std::min<int64_t>(begin, std::numeric_limits<int32_t>::max()));
  };
  layout.x = place(p.width * 4);
  layout.middle = place(p.width * 4);
  layout.normed = place(std::max(inputs[kQkv], inputs[kGateUp]));
  layout.attended = place(std::max(inputs[kOut], p.width * int64_t{2}));
  layout.hidden = place(std::max(inputs[kDown], p.hidden * int64_t{2}));
  layout.share = place(sizeof(Share));
  layout.places = place(sizeof(p.places));
  layout.state = place(sizeof(SequenceState));
  layout.query = place(heads * group * p.head_dim * 4);
  layout.fresh = place(heads * 2 * p.head_dim * 2);
  layout.rotations = place(p.head_dim / 2 * 8);
  layout.partial = place(partial);
  layout.records = place(units * group * (p.head_dim + 4) * 4);
  for (int i = 0; i < 2; ++i) layout.vectors[i] = place(vectors);
  bytes = rounded(bytes, 128);
  layout.ring = place(0);
  const int64_t stages = std::clamp<int64_t>((limit - bytes) / kStageBytes, 0, kMostStages);
  layout.stages = static_cast<int32_t>(stages);
  layout.bytes = static_cast<int32_t>(
      std::min<int64_t>(bytes + stages * kStageBytes, std::numeric_limits<int32_t>::max()));
  return layout;
}

int64_t shared_limit() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return bytes;
}

using Kernel = void (*)(ClusterParameters);

Kernel kernel_of(DType dtype, int64_t head_dim) {
  Kernel kernel = nullptr;
  with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
#define TLINFORMER_CASE(size) \
  if (head_dim == size) kernel = cluster::tlin_cluster_step<T, size>;
    TLINFORMER_HEAD_SIZES(TLINFORMER_CASE)
#undef TLINFORMER_CASE
  });
  return kernel;
}

cudaError_t prepare(Kernel kernel, int bytes) {
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

struct ClusterLaunch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2]{};

  ClusterLaunch(int bytes, const Launch& how) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {kBlocks, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = kBlocks;
    config.blockDim = cluster::kThreads + 32;
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    config.stream = how.stream;
    config.attrs = attributes;
    config.numAttrs = how.early ? 2 : 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
};

// One layer's matrices and vectors into the streams; a block of threads of part kMatrices copies
// vectors, the others pack eight weights a thread.
template <class T>
__global__ void __launch_bounds__(kPackThreads)
    tlin_cluster_pack(const __grid_constant__ ClusterParameters p, LayerWeights weights, int layer,
                      char* packed) {
  const int block = static_cast<int>(blockIdx.y), part = static_cast<int>(blockIdx.z);
  const Share& share = p.shares[block];
  const int group = p.query_heads / p.kv_heads, head_rows = (group + 2) * p.head_dim;
  const int first_thread = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int threads = static_cast<int>(gridDim.x * blockDim.x);
  char* to = packed + share.stream + int64_t{share.layer_bytes} * layer;

  // The row of the whole matrix, of a row of this block's.
  const auto qkv_row = [&](int row) {
    const int head = block + row / head_rows * kBlocks, line = row % head_rows;
    const int column = line % p.head_dim;
    if (line < group * p.head_dim) return head * group * p.head_dim + line;
    const int section = line < (group + 1) * p.head_dim ? 0 : p.kv_heads;
    return (p.query_heads + section + head) * p.head_dim + column;
  };

  if (part == kMatrices) {
    const void* const norms[4] = {weights.attn_norm_weight, weights.attn_norm_bias,
                                  weights.mlp_norm_weight, weights.mlp_norm_bias};
    const int rows = share.matrices[kQkv].rows, out = share.matrices[kOut].rows;
    for (int i = first_thread; i < 4 * p.width + rows + out; i += threads) {
      T value;
      if (i < 4 * p.width) {
        value = static_cast<const T*>(norms[i / p.width])[i % p.width];
      } else if (i < 4 * p.width + rows) {
        value = static_cast<const T*>(weights.qkv_proj_bias)[qkv_row(i - 4 * p.width)];
      } else {
        value = static_cast<const T*>(
            weights.out_proj_bias)[share.matrices[kOut].first + i - 4 * p.width - rows];
      }
      reinterpret_cast<T*>(to)[i] = value;
    }
    return;
  }

  to += share.vector_bytes;
  for (int i = 0; i < part; ++i) to += share.matrices[i].tiles() * kTileBytes;
  const Product& product = share.matrices[part];
  const int inputs = part == kDown ? p.hidden : p.width;
  const auto source = [&](int row) -> const T* {  // of a row of tiles' rows
    const int64_t pitch = inputs;
    if (part == kQkv) {
      if (row >= product.rows) return nullptr;
      return static_cast<const T*>(weights.qkv_proj_weight) + qkv_row(row) * pitch;
    }
    if (part == kGateUp) {  // eight rows of gate, then the same of up
      if (row / 16 * 8 >= product.rows) return nullptr;
      const void* matrix = row % 16 < 8 ? weights.gate_proj_weight : weights.up_proj_weight;
      return static_cast<const T*>(matrix) + (product.first + row / 16 * 8 + row % 8) * pitch;
    }
    if (row >= product.rows) return nullptr;
    const void* matrix = part == kOut ? weights.out_proj_weight : weights.down_proj_weight;
    return static_cast<const T*>(matrix) + (product.first + row) * pitch;
  };
  for (int i = first_thread; i < product.tiles() * 32; i += threads) {
    const int tile = i / 32, lane = i % 32;
    const int warp = tile % product.warps(), step = tile / product.warps();
    const int tile_row = warp / product.slices + step % product.per_warp * product.groups;
    const int k = warp % product.slices * product.k + step / product.per_warp;
    // Columns are permuted so that a lane's four inputs of mma's B are neighbours.
    const int row = tile_row * 16 + lane / 4, column = k * 16 + lane % 4 * 4;
    T* out = reinterpret_cast<T*>(to) + i * 8;
    for (int j = 0; j < 8; ++j) {
      const T* from = source(row + (j / 2 % 2) * 8);
      const int input = column + j / 4 * 2 + j % 2;
      out[j] = from != nullptr && input < inputs ? from[input] : from_float<T>(0.0f);
    }
  }
}

}  // namespace

bool ClusterStep::supports(const Config& config, DType dtype, int64_t most_window_rows,
                           int64_t most_context_rows) {
  if (dtype == DType::float32 || kernel_of(dtype, config.head_dim()) == nullptr) return false;
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
  // The limits keep all counts within their types, generously: larger models do not fit anyway.
  constexpr int64_t kMost = 16384;
  if (major != 9 || config.block_depth + 1 > kMostVisits || config.hidden_size % 8 != 0 ||
      config.intermediate_size % 8 != 0 || config.hidden_size > kMost ||
      config.intermediate_size > 4 * kMost || most_window_rows > kMost ||
      most_context_rows > kMost) {
    return false;
  }
  const ClusterParameters p = planned(config);
  for (const Share& share : p.shares) {
    for (const Product& product : share.matrices) {
      if (product.rows > 0 && product.slices == 0) return false;
    }
  }
  const Layout layout = layout_of(p, most_window_rows, most_context_rows, shared_limit());
  if (layout.stages < 3) return false;
  const Kernel kernel = kernel_of(dtype, config.head_dim());
  const ClusterLaunch launch(layout.bytes, {});
  int clusters = 0;
  const bool known =
      prepare(kernel, layout.bytes) == cudaSuccess &&
      cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) == cudaSuccess;
  if (!known) cudaGetLastError();
  return known && clusters >= 1;
}

int64_t ClusterStep::packed_bytes(const Config& config) {
  return stream_bytes(config, planned(config)) + static_cast<int64_t>(sizeof(Rope));
}

ClusterStep::ClusterStep(const Config& config, DType dtype, const std::vector<ClusterLayer>& layers,
                         const ClusterBuffers& buffers, int64_t most_window_rows,
                         int64_t most_context_rows, cudaStream_t stream)
    : dtype_(dtype) {
  ClusterParameters common = planned(config);
  const int64_t weight_bytes = stream_bytes(config, common);
  char* const packed = static_cast<char*>(buffers.packed);
  common.state = buffers.state;
  common.x = buffers.x;
  common.query = buffers.query;
  common.attended = buffers.attended;
  common.packed = packed;
  common.turns = reinterpret_cast<const double*>(packed + weight_bytes);
  common.layout = layout_of(common, most_window_rows, most_context_rows, shared_limit());
  check(prepare(kernel_of(dtype, config.head_dim()), common.layout.bytes), "cluster step");

  const int depth = static_cast<int>(config.block_depth);
  const int count = static_cast<int>(config.num_layers());
  with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int i = 0; i < count; ++i) {
      launch({stream, false}, tlin_cluster_pack<T>, "tlin_cluster_pack",
             dim3(32, kBlocks, kMatrices + 1), kPackThreads, 0, common,
             layers[static_cast<size_t>(i)].weights, i, packed);
    }
  });
  const Rope rope = Rope::of(config);
  check(cudaMemcpyAsync(packed + weight_bytes, &rope, sizeof(rope), cudaMemcpyHostToDevice, stream),
        "cudaMemcpyAsync");
  // Steps read it before earlier kernels have ended.
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");

  for (int segment = 0; segment <= config.num_blocks; ++segment) {
    ClusterParameters p = common;
    const int begin = std::max(0, segment - 1) * depth;
    p.resumes = segment > 0;
    p.depth = depth;
    p.first_layer = begin;
    p.visits = segment == 0 ? 1 : std::min(depth + 1, count - begin);
    for (int visit = 0; visit < p.visits; ++visit) {
      const ClusterLayer& layer = layers[static_cast<size_t>(begin + visit)];
      p.places[visit] = {layer.window.keys,  layer.window.values,  layer.window.head_stride,
                         layer.context.keys, layer.context.values, layer.context.head_stride};
      p.follows_history = layer.window.follows_history;  // of the last visit
    }
    segments_.push_back(std::make_shared<const ClusterParameters>(p));
  }
}

void ClusterStep::run(int segment, const Launch& how) const {
  const ClusterParameters& p = *segments_[static_cast<size_t>(segment)];
  const ClusterLaunch launch(p.layout.bytes, how);
  check(cudaLaunchKernelEx(&launch.config, kernel_of(dtype_, p.head_dim), p), "tlin_cluster_step");
}

}  // namespace tlinformer::cuda
