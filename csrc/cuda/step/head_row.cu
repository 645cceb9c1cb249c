// The logits of a single sequence's token.
#include "candidate.cuh"
#include "embed_stream.cuh"
#include "folded_row.cuh"

namespace tlinformer::cuda {
namespace {

using namespace step;

[[maybe_unused]] constexpr int kAhead = 3;  // not where the kernel is empty

template <class T, int MOST>
__global__ void __launch_bounds__(32 * kHeadWarps)
    tlin_head_row(const __grid_constant__ HeadStep p, const __grid_constant__ Places places,
                  int candidates, float per_width) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char memory[];
  __shared__ uint64_t arrived[kHeadWarps][kStages];
  __shared__ float2 measures[kHeadWarps];
  __shared__ int live_of_block;
  __shared__ Candidate best_of_warps[kHeadWarps];
  const int warp = warp_index(), lane = threadIdx.x % 32;
  const int width = p.hidden_size;
  EmbedStream<T> embed(p, places, memory, arrived[warp]);
  FoldedRow<T, kHeadWarps, kAhead, MOST> row(p.norm, p.x, p.parts, width);

  wait_for_previous();
  let_next_start();  // not before: see launch.cuh
  int live = load_now(&p.state->live, threadIdx.x == 0);
  row.start();
  uint2* const operand = reinterpret_cast<uint2*>(memory + places.row) + lane;
  const int slices = ceil_div(width, kSlice);
#pragma unroll 1
  for (int slice = 0;;) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = warp + slice + i * kHeadWarps;
      const uint2 words = row.at(i);
      if (at < slices) operand[at * 32] = words;
    }
    slice += kAhead * kHeadWarps;
    if (slice >= slices) break;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) row.load(i, slice + i * kHeadWarps);
  }
  const float2 own = row.measures();
  if (lane == 0) measures[warp] = own;
  if (threadIdx.x == 0) live_of_block = live;
  __syncthreads();
  live = live_of_block;
  float2 measure = {0, 0};
#pragma unroll
  for (const float2 part : measures) measure = {measure.x + part.x, measure.y + part.y};
  const NormOf<T> norm(measure, per_width, p.norm.epsilon);

  Candidate best = kNoCandidate;
  embed.template multiply<RowSums>(operand, [&](int tile, const RowSums& sums) {
    const float logit = norm.apply(sums.own());
    const int token = tile * kTile + RowSums::own_output();
    if (token >= p.vocab_size || live == 0) return;
    if (lane % 2 == 0) p.logits[token] = logit;
    best = likelier(best, {logit, token});
  });

  best = likeliest_of_warp(best);
  if (lane == 0) best_of_warps[warp] = best;
  __syncthreads();
  if (threadIdx.x > 0 || live == 0) return;
  for (int w = 1; w < kHeadWarps; ++w) best = likelier(best, best_of_warps[w]);
  // Several times, if there are more places than blocks.
  for (int at = blockIdx.x; at < candidates; at += gridDim.x) p.candidates[at] = best;
#endif
}

}  // namespace

bool head_row(const HeadStep& p, int candidates, const Launch& how) {
  bool launched = false;
  const auto with = [&](auto type, auto most) {
    const auto kernel = tlin_head_row<typename decltype(type)::type, decltype(most)::value>;
    const Places places(p.hidden_size, sizeof(uint2));
    launched = compiled_for(kernel, 90) && places.end <= kHeadMemory;
    if (!launched) return;
    const int blocks = std::min(ceil_div(p.vocab_size, kTile), multiprocessors());
    launch(how, kernel, "head_row", static_cast<unsigned>(blocks), 32 * kHeadWarps,
           static_cast<size_t>(places.end), p, places, candidates,
           1.0f / static_cast<float>(p.hidden_size));
  };
  with_type(p.dtype,
            [&](auto type) { with_most(p.parts.count, [&](auto most) { with(type, most); }); });
  return launched;
}

}  // namespace tlinformer::cuda
