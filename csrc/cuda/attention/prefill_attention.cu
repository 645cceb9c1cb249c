#include <algorithm>

#include "resident_attention.cuh"

namespace tlinformer::cuda {
namespace {

constexpr int kCombineThreads = 256;

// Merges the parts of each group by their log-sum-exp and adds the groups. A thread makes four
// columns of a row.
template <class T>
__global__ void __launch_bounds__(kCombineThreads)
    tlin_prefill_combine(const __grid_constant__ PrefillPlan p) {
  let_next_start();
  wait_for_previous();
  const PrefillAttention& a = p.call;
  const int pieces = a.head_dim / 4;
  const int64_t index = int64_t{blockIdx.x} * kCombineThreads + threadIdx.x;
  const int64_t places = a.batch * a.query_heads * a.rows;
  const int64_t place = index / pieces;
  const int column = static_cast<int>(index % pieces) * 4;
  if (place >= places) return;
  float4 total{};
  int first = 0;
  for (int g = 0; g < 2; ++g) {
    const float* exponent = p.partial_log_sum + first * places + place;
    const float* partial = p.partial_output + (first * places + place) * a.head_dim + column;
    const int parts = p.parts[g];
    first += parts;
    float top = -INFINITY;
    for (int i = 0; i < parts; ++i) top = fmaxf(top, exponent[i * places]);
    float sum = 0;
    float4 output{};
    for (int i = 0; i < parts; ++i) {
      if (exponent[i * places] == -INFINITY) continue;  // a part whose keys are all masked
      const float weight = exp2_fast(exponent[i * places] - top);
      const float4 x = *reinterpret_cast<const float4*>(partial + i * places * a.head_dim);
      sum += weight;
      output.x += weight * x.x;
      output.y += weight * x.y;
      output.z += weight * x.z;
      output.w += weight * x.w;
    }
    if (a.log_sum_exp != nullptr && column == 0) {
      a.log_sum_exp[g * places + place] = (top + __log2f(sum)) * kLn2;
    }
    if (parts == 0) continue;
    total.x += output.x / sum;
    total.y += output.y / sum;
    total.z += output.z / sum;
    total.w += output.w / sum;
  }
  const int64_t row = place % a.rows, line = place / a.rows;
  T* to = static_cast<T*>(a.output.data) + line / a.query_heads * a.output.batch_stride +
          line % a.query_heads * a.output.head_stride + row * a.output.row_stride + column;
  *reinterpret_cast<uint2*>(to) = {pack<T>(total.x, total.y), pack<T>(total.z, total.w)};
}

// How many parts the keys of a row tile can be split into before the device overflows.
int64_t parts_to_fill(int64_t batch, int64_t rows, int query_heads, int d) {
  const int64_t row_tiles = (rows - 1) / prefill_rows(d) + 1;
  return multiprocessors() * prefill_blocks(d) / (row_tiles * query_heads * batch);
}

int64_t bytes_of_part(int64_t batch, int64_t rows, int query_heads, int d) {
  return batch * query_heads * rows * (d + 1) * static_cast<int64_t>(sizeof(float));
}

// Shares the parts among the groups by their keys; leaves them 0 where splitting is no gain.
void split(PrefillPlan& plan) {
  const PrefillAttention& a = plan.call;
  constexpr int64_t kLeastTiles = 8;  // of keys a part, to be worth its start
  const int64_t part_bytes = bytes_of_part(a.batch, a.rows, a.query_heads, a.head_dim);
  const int64_t most = std::min(parts_to_fill(a.batch, a.rows, a.query_heads, a.head_dim),
                                a.scratch == nullptr ? 0 : a.scratch_bytes / part_bytes);
  int64_t tiles[2];
  for (int g = 0; g < 2; ++g) {
    const KeyGroup& group = a.groups[g];
    const int64_t visible =
        group.causal ? std::min(group.count, a.rows + group.offset) : group.count;
    tiles[g] = (visible + kKeyTile - 1) / kKeyTile;
  }
  const int64_t all = tiles[0] + tiles[1];
  if (most < 2 || all < 2 * kLeastTiles) return;
  int64_t parts[2] = {most * tiles[0] / all, 0};
  if (tiles[0] > 0 && tiles[1] > 0) parts[0] = std::clamp<int64_t>(parts[0], 1, most - 1);
  parts[1] = most - parts[0];
  for (int g = 0; g < 2; ++g) {
    if (tiles[g] == 0) parts[g] = 0;
    parts[g] = std::min(parts[g], std::max<int64_t>(tiles[g] / kLeastTiles, 1));
  }
  if (parts[0] < 2 && parts[1] < 2) return;
  for (int g = 0; g < 2; ++g) plan.parts[g] = static_cast<int>(parts[g]);
  plan.partial_output = static_cast<float*>(a.scratch);
  plan.partial_log_sum =
      plan.partial_output + (parts[0] + parts[1]) * a.batch * a.query_heads * a.rows * a.head_dim;
}

void validate(const PrefillAttention& a) {
  constexpr int64_t kMost = 1'000'000'000;  // positions stay below 2^31
  require(prefill_takes_head_size(a.head_dim), "attention has no CUDA kernel for heads of size ",
          a.head_dim, ", only for", prefill_head_sizes());
  require(a.kv_heads > 0 && a.query_heads % a.kv_heads == 0, "attention of ", a.query_heads,
          " query heads cannot share ", a.kv_heads, " key/value heads");
  require(a.rows <= kMost && a.query_heads < 65536 && a.batch < 65536, "attention of batch ",
          a.batch, ", ", a.query_heads, " heads, ", a.rows, " rows is too large for one launch");
  const int64_t alignment = a.head_dim % 8 == 0 ? 8 : 4;  // elements, of every row
  const auto require_aligned = [&](const char* name, const HeadTensor& x) {
    const bool aligned = reinterpret_cast<uintptr_t>(x.data) % (2 * alignment) == 0 &&
                         x.batch_stride % alignment == 0 && x.head_stride % alignment == 0 &&
                         x.row_stride % alignment == 0;
    require(aligned && std::abs(x.row_stride) < (1 << 24), "attention's ", name,
            " must have rows aligned to ", 2 * alignment, " bytes, less than 2^24 elements apart");
  };
  require_aligned("query", a.query);
  require_aligned("output", a.output);
  for (const KeyGroup& group : a.groups) {
    if (group.count == 0) continue;
    require(group.count <= kMost && group.offset >= 0, "attention to ", group.count,
            " keys from offset ", group.offset, " is out of range");
    require_aligned("keys", group.keys);
    require_aligned("values", group.values);
  }
}

}  // namespace

bool prefill_takes_head_size(int64_t head_dim) {
#define TLINFORMER_IS_SIZE(size) head_dim == size ||
  return TLINFORMER_HEAD_SIZES(TLINFORMER_IS_SIZE) false;
#undef TLINFORMER_IS_SIZE
}

const char* prefill_head_sizes() {
#define TLINFORMER_NAME_SIZE(size) " " #size
  return TLINFORMER_HEAD_SIZES(TLINFORMER_NAME_SIZE);
#undef TLINFORMER_NAME_SIZE
}

int64_t prefill_attention_scratch(int64_t batch, int64_t rows, int /*query_heads*/, int head_dim) {
  if (batch == 0 || rows == 0) return 0;
  // All blocks that the device holds, each with a whole tile of rows: fewer rows fit too.
  return multiprocessors() * prefill_blocks(head_dim) *
         bytes_of_part(1, prefill_rows(head_dim), 1, head_dim);
}

void prefill_attention(const PrefillAttention& a, const Launch& how) {
  validate(a);
  if (a.batch == 0 || a.rows == 0 || a.query_heads == 0) return;
  PrefillPlan plan{};
  plan.call = a;
  for (KeyGroup& group : plan.call.groups) group.offset = std::min(group.offset, group.count);
  plan.queries_per_key = a.query_heads / a.kv_heads;
  plan.factor = std::max(std::fabs(a.scale) * kLog2E, FLT_MIN);  // 0 would make NaN of masks
  plan.sign = a.scale < 0 ? 0x80008000u : 0;
  split(plan);
  const bool is_split = plan.parts[0] + plan.parts[1] > 0;
  const bool both = !is_split && a.groups[0].count > 0 && a.groups[1].count > 0;
  with_type(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (!is_split && launch_resident<T>(plan, how)) return;
    launch_prefill<T>(plan, both, how);
    if (!is_split) return;
    const int64_t threads = a.batch * a.query_heads * a.rows * (a.head_dim / 4);
    const auto blocks = static_cast<unsigned>((threads - 1) / kCombineThreads + 1);
    launch(how, tlin_prefill_combine<T>, "tlin_prefill_combine", blocks, kCombineThreads, 0, plan);
  });
}

}  // namespace tlinformer::cuda
