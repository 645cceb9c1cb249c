// Forward pass: a block is 128 rows of a segment and a head; keys stream past them.
#include <algorithm>

#include "ranged_tiles.cuh"

namespace tlinformer::cuda {
namespace {

constexpr int kRows = kRangedThreads;  // 32 a warp
constexpr int ranged_blocks(int d) { return d <= 40 ? 3 : 2; }

template <class T, int d>
__global__ void __launch_bounds__(kRangedThreads, ranged_blocks(d))
    tlin_ranged_attention(const __grid_constant__ RangedPlan p) {
  using Tile = RangedTile<d>;
  extern __shared__ __align__(16) unsigned char shared[];
  const RangedAttention& a = p.call;
  const uint32_t stages = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  clear_padding<T, d>(stages);
  const int head = blockIdx.y, batch = blockIdx.z;

  int tile = blockIdx.x, s = 0;
  for (;; ++s) {
    const int tiles = (p.segments[s].rows - 1) / kRows + 1;
    if (tile < tiles) {
      tile = tiles - 1 - tile;  // the last rows first: they read the most keys
      break;
    }
    tile -= tiles;
  }
  const Segment& segment = p.segments[s];
  // The shuffle tells the compiler that the whole warp branches alike.
  const int row = tile * kRows + __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) * 32;
  const int rows = segment.rows - row, end_row = min((tile + 1) * kRows, segment.rows);
  const int output_row = segment.output + row;

  WarpRows<T, d, true> warp;
  warp.load_query(rows_of<T>(a.query, batch, head, segment.query + row), a.query.row_stride, rows,
                  p.sign);
  const DropoutBits bits = dropout_bits(p, batch, head);
  RowDropout dropout;
  dropout.threshold = p.threshold;
  float* log_sum_exp = a.log_sum_exp;
  // f(a place in a tensor, two values that belong there)
  const auto each_pair = [&](const HeadTensor& tensor, int head, const auto& f) {
    T* first = rows_of<T>(tensor, batch, head, output_row);
    warp.each_row([&](int r, int h, int i) {
      if (i >= rows) return;
      warp.each_column([&](int c, int column) {
        f(*reinterpret_cast<uint32_t*>(first + i * tensor.row_stride + column),
          warp.output[r][c][2 * h], warp.output[r][c][2 * h + 1]);
      });
    });
  };
  const auto write = [](uint32_t& to, float low, float high) { to = pack<T>(low, high); };

  const bool has_window = segment.window >= 0, has_context = segment.context_rows > 0;
  warp.clear();
#pragma unroll 1
  for (int g = 0; g < 2; ++g) {
    if (!(g == 0 ? has_window : has_context)) continue;
    const int first_key = g == 0 ? segment.window : segment.context;
    const KeyGroup keys =
        range_of<T>(a.keys[g], a.values[g], first_key, g == 0 ? end_row : segment.context_rows);
    if (p.threshold > 0) {
      warp.each_row(
          [&](int r, int h, int i) { dropout.rows[r][h] = bits.of_row(output_row + i, g); });
    }
    warp.clear();
    const int count = static_cast<int>(keys.count);
    stream<T, d>(keys, batch, head / p.queries_per_key, 0, stages,
                 KeyBits{p.threshold > 0, bits, first_key}, [&](uint32_t stage, int at) {
                   const int left = count - at;
                   // Row i sees the first min(left, diagonal + i) keys from here on.
                   const int diagonal = rows <= 0 ? -(1 << 30) : g == 0 ? row + 1 - at : left;
#pragma unroll 1
                   for (int i = 0; i < kKeyTile; i += 32) {
                     if (min(left, diagonal + 31) <= i) break;
                     const uint32_t key = stage + i * Tile::kRowBytes;
                     dropout.keys = stage + Tile::kTable + 4 * i;
                     warp.step(key, key + Tile::kTable / 2, p.factor, left - i, diagonal - i,
                               dropout);
                   }
                 });
    warp.normalise(p.kept_scale);
    if (threadIdx.x % 4 == 0) {
      const int64_t heads = a.batch * a.query_heads;
      float* to =
          log_sum_exp +
          ((g * heads + int64_t{batch} * a.query_heads + head) * a.output_rows + output_row);
      warp.each_row([&](int r, int h, int i) {
        if (i < rows) to[i] = warp.sum[r][h];
      });
    }
    if (!(has_window && has_context)) continue;
    each_pair(a.terms, g * a.query_heads + head, write);
    if (g == 0) continue;
    each_pair(a.terms, head, [](uint32_t& window, float& low, float& high) {  // its own, as stored
      const float2 term = unpack<T>(window);
      low += term.x;
      high += term.y;
    });
  }
  each_pair(a.output, head, write);
}

template <class T>
void launch_forward(const RangedPlan& plan, const Launch& how) {
  const RangedAttention& a = plan.call;
  int tiles = 0;
  for (int s = 0; s < a.segment_count; ++s) tiles += (plan.segments[s].rows - 1) / kRows + 1;
  const dim3 grid(tiles, a.query_heads, static_cast<unsigned>(a.batch));
#define TLINFORMER_LAUNCH(d)                                                                       \
  if (a.head_dim == d)                                                                             \
    return launch(how, tlin_ranged_attention<T, d>, "tlin_ranged_attention", grid, kRangedThreads, \
                  RangedTile<d>::kBytes, plan);
  TLINFORMER_HEAD_SIZES(TLINFORMER_LAUNCH)
#undef TLINFORMER_LAUNCH
}

void require_range(const char* name, int first, int count, int64_t all) {
  require(first >= 0 && count >= 0 && first + int64_t{count} <= all, "attention of ", count, " ",
          name, " from ", first, " on is out of range; there are ", all);
}

}  // namespace

