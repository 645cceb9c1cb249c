// Gradient of the queries, and each output row's delta. A block is a tile of queries and a head:
// for every segment that holds some of them, the keys they read stream past.
//   P = exp2(factor Q K^T - log_sum_exp)   dP = dO V^T   dQ = scale P (dP - delta) K
// delta, a row's sum of P dP, is that of dO times the group's output (FlashAttention-2).
#include "ranged_gradient.cuh"

namespace tlinformer::cuda {
namespace {

template <class T, int d>
struct QueryTile {
  static constexpr int kSets = query_sets(d);
  static constexpr int kRows = 16 * kSets * (kRangedThreads / 32);
  using Held = HeldRows<T, d, kSets>;
};

constexpr int blocks_of(int d) { return d <= 40 ? 3 : 2; }

template <class T, int d>
__global__ void __launch_bounds__(kRangedThreads, blocks_of(d))
    tlin_ranged_grad_queries(const __grid_constant__ RangedPlan p) {
  using Tile = RangedTile<d>;
  using Held = typename QueryTile<T, d>::Held;
  constexpr int kSets = QueryTile<T, d>::kSets, kRows = QueryTile<T, d>::kRows;
  constexpr int kWarpRows = 16 * kSets;
  extern __shared__ __align__(16) unsigned char shared[];
  const RangedAttention& a = p.call;
  const uint32_t stages = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  clear_padding<T, d>(stages);
  const int head = blockIdx.y, batch = blockIdx.z;
  const int first = (gridDim.x - 1 - blockIdx.x) * kRows;
  const int warp_first = first + __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) * kWarpRows;
  const int query_rows = static_cast<int>(a.query_rows);

