#include <algorithm>
#include <cinttypes>
#include <cstdio>

#include "tlinformer/cache.h"
#include "tlinformer/error.h"
#include "workspace.h"
#if defined(TLINFORMER_CUDA)
#include "../cuda/workspace.h"
#endif

namespace tlinformer {
namespace {

// Rows a slide streams at a time: enough for full-speed matrix products, few enough that the
// activations of a piece stay near the cores and that an interruption is answered soon.
int64_t choose_piece_rows(const Config& config, int64_t history) {
  constexpr int64_t kBytes = int64_t{16} << 20;
  const int64_t row_bytes = 4 * (4 * config.hidden_size + 2 * config.intermediate_size);
  const int64_t rows = std::clamp<int64_t>(kBytes / row_bytes / 64 * 64, 64, 1024);
  return std::max<int64_t>(1, std::min(rows, history));
}

void check_device([[maybe_unused]] const Config& config, const CachePlanOptions& options) {
  if (options.device == Device::cpu) return;
#if defined(TLINFORMER_CUDA)
  cuda::check_supported(config, options);
#else
  require(false, "this build of tlinformer has no CUDA backend; build it where nvcc and a CUDA ",
          "build of torch are (TLINFORMER_CUDA=1 says why it cannot), or use the CPU");
#endif
}

// Upper bounds that keep every product below in int64: 2^40 tokens, 2^20 sequences.
void check_options(const CachePlanOptions& options) {
  constexpr int64_t kMostTokens = int64_t{1} << 40;
  constexpr int64_t kMostSequences = int64_t{1} << 20;
  require(options.max_context >= 1 && options.max_context <= kMostTokens,
          "max_context = ", options.max_context, "; it must be 1 to ", kMostTokens);
  require(options.batch_size >= 1 && options.batch_size <= kMostSequences,
          "batch_size = ", options.batch_size, "; it must be 1 to ", kMostSequences);
  require(options.memory_limit >= 0, "memory_limit = ", options.memory_limit,
          "; it must be at least 0 (0: unlimited)");
}

}  // namespace

void CachePlan::add(const std::string& name, int block, int layer, int64_t rows, int64_t bytes) {
  if (bytes == 0) return;
  regions_.push_back({name, block, layer, rows, total_bytes_, bytes});
  total_bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

CachePlan CachePlan::make(const Config& config, const CachePlanOptions& options) {
  config.validate();
  check_options(options);
  check_device(config, options);
  // More than this could overflow; no machine holds it anyway. A row is a token's keys and values
  // in every layer, and the widest activations.
  const double row =
      16.0 * (static_cast<double>(config.kv_dim() * (config.num_layers() + 1)) +
              static_cast<double>(2 * config.hidden_size + config.intermediate_size));
  require<OutOfMemory>(
      row * static_cast<double>(options.max_context) * static_cast<double>(options.batch_size) <
          4e18,
      "max_context = ", options.max_context, " with batch_size = ", options.batch_size,
      " needs more bytes than a machine can address");
  CachePlan plan;
  plan.options_ = options;
  const int64_t history = config.history_at(options.max_context - 1);
  const int64_t window = std::min(config.generation_window, options.max_context);
  const int64_t compressed = config.compressed_rows(history);
  // On a GPU the rows of every head start on 16 bytes, for bulk copies, whatever the head size.
  const int64_t multiple = options.device == Device::cuda ? 8 : 1;
  const auto add_rows = [&](const char* name, int b, int l, int64_t rows) {
    rows = (rows + multiple - 1) / multiple * multiple;
    plan.add(name, b, l, rows,
             2 * options.batch_size * rows * config.kv_dim() * size_of(options.dtype));
  };
  const int blocks = static_cast<int>(config.num_blocks);
  const int depth = static_cast<int>(config.block_depth);
  for (int b = 0; b < blocks; ++b) {
    // Block 0's window follows its history in the same region: a slide appends without a copy.
    const int64_t rows = history + (b == 0 ? window : 0);
    add_rows("history", b, 0, rows);
  }
  for (int b = 0; b < blocks; ++b) {
    for (int l = 1; l < depth; ++l) add_rows("context", b, l, compressed);
  }
  for (int b = 0; b < blocks; ++b) {
    for (int l = b == 0 ? 1 : 0; l < depth; ++l) {
      add_rows("window", b, l, window);
    }
  }
  // Between three blocks or more, the history's activations themselves have to be kept.
  if (blocks > 2) plan.add("stream", -1, -1, history, history * config.hidden_size * 4);
#if defined(TLINFORMER_CUDA)
  if (options.device == Device::cuda) {
    plan.piece_rows_ = cuda::piece_rows(history);
    plan.add("workspace", -1, -1, 0, cuda::Workspace::layout(config, plan).bytes);
    plan.check_limit(config);
    return plan;
  }
#endif
  plan.piece_rows_ = choose_piece_rows(config, history);
  const Workspace workspace = Workspace::layout(config, options, plan.piece_rows_);
  plan.add("workspace", -1, -1, workspace.rows, workspace.floats * 4);

  plan.check_limit(config);
  return plan;
}

int64_t CachePlan::longest_context(const Config& config, const CachePlanOptions& options) {
  CachePlanOptions tried = options;
  tried.memory_limit = 0;
  const auto fits = [&] {
    try {
      return make(config, tried).total_bytes() <= options.memory_limit;
    } catch (const OutOfMemory&) {  // more than a machine can address
      return false;
    }
  };
  int64_t longest = 0;
  for (int64_t low = 1, high = options.max_context; low <= high;) {
    tried.max_context = low + (high - low) / 2;
    const bool ok = fits();
    if (ok) longest = tried.max_context;
    (ok ? low : high) = ok ? tried.max_context + 1 : tried.max_context - 1;
  }
  return longest;
}

void CachePlan::check_limit(const Config& config) const {
  if (options_.memory_limit == 0 || total_bytes_ <= options_.memory_limit) return;
  CachePlanOptions smaller = options_;
  --smaller.max_context;
  const int64_t fits = longest_context(config, smaller);
  const auto size = [](int64_t bytes) {
    char text[64];
    std::snprintf(text, sizeof text, "%" PRId64 " bytes (%.4g GiB)", bytes,
                  static_cast<double>(bytes) / (1 << 30));
    return std::string(text);
  };
  throw OutOfMemory("max_context = " + std::to_string(options_.max_context) +
                    " with batch_size = " + std::to_string(options_.batch_size) + " needs " +
                    size(total_bytes_) + "; " + size(options_.memory_limit) + " are available" +
                    (fits > 0 ? ", enough for max_context = " + std::to_string(fits)
                              : ", too few for any context"));
}

const Region* CachePlan::find(const std::string& name, int block, int layer) const {
  for (const Region& region : regions_) {
    if (region.block == block && region.layer == layer && region.name == name) return &region;
  }
  return nullptr;
}

int64_t CachePlan::cache_bytes() const {
  return bytes_of("history") + bytes_of("context") + bytes_of("window");
}

int64_t CachePlan::bytes_of(const std::string& name) const {
  int64_t sum = 0;
  for (const Region& region : regions_) {
    if (region.name == name) sum += region.bytes;
  }
  return sum;
}

}  // namespace tlinformer
