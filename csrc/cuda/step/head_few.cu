// The logits of at most 8 sequences' tokens.
#include "candidate.cuh"
#include "embed_stream.cuh"
#include "few_sums.cuh"
#include "normed_rows.cuh"

namespace tlinformer::cuda {
namespace {

using namespace step;

[[maybe_unused]] constexpr int kAhead = 3;  // not where the kernel is empty

template <class T>
__global__ void __launch_bounds__(32 * kHeadWarps)
    tlin_head_few(const __grid_constant__ HeadStep p, const __grid_constant__ Places places,
                  int candidates) {
#if __CUDA_ARCH__ >= 900
  using Normed = NormedRows<T, 1, kHeadWarps, kAhead>;
  extern __shared__ __align__(128) char memory[];
  __shared__ uint64_t arrived[kHeadWarps][kStages];
  __shared__ typename Normed::Shared measures;
  __shared__ unsigned live_rows;
  __shared__ Candidate best_of_warps[kHeadWarps][kFewRows];
  const int warp = warp_index(), lane = threadIdx.x % 32, row = lane / 4;
  EmbedStream<T> embed(p, places, memory, arrived[warp]);
  Normed rows(measures, p.norm, p.x, p.batch, p.hidden_size);

  wait_for_previous();
  let_next_start();  // not before: see launch.cuh
  const bool asks = warp == kHeadWarps - 1 && lane < p.batch;
  const int live_row = load_now(&p.state[lane].live, asks);
  rows.measure();
  const unsigned live_lanes = __ballot_sync(0xffffffffu, live_row != 0);
  if (threadIdx.x == 32 * (kHeadWarps - 1)) live_rows = live_lanes;
  uint4* const operand = reinterpret_cast<uint4*>(memory + places.row) + lane;
  const int slices = ceil_div(p.hidden_size, kSlice);
#pragma unroll 1
  for (int slice = warp;;) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = slice + i * kHeadWarps;
      const uint4 words = rows.at(i, at, 0);
      if (at < slices) operand[at * 32] = other_order(words);
    }
    slice += kAhead * kHeadWarps;
    if (slice >= slices) break;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) rows.load(i, slice + i * kHeadWarps);
  }
  __syncthreads();
  const bool live = live_rows >> row & 1;

  Candidate best = kNoCandidate;
  float* const logits = p.logits + int64_t{row} * p.vocab_size;
  embed.template multiply<FewSums>(operand, [&](int tile, const FewSums& sums) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = tile * kTile + i / 2 * 8 + lane % 4 * 2 + i % 2;
      if (token >= p.vocab_size || !live) continue;
      const float logit = i % 2 == 0 ? sums.at(i / 2).x : sums.at(i / 2).y;
      logits[token] = logit;
      best = likelier(best, {logit, token});
    }
  });

  best = likeliest_of_lanes<1, 4>(best);
  if (lane % 4 == 0) best_of_warps[warp][row] = best;
  __syncthreads();
  if (warp > 0 || !live) return;
  for (int w = 0; w < kHeadWarps; ++w) best = likelier(best, best_of_warps[w][row]);
  // Several times, if there are more places than blocks.
  for (int at = blockIdx.x + lane % 4 * gridDim.x; at < candidates; at += 4 * gridDim.x) {
    p.candidates[int64_t{row} * candidates + at] = best;
  }
#endif
}

}  // namespace

bool head_few(const HeadStep& p, int candidates, const Launch& how) {
  bool launched = false;
  with_type(p.dtype, [&](auto type) {
    const auto kernel = tlin_head_few<typename decltype(type)::type>;
    const Places places(p.hidden_size, sizeof(uint4));
    launched = p.batch <= kFewRows && compiled_for(kernel, 90) && places.end <= kHeadMemory;
    if (!launched) return;
    const int blocks = std::min(ceil_div(p.vocab_size, kTile), multiprocessors());
    launch(how, kernel, "head_few", static_cast<unsigned>(blocks), 32 * kHeadWarps,
           static_cast<size_t>(places.end), p, places, candidates);
  });
  return launched;
}

}  // namespace tlinformer::cuda