  Held query, grad;
  query.load(rows_of<T>(a.query, batch, head, warp_first), a.query.row_stride,
             query_rows - warp_first);
  typename Held::Sums sums{};
#pragma unroll 1
  for (int s = 0; s < a.segment_count; ++s) {
    const Segment& segment = p.segments[s];
    const int local = warp_first - segment.query;          // the warp's first row in the segment
    const int begin = -local, end = segment.rows - local;  // the warp's rows inside it
    if (segment.query + segment.rows <= first || segment.query >= first + kRows) continue;
    const int output_row = segment.output + local;
    const bool has_context = segment.context_rows > 0, has_window = segment.window >= 0;
    const int64_t line = int64_t{batch} * a.query_heads + head;
    const int64_t group_size = a.batch * a.query_heads * a.output_rows;

    float delta[2][kSets][2] = {};
    {
      const T* outputs = rows_of<T>(a.output, batch, head, output_row);
      const T* windows = rows_of<T>(a.terms, batch, head, output_row);
      const T* contexts = rows_of<T>(a.terms, batch, a.query_heads + head, output_row);
      grad.load(rows_of<T>(p.gradient.output, batch, head, output_row),
                p.gradient.output.row_stride, begin, end,
                [&](int r, int h, int row, int column, uint32_t word) {
                  const auto times = [&](const T* x, int64_t stride) {
                    const float2 y =
                        unpack<T>(*reinterpret_cast<const uint32_t*>(x + row * stride + column));
                    const float2 z = unpack<T>(word);
                    return y.x * z.x + y.y * z.y;
                  };
                  if (!has_window || !has_context) {
                    delta[has_window ? 0 : 1][r][h] += times(outputs, a.output.row_stride);
                  } else {
                    delta[0][r][h] += times(windows, a.terms.row_stride);
                    delta[1][r][h] += times(contexts, a.terms.row_stride);
                  }
                });
    }
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      Held::each_row([&](int r, int h, int row) {
        float& x = delta[g][r][h];
        x += __shfl_xor_sync(0xffffffffu, x, 1);
        x += __shfl_xor_sync(0xffffffffu, x, 2);
        if (threadIdx.x % 4 == 0 && row >= begin && row < end) {
          p.gradient.delta[g * group_size + line * a.output_rows + output_row + row] = x;
        }
      });
    }

#pragma unroll 1
    for (int g = 0; g < 2; ++g) {
      if (!(g == 0 ? has_window : has_context)) continue;
      float shift[kSets][2];  // minus the log-sum-exp; -inf makes the others' probabilities 0
      uint32_t row_bits[kSets][2];
      const DropoutBits bits = dropout_bits(p, batch, head);
      Held::each_row([&](int r, int h, int row) {
        shift[r][h] = -INFINITY;
        if (row >= begin && row < end) {
          shift[r][h] = -a.log_sum_exp[g * group_size + line * a.output_rows + output_row + row];
        }
        row_bits[r][h] = p.threshold > 0 ? bits.of_row(output_row + row, g) : 0;
        if (g == 1) delta[0][r][h] = delta[1][r][h];
      });
      const int first_key = g == 0 ? segment.window : segment.context;
      const int count =
          g == 0 ? min(segment.rows, first + kRows - segment.query) : segment.context_rows;
      stream<T, d>(range_of<T>(a.keys[g], a.values[g], first_key, count), batch,
                   head / p.queries_per_key, 0, stages, KeyBits{p.threshold > 0, bits, first_key},
                   [&](uint32_t stage, int at) {
#pragma unroll 1
                     for (int i = 0; i < kKeyTile; i += 16) {
                       // The warp's row x sees the first min(left, diagonal + x) of these 16 keys.
                       const int left = count - at - i;
                       const int diagonal = g == 0 ? local + 1 - at - i : left;
                       if (min(left, diagonal + kWarpRows - 1) <= 0) break;
                       const uint32_t keys = stage + i * Tile::kRowBytes;
                       const uint32_t values = keys + Tile::kTable / 2;
                       typename Held::Scores score, slope;
                       query.product(score, keys);
                       grad.product(slope, values);
                       const int t = threadIdx.x % 4 * 2;
                       if (p.threshold > 0) {
#pragma unroll
                         for (int n = 0; n < 2; ++n) {
                           const uint2 key = load_pair(stage + Tile::kTable + 4 * (i + 8 * n + t));
                           Held::each_row([&](int r, int h, int) {
                             float* x = &slope[r][n][2 * h];
                             x[0] = row_bits[r][h] * key.x >= p.threshold ? x[0] * p.kept_scale : 0;
                             x[1] = row_bits[r][h] * key.y >= p.threshold ? x[1] * p.kept_scale : 0;
                           });
                         }
                       }
                       const bool masked = min(left, diagonal) < 16;
                       Held::each_row([&](int r, int h, int row) {
                         const int visible = masked ? min(left, diagonal + row) - t : 16;
#pragma unroll
                         for (int n = 0; n < 2; ++n) {
#pragma unroll
                           for (int j = 0; j < 2; ++j) {
                             float& x = score[r][n][2 * h + j];
                             x = exp2_fast(fmaf(x, p.factor, shift[r][h])) *
                                 (slope[r][n][2 * h + j] - delta[0][r][h]);
                             if (masked && 8 * n + j >= visible) x = 0;
                           }
                         }
                       });
                       typename Held::Weights weights;
                       Held::pack_weights(weights, score);
                       Held::add_product(sums, weights, keys);
                     }
                   });
    }
  }
  Held::write(sums, a.scale, rows_of<T>(p.gradient.query, batch, head, warp_first),
              p.gradient.query.row_stride, query_rows - warp_first);
}

template <class T>
void launch_typed(const RangedPlan& plan, const Launch& how) {
  const RangedAttention& a = plan.call;
  const auto launch_for = [&](auto size) {
    constexpr int d = decltype(size)::value, kRows = QueryTile<T, d>::kRows;
    const dim3 grid(static_cast<unsigned>((a.query_rows + kRows - 1) / kRows), a.query_heads,
                    static_cast<unsigned>(a.batch));
    launch(how, tlin_ranged_grad_queries<T, d>, "tlin_ranged_grad_queries", grid, kRangedThreads,
           RangedTile<d>::kBytes, plan);
  };
#define TLINFORMER_LAUNCH(size) \
  if (a.head_dim == size) return launch_for(std::integral_constant<int, size>{});
  TLINFORMER_HEAD_SIZES(TLINFORMER_LAUNCH)
#undef TLINFORMER_LAUNCH
}

}  // namespace

void launch_grad_queries(const RangedPlan& plan, const Launch& how) {
  if (plan.call.query_rows == 0) return;
  with_type(plan.call.dtype,
            [&](auto tag) { launch_typed<typename decltype(tag)::type>(plan, how); });
}

}  // namespace tlinformer::cuda