RangedPlan make_plan(const RangedAttention& a) {
  constexpr int64_t kMost = 1'000'000'000;
  require(prefill_takes_head_size(a.head_dim), "attention has no CUDA kernel for heads of size ",
          a.head_dim, ", only for", prefill_head_sizes());
  require(a.kv_heads > 0 && a.query_heads % a.kv_heads == 0, "attention of ", a.query_heads,
          " query heads cannot share ", a.kv_heads, " key/value heads");
  require(a.segment_count <= kMostSegments, "attention of ", a.segment_count,
          " segments; a launch takes at most ", kMostSegments);
  require(a.output_rows <= kMost && a.query_heads < 65536 && a.batch < 65536, "attention of batch ",
          a.batch, ", ", a.query_heads, " heads, ", a.output_rows,
          " rows is too large for one launch");
  require(a.dropout >= 0 && a.dropout < 1, "dropout is ", a.dropout, ", must be in [0, 1)");
  RangedPlan plan{};
  plan.call = a;
  plan.call.segment_count = 0;
  for (int i = 0; i < a.segment_count; ++i) {
    const Segment& s = a.segments[i];
    if (s.rows == 0) continue;
    require_range("queries", s.query, s.rows, a.query_rows);
    require_range("output rows", s.output, s.rows, a.output_rows);
    if (s.window >= 0) require_range("window keys", s.window, s.rows, a.key_rows[0]);
    if (s.context_rows != 0)
      require_range("context keys", s.context, s.context_rows, a.key_rows[1]);
    require(s.window < 0 || s.context_rows == 0 || a.terms.data != nullptr,
            "attention to window and context needs a place for the terms of the output");
    plan.segments[plan.call.segment_count++] = s;
  }
  plan.queries_per_key = a.query_heads / a.kv_heads;
  plan.factor = a.scale * kLog2E;
  plan.threshold = static_cast<uint32_t>(a.dropout * 4294967296.0);
  plan.kept_scale = static_cast<float>(1 / (1 - plan.threshold / 4294967296.0));
  return plan;
}

void ranged_attention(const RangedAttention& a, const Launch& how) {
  RangedPlan plan = make_plan(a);
  if (a.batch == 0 || a.query_heads == 0 || plan.call.segment_count == 0) return;
  plan.factor = std::max(std::fabs(plan.factor), FLT_MIN);  // 0 would make NaN of masks
  plan.sign = a.scale < 0 ? 0x80008000u : 0;
  with_type(a.dtype, [&](auto tag) { launch_forward<typename decltype(tag)::type>(plan, how); });
}

}  // namespace tlinformer::cuda
