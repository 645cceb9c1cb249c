// A block a sequence. Greedy draws take the likeliest of head_step's candidates; all others read
// the logits, with as many threads as a block can have.
#include "../numeric.cuh"
#include "draw.cuh"
#include "sample.h"

namespace tlinformer::cuda {
namespace {

using namespace sampler;

constexpr int kFew = 256;  // threads that go on where there are no logits to read

// Of all candidates, found by every warp for itself: no barrier, and all loads under way at once.
__device__ Candidate likeliest(const Candidate* candidates, int count) {
  constexpr int kAhead = 9;
  unsigned best = 0, token = kNoToken;  // `best` orders as logits do, NaN above all
  for (int first = lane(); first - lane() < count; first += 32 * kAhead) {
    unsigned keys[kAhead], ids[kAhead], key = best;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = min(first + 32 * i, count - 1);  // the last one again does no harm
      const float2 c = reinterpret_cast<const float2*>(candidates)[at];
      const unsigned bits = __float_as_uint(c.x + 0.0f);  // -0 is 0
      keys[i] = isnan(c.x) ? 0xffffffffu : bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
      ids[i] = __float_as_uint(c.y);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) key = max(key, keys[i]);
    key = __reduce_max_sync(kAllLanes, key);
    unsigned id = key == best ? token : kNoToken;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (keys[i] == key) id = min(id, ids[i]);
    }
    token = __reduce_min_sync(kAllLanes, id);
    best = key;
  }
  return {__uint_as_float(best >> 31 ? best & 0x7fffffffu : ~best), static_cast<int32_t>(token)};
}

// The lowest id of a NaN, or 0.
__device__ int first_nan(const float* logits, int vocab_size, int threads, Shared& s) {
  int own = kNoToken;
  for (int id = vocab_size - 1 - threadIdx.x; id >= 0; id -= threads) {
    if (isnan(logits[id])) own = id;
  }
  const int found = lowest(own, s);
  return found == kNoToken ? 0 : found;
}

// All but the plain greedy draw; of NaN, -2 - (its index).
__device__ int32_t draw(const SampleStep& s, int row, int64_t position, Candidate best, int threads,
                        Shared& shared) {
  if (threadIdx.x == 0) shared.best = best;
  __syncthreads();
  best = shared.best;
  const Row of(s, row);
  if (isnan(best.logit)) return -2 - first_nan(of.logits, s.vocab_size, threads, shared);
  double logit = best.logit;
  const int32_t token = of.seen != nullptr ? of.likeliest(logit, shared) : best.token;
  const DeviceSampling& sampling = *s.sampling;
  if (sampling.temperature == 0 || isinf(logit)) return token;
  return Draw(of, sampling, logit, shared).token(uniform(sampling.seed, row, position));
}

// At the position of the new token, which is known before the token; by all of `threads`.
__device__ void rotate_row(const SampleStep& s, int row, int64_t position, int thread,
                           int threads) {
  for (int i = thread; i < s.pairs; i += threads) {
    s.rotations[row * s.pairs + i] = rotation(s.rope.turns[i], position);
  }
}

template <class T>
__device__ void start_row(const SampleStep& s, int row, int32_t token, int threads) {
  const int chunks = s.hidden_size / 8;
  const uint4* const from = static_cast<const uint4*>(s.embed) + int64_t{token} * chunks;
  float4* const to = reinterpret_cast<float4*>(s.x) + int64_t{row} * 2 * chunks;
  for (int i = threadIdx.x; i < chunks; i += threads) {
    const uint4 words = from[i];
    const float2 a = unpack<T>(words.x), b = unpack<T>(words.y);
    const float2 c = unpack<T>(words.z), d = unpack<T>(words.w);
    to[2 * i] = {a.x, a.y, b.x, b.y};
    to[2 * i + 1] = {c.x, c.y, d.x, d.y};
  }
}

