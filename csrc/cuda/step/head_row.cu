// The logits of a single sequence's token: the embedding's rows stream through shared memory, whose
// copies begin long before x exists.
#include "../attention/row_copy.cuh"
#include "candidate.cuh"
#include "folded_row.cuh"

namespace tlinformer::cuda {
namespace {

using namespace step;

constexpr int kWarps = 6, kStages = 2;      // stages of each warp, which shares them with none
[[maybe_unused]] constexpr int kAhead = 3;  // not where the kernel is empty
constexpr int kMemory = 220 * 1024;

// In bytes: the stages, of 16 rows' next `columns` columns each, and behind them x as B operand.
struct Places {
  int columns = 16 * kSlice, pieces, pitch, stage, row, end;

  explicit Places(int width) {
    for (;; columns -= kSlice) {
      pitch = columns / kSlice % 2 * -64 + 2 * columns + 64;  // odd times 64: rows lie in all banks
      stage = kTile * pitch;
      row = kWarps * kStages * stage;
      end = row + ceil_div(width, kSlice) * 32 * static_cast<int>(sizeof(uint2));
      if (columns == kSlice || (end <= kMemory && columns < width + kSlice)) break;
    }
    pieces = ceil_div(width, columns);
  }
};

template <class T, int MOST>
__global__ void __launch_bounds__(32 * kWarps)
    tlin_head_row(const __grid_constant__ HeadStep p, const __grid_constant__ Places places,
                  int candidates, float per_width) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char memory[];
  __shared__ uint64_t arrived[kWarps][kStages];
  __shared__ float2 measures[kWarps];
  __shared__ int live_of_block;
  __shared__ Candidate best_of_warps[kWarps];
  const int warp = warp_index(), lane = threadIdx.x % 32;
  const int width = p.hidden_size, vocab = p.vocab_size;
  char* const stages = memory + warp * kStages * places.stage;
  const int step = kWarps * gridDim.x, first = blockIdx.x + warp * gridDim.x;
  const int tiles = ceil_div(vocab, kTile);
  if (lane == 0) {
    for (uint64_t& barrier : arrived[warp]) prepare_copies(&barrier);
  }
  __syncwarp();

  // The copies are those of tile `next`, columns `column` and on; then of the tile after it.
  int next = first, column = 0;
  const auto copy = [&](int stage) {
    if (next >= tiles) return;
    const int bytes = 2 * min(places.columns, width - column);
    const uint32_t barrier = shared_address(&arrived[warp][stage]);
    expect_copies(kTile * bytes, &arrived[warp][stage], lane);
    if (lane < kTile) {
      const int64_t row = min(next * kTile + lane, vocab - 1);  // the last again: nobody stores it
      copy_bulk_once(stages + stage * places.stage + lane * places.pitch,
                     static_cast<const T*>(p.embed) + row * width + column, bytes, barrier);
    }
    column += places.columns;
    if (column >= width) column = 0, next += step;
  };
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) copy(stage);
  FoldedRow<T, kWarps, kAhead, MOST> row(p.norm, p.x, p.parts, width);

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
      const int at = warp + slice + i * kWarps;
      const uint2 words = row.at(i);
      if (at < slices) operand[at * 32] = words;
    }
    slice += kAhead * kWarps;
    if (slice >= slices) break;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) row.load(i, slice + i * kWarps);
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
  int stage = 0, parity = 0;
  const int g = lane / 4, q = lane % 4;
  const auto turn = [&] {
    stage ^= 1;
    if (stage == 0) parity ^= 1;
  };
  static_assert(kStages == 2);
#pragma unroll 1
  for (int tile = first; tile < tiles; tile += step) {
    RowSums sums;
#pragma unroll 1
    for (int piece = 0; piece < places.pieces; ++piece) {
      const int begin = piece * places.columns, left = width - begin - 8 * q;
      const char* const from = stages + stage * places.stage + g * places.pitch + 16 * q;
      await_tile<1>(&arrived[warp][stage], parity, false);
      const int count = min(places.columns, width - begin);
#pragma unroll 7
      for (int k = 0; k < count; k += kSlice) {
        const uint2 b = operand[(begin + k)];  // 32 lanes a slice of 32
        uint4 low = {0, 0, 0, 0}, high = low;  // what lies behind the last column may be NaN
        if (k < left) {
          low = *reinterpret_cast<const uint4*>(from + 2 * k);
          high = *reinterpret_cast<const uint4*>(from + 8 * places.pitch + 2 * k);
        }
        sums.add<T>(low, high, b);
      }
      __syncwarp();
      copy(stage);
      turn();
    }
    const float logit = norm.apply(sums.own());
    const int token = tile * kTile + RowSums::own_output();
    if (token >= vocab || live == 0) continue;
    if (q % 2 == 0) p.logits[token] = logit;
    best = likelier(best, {logit, token});
  }

  best = likeliest_of_warp(best);
  if (lane == 0) best_of_warps[warp] = best;
  __syncthreads();
  if (threadIdx.x > 0 || live == 0) return;
  for (int w = 1; w < kWarps; ++w) best = likelier(best, best_of_warps[w]);
  // Several times, if there are more places than blocks.
  for (int at = blockIdx.x; at < candidates; at += gridDim.x) p.candidates[at] = best;
#endif
}

}  // namespace

bool head_row(const HeadStep& p, int candidates, const Launch& how) {
  bool launched = false;
  const auto with = [&](auto type, auto most) {
    const auto kernel = tlin_head_row<typename decltype(type)::type, decltype(most)::value>;
    const Places places(p.hidden_size);
    launched = compiled_for(kernel, 90) && places.end <= kMemory;
    if (!launched) return;
    const int blocks = std::min(ceil_div(p.vocab_size, kTile), multiprocessors());
    launch(how, kernel, "head_row", static_cast<unsigned>(blocks), 32 * kWarps,
           static_cast<size_t>(places.end), p, places, candidates,
           1.0f / static_cast<float>(p.hidden_size));
  };
  with_type(p.dtype,
            [&](auto type) { with_most(p.parts.count, [&](auto most) { with(type, most); }); });
  return launched;
}

}  // namespace tlinformer::cuda
