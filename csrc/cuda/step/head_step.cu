// The logits of a token: the kernel for any sizes, and the choice of one.
#include <algorithm>
#include <type_traits>

#include "candidate.cuh"
#include "normed_rows.cuh"
#include "rows_of_block.cuh"

namespace tlinformer::cuda {
namespace {

using namespace step;

constexpr int kHeadWarps = 8, kHeadAhead = 1;  // slices of the rows that a warp has in flight

// Rows as fragments in shared memory, this lane's.
template <int NT>
struct Fragments {
  const uint4* of_lane;
  __device__ void load(int, int) const {}
  __device__ uint4 at(int, int slice, int n) const { return of_lane[(slice * NT + n) * 32]; }
};

constexpr int kHeadShared = 30;  // percent; of more than 8 sequences

template <int NT>
constexpr int kHeadSlices = NT == 1   ? 8
                            : NT == 2 ? 6
                                      : 4;  // slices in flight

// A block has all of the vocabulary's tiles that are its own for 8 NT sequences at once, whose
// normed rows are in shared memory as fragments.
template <class T, int NT>
__global__ void __launch_bounds__(32 * kHeadWarps, 2)
    tlin_head_step(const __grid_constant__ HeadStep p) {
  using Normed = NormedRows<T, NT, kHeadWarps, kHeadAhead>;
  extern __shared__ uint4 fragments[];  // (slices, NT, 32)
  __shared__ typename Normed::Shared measures;
  __shared__ Candidate of_warps[kHeadWarps][8 * NT];
  const int warp = warp_index();
  const RowsOfBlock<NT> own(p.batch);
  int tile = warp * gridDim.x + blockIdx.x;
  WeightStream<T, 1, kHeadSlices<NT>, true> stream({p.embed}, p.hidden_size, p.vocab_size, 0, 1);
  stream.start(tile);
  Normed rows(measures, p.norm, p.x + int64_t{own.first} * p.hidden_size, own.count, p.hidden_size);
  wait_for_previous();
  let_next_start();  // not before: see launch.cuh
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const unsigned live =
      __ballot_sync(0xffffffffu, lane < own.count && is_live(p, own.first + lane));
  rows.measure();
  const int slices = ceil_div(p.hidden_size, kSlice);
#pragma unroll 1
  for (int slice = warp;;) {
#pragma unroll
    for (int i = 0; i < kHeadAhead; ++i) {
      const int at = slice + i * kHeadWarps;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        if (at < slices) fragments[(at * NT + n) * 32 + lane] = rows.at(i, at, n);
      }
    }
    slice += kHeadAhead * kHeadWarps;
    if (slice >= slices) break;
#pragma unroll
    for (int i = 0; i < kHeadAhead; ++i) rows.load(i, slice + i * kHeadWarps);
  }
  __syncthreads();
  const Fragments<NT> inputs{fragments + lane};

  Candidate best[NT][2];
#pragma unroll
  for (int n = 0; n < NT; ++n) best[n][0] = best[n][1] = kNoCandidate;
  for (; tile * kTile < p.vocab_size; tile += kHeadWarps * gridDim.x) {
    Sums<1, NT> sums;
    stream.multiply(inputs, sums, tile + kHeadWarps * gridDim.x);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = tile * kTile + g + i / 2 * 8, row = 8 * n + 2 * q + i % 2;
        if (token >= p.vocab_size || !(live >> row & 1)) continue;
        const float logit = sums.at(0, n, i);
        p.logits[int64_t{own.first + row} * p.vocab_size + token] = logit;
        best[n][i % 2] = likelier(best[n][i % 2], {logit, token});
      }
    }
  }

#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Candidate found = likeliest_of_lanes<4, 32>(best[n][i]);
      if (g == 0) of_warps[warp][8 * n + 2 * q + i] = found;
    }
  }
  __syncthreads();
  const int row = threadIdx.x;
  if (row >= own.count || !(live >> row & 1)) return;
  Candidate found = of_warps[0][row];
  for (int w = 1; w < kHeadWarps; ++w) found = likelier(found, of_warps[w][row]);
  p.candidates[int64_t{own.first + row} * gridDim.x + blockIdx.x] = found;
}

}  // namespace

int head_candidates(int vocab_size) {
  return std::min(ceil_div(vocab_size, kTile), 2 * multiprocessors());
}

void head_step(const HeadStep& p, const Launch& how) {
  const int blocks = head_candidates(p.vocab_size);
  if (p.batch == 1 ? head_row(p, blocks, how) : head_few(p, blocks, how)) return;
  require(p.parts.count == 0, "head_step adds no parts of an MLP here (there are ", p.parts.count,
          "); head_row does, in code for compute capability 9.0");
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto with = [&](auto groups) {
      constexpr int NT = decltype(groups)::value;
      const size_t shared = NT * 32 * sizeof(uint4) * ceil_div(p.hidden_size, kSlice);
      Launch two = how;  // blocks are to fit on a multiprocessor
      two.shared_percent = NT == 1 ? kLeastShared : kHeadShared;
      launch(two, tlin_head_step<T, NT>, "head_step", grid_of<NT>(p, blocks), 32 * kHeadWarps,
             shared, p);
    };
    // As many at once as leave room for two blocks, of few kilobytes a row.
    constexpr int kRoom = 95 * 1024;
    const int fit =
        kRoom / (ceil_div(p.hidden_size, kSlice) * 32 * static_cast<int>(sizeof(uint4)));
    if (p.batch <= 8 || fit < 2) return with(std::integral_constant<int, 1>{});
    if (p.batch <= 16 || fit < 4) return with(std::integral_constant<int, 2>{});
    with(std::integral_constant<int, 4>{});
  });
}

}  // namespace tlinformer::cuda