// After the draw: what tokens mean to a sequence's state. kPending where none was drawn.
template <class T>
__device__ void finish(const SampleStep& s, int row, SequenceState state, int64_t draws,
                       int32_t token, int threads) {
  __syncthreads();  // every thread has read what now changes
  if (token >= 0) start_row<T>(s, row, token, threads);
  // The last warps have no part of a short row: they need not wait for it.
  if (threadIdx.x == threads - 1) {
    if (token != kPending) {
      int32_t* const slot = s.ring + draws % s.ring_rows * s.batch + row;
      asm volatile("st.release.sys.s32 [%0], %1;" ::"l"(slot), "r"(token) : "memory");
    }
    bool last = true;
    if (gridDim.x > 1) {
      __threadfence();  // this block has read *draws
      unsigned* const arrived = static_cast<unsigned*>(s.scratch);
      last = atomicAdd(arrived, 1u) == gridDim.x - 1;
      if (last) *arrived = 0;
    }
    if (last) *s.draws = draws + 1;
  }
  if (threadIdx.x == threads - 33) {
    SequenceState& now = s.state[row];
    if (token >= 0) {
      now.last = state.last + 1;
      s.tokens[row * s.token_stride + now.last] = token;
      if (s.sampling->repetition_penalty != 1) {
        s.seen[int64_t{row} * s.vocab_size + token] |= kSeen;
      }
      if (s.stops[token] != 0) now.live = 2;
    } else if (state.live != 0) {  // for the last time, or NaN
      now.live = 0;
    }
  }
}

// A call, and the last thing of the kernel: its registers are nothing to the greedy draw.
template <class T>
__device__ void draw_and_finish(const SampleStep& s, Candidate best, int threads) {
  __shared__ Shared shared;
  const int row = blockIdx.x;
  const SequenceState state = s.state[row];
  const int32_t token = draw(s, row, state.last + 1, best, threads, shared);
  finish<T>(s, row, state, *s.draws, token, threads);
}

template <class T>
__global__ void __launch_bounds__(kThreads) tlin_sample_step(const __grid_constant__ SampleStep s) {
  let_next_start();
  wait_for_previous();
  const int row = blockIdx.x;
  // All reads are under way together: one wait for memory. The compiler would move what it knows
  // to be the same in all threads to uniform registers, and wait for it there and then.
  const unsigned zero = threadIdx.y;
  const SequenceState state = s.state[row + zero];
  const DeviceSampling& sampling = s.sampling[zero];
  const double temperature = sampling.temperature, penalty = sampling.repetition_penalty;
  const int64_t draws = s.draws[zero];
  Candidate best{};
  if (threadIdx.x < kFew) {
    best = likeliest(s.candidates + int64_t{row} * s.candidate_count, s.candidate_count);
  }
  const bool live = state.live == 1, greedy = temperature == 0 && penalty == 1;
  const int threads = live && !greedy ? kThreads : kFew;
  if (threadIdx.x >= kFew) rotate_row(s, row, state.last + 1, threadIdx.x - kFew, kThreads - kFew);
  if (threadIdx.x >= threads) return;
  if (live && (!greedy || isnan(best.logit))) {
    draw_and_finish<T>(s, best, threads);
  } else {
    finish<T>(s, row, state, draws, live ? best.token : kPending, kFew);
  }
}

template <class T>
__global__ void __launch_bounds__(kFew) tlin_feed_step(const __grid_constant__ SampleStep s) {
  wait_for_previous();
  let_next_start();
  const int row = blockIdx.x;
  const SequenceState state = s.state[row];
  if (state.live == 0) return;
  const int64_t position = state.last + 1;
  start_row<T>(s, row, s.tokens[row * s.token_stride + position], kFew);
  rotate_row(s, row, position, threadIdx.x, kFew);
  __syncthreads();  // every thread has read the state
  if (threadIdx.x == 0) s.state[row].last = position;
}

}  // namespace

int64_t sample_scratch(int /*batch*/, int /*vocab_size*/) { return sizeof(unsigned); }

void sample_step(const SampleStep& s, const Launch& how) {
  with_type(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(how, tlin_sample_step<T>, "sample_step", static_cast<unsigned>(s.batch), kThreads, 0, s);
  });
}

void feed_step(const SampleStep& s, const Launch& how) {
  with_type(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(how, tlin_feed_step<T>, "feed_step", static_cast<unsigned>(s.batch), kFew, 0, s);
  });
}

}  // namespace tlinformer::cuda
