// Gradient of keys and values. A block is a tile of keys and a key/value head: for every segment
// and query head that reads some of them, the queries and their outputs' gradients stream past.
//   P^T = exp2(factor K Q^T - log_sum_exp)   dV = P^T dO   dK = scale (P (dP - delta))^T Q
#include "ranged_gradient.cuh"

namespace tlinformer::cuda {
namespace {

template <class T, int d>
struct KeyRows {
  static constexpr int kSets = key_sets(d);
  static constexpr int kRows = 16 * kSets * (kRangedThreads / 32);
  using Held = HeldRows<T, d, kSets>;
};

constexpr int blocks_of(int d) { return d == 64 ? 3 : 2; }

// By asynchronous copies, rows behind the `left` ones as 0: a word each.
__device__ inline void copy_words(uint32_t to, const float* from, int left) {
  if (threadIdx.x >= kKeyTile) return;
  const int i = static_cast<int>(threadIdx.x);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to + 4 * i),
               "l"(from + (i < left ? i : 0)), "r"(i < left ? 4 : 0)
               : "memory");
}

// `groups`: bit 0 of the keys as window, bit 1 as context.
template <class T, int d>
__global__ void __launch_bounds__(kRangedThreads, blocks_of(d))
    tlin_ranged_grad_keys(const __grid_constant__ RangedPlan p, int groups) {
  using Tile = RangedTile<d>;
  using Held = typename KeyRows<T, d>::Held;
  constexpr int kSets = KeyRows<T, d>::kSets, kRows = KeyRows<T, d>::kRows;
  constexpr int kWarpRows = 16 * kSets;
  extern __shared__ __align__(16) unsigned char shared[];
  const RangedAttention& a = p.call;
  const uint32_t stages = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  clear_padding<T, d>(stages);
  const int kv_head = blockIdx.y, batch = blockIdx.z, either = groups == 2 ? 1 : 0;
  const int first = blockIdx.x * kRows;
  const int warp_first = first + __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) * kWarpRows;
  const int key_rows = static_cast<int>(a.key_rows[either]);

  Held key, value;
  key.load(rows_of<T>(a.keys[either], batch, kv_head, warp_first), a.keys[either].row_stride,
           key_rows - warp_first);
  value.load(rows_of<T>(a.values[either], batch, kv_head, warp_first), a.values[either].row_stride,
             key_rows - warp_first);
  typename Held::Sums grad_key{}, grad_value{};
#pragma unroll 1
  for (int s = 0; s < 2 * a.segment_count; ++s) {
    const int g = s % 2;
    const Segment& segment = p.segments[s / 2];
    const int begin = g == 0 ? segment.window : segment.context;
    const int count = g == 1 ? segment.context_rows : begin < 0 ? 0 : segment.rows;
    if ((groups >> g & 1) == 0 || begin + count <= first || begin >= first + kRows) continue;
    const int local = warp_first - begin;  // the warp's first key in the range
    const int skipped = g == 0 ? max(0, first - begin) / kKeyTile : 0;
#pragma unroll 1
    for (int q = 0; q < p.queries_per_key; ++q) {
      const int head = kv_head * p.queries_per_key + q;
      const DropoutBits bits = dropout_bits(p, batch, head);
      uint32_t key_bits[kSets][2];
      Held::each_row([&](int r, int h, int row) {
        key_bits[r][h] = p.threshold > 0 ? bits.of_key(warp_first + row) : 0;
      });
      const auto table = [&](uint32_t to, int row) {
        const int64_t place =
            ((g * a.batch + batch) * a.query_heads + head) * a.output_rows + segment.output + row;
        copy_words(to, a.log_sum_exp + place, segment.rows - row);
        copy_words(to + Tile::kColumn, p.gradient.delta + place, segment.rows - row);
        if (p.threshold > 0 && threadIdx.x < kKeyTile) {
          store_word(to + 2 * Tile::kColumn + 4 * threadIdx.x,
                     bits.of_row(segment.output + row + static_cast<int>(threadIdx.x), g));
        }
      };
      // The second matrix lies at the segment's place in its own rows.
      HeadTensor grads = p.gradient.output;
      grads.data =
          static_cast<T*>(grads.data) + (segment.output - segment.query) * grads.row_stride;
      stream<T, d>(
          range_of<T>(a.query, grads, segment.query, segment.rows), batch, head, skipped, stages,
          table, [&](uint32_t stage, int at) {
#pragma unroll 1
            for (int i = 0; i < kKeyTile; i += 16) {
              // Of these 16 queries the warp's key x is seen by those from `diagonal` + x on.
              const int left = segment.rows - at - i;
              const int diagonal = g == 0 ? local - at - i : -kWarpRows;
              if (left <= 0) break;
              if (diagonal >= 16 || local + kWarpRows <= 0 || local >= count) continue;
              const uint32_t queries = stage + i * Tile::kRowBytes;
              const uint32_t slopes = queries + Tile::kTable / 2;
              const uint32_t words = stage + Tile::kTable + 4 * (i + threadIdx.x % 4 * 2);
              typename Held::Scores score, slope;
              key.product(score, queries);
              value.product(slope, slopes);
              const bool masked =
                  left < 16 || diagonal + kWarpRows > 1 || local < 0 || local + kWarpRows > count;
              typename Held::Weights weights;
#pragma unroll
              for (int n = 0; n < 2; ++n) {
                const uint2 sums = load_pair(words + 32 * n);
                const uint2 deltas = load_pair(words + Tile::kColumn + 32 * n);
                const float sum[2] = {__uint_as_float(sums.x), __uint_as_float(sums.y)};
                const float delta[2] = {__uint_as_float(deltas.x), __uint_as_float(deltas.y)};
                uint2 drawn{};
                if (p.threshold > 0) drawn = load_pair(words + 2 * Tile::kColumn + 32 * n);
                Held::each_row([&](int r, int h, int row) {
                  float* x = &score[r][n][2 * h];
                  float* y = &slope[r][n][2 * h];
#pragma unroll
                  for (int j = 0; j < 2; ++j) {
                    x[j] = exp2_fast(fmaf(x[j], p.factor, -sum[j]));
                    if (masked) {
                      const int column = 8 * n + static_cast<int>(threadIdx.x % 4) * 2 + j;
                      const bool seen = column < left && column >= diagonal + row &&
                                        local + row >= 0 && local + row < count;
                      if (!seen) x[j] = 0;
                    }
                  }
                  uint32_t weight = pack<T>(x[0], x[1]);
                  if (p.threshold > 0) {
                    const uint32_t kept = kept_halves(key_bits[r][h] * drawn.x,
                                                      key_bits[r][h] * drawn.y, p.threshold);
                    weight &= kept;
                    y[0] = (kept & 0xffffu) != 0 ? y[0] * p.kept_scale : 0;
                    y[1] = (kept & 0xffff0000u) != 0 ? y[1] * p.kept_scale : 0;
                  }
                  weights[r][2 * n + h] = weight;
#pragma unroll
                  for (int j = 0; j < 2; ++j) x[j] *= y[j] - delta[j];
                });
              }
              Held::add_product(grad_value, weights, slopes);
              Held::pack_weights(weights, score);
              Held::add_product(grad_key, weights, queries);
            }
          });
    }
  }
  const auto write = [&](const typename Held::Sums& sums, float scale, const HeadTensor& to) {
    Held::write(sums, scale, rows_of<T>(to, batch, kv_head, warp_first), to.row_stride,
                key_rows - warp_first);
  };
  write(grad_key, a.scale, p.gradient.keys[either]);
  write(grad_value, p.kept_scale, p.gradient.values[either]);
}

template <class T>
void launch_typed(const RangedPlan& plan, int groups, const Launch& how) {
  const RangedAttention& a = plan.call;
  const int64_t rows = a.key_rows[groups == 2 ? 1 : 0];
  if (rows == 0) return;
  const auto launch_for = [&](auto size) {
    constexpr int d = decltype(size)::value, kRows = KeyRows<T, d>::kRows;
    const dim3 grid(static_cast<unsigned>((rows + kRows - 1) / kRows), a.kv_heads,
                    static_cast<unsigned>(a.batch));
    launch(how, tlin_ranged_grad_keys<T, d>, "tlin_ranged_grad_keys", grid, kRangedThreads,
           RangedTile<d>::kBytes, plan, groups);
  };
#define TLINFORMER_LAUNCH(size) \
  if (a.head_dim == size) return launch_for(std::integral_constant<int, size>{});
  TLINFORMER_HEAD_SIZES(TLINFORMER_LAUNCH)
#undef TLINFORMER_LAUNCH
}

}  // namespace

void launch_grad_keys(const RangedPlan& plan, const Launch& how) {
  const RangedGradient& gradient = plan.gradient;
  const bool shared = gradient.keys[0].data == gradient.keys[1].data;
  with_type(plan.call.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (shared) return launch_typed<T>(plan, 3, how);
    launch_typed<T>(plan, 1, how);
    launch_typed<T>(plan, 2, how);
  });
}

void ranged_attention_gradient(const RangedAttention& a, const RangedGradient& gradient,
                               const Launch& how) {
  RangedPlan plan = make_plan(a);
  plan.gradient = gradient;
  if (a.batch == 0 || a.query_heads == 0) return;
  launch_grad_queries(plan, how);
  launch_grad_keys(plan, how);
}

}  // namespace tlinformer::cuda
