// A block of threads draws a token from logits, exactly as the CPU sampler does.
#pragma once

#include <cstdint>

#include "../numeric.cuh"
#include "sample.h"

namespace tlinformer::cuda::sampler {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kBins = kThreads;
constexpr int kListed = 4096;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kNoToken = 0x7fffffff;

// Weights are relative to the likeliest token's and summed in fixed point: exact sums in any order
// make a draw depend on the logits alone. Below half a unit, 2^kLeast, a token has no weight.
constexpr double kUnits = double(uint64_t{1} << 40);
constexpr double kLeast = -41.5;
constexpr int kPowers = 64;

struct Mass {  // of some tokens
  uint64_t weight;
  uint32_t count;
};

__device__ inline Mass operator+(Mass a, Mass b) {
  return {a.weight + b.weight, a.count + b.count};
}

struct Histogram {
  uint64_t weight[kBins];
  uint32_t count[kBins];

  // Two 32-bit additions: shared memory has no 64-bit one.
  __device__ void add(int bin, uint64_t w) {
    unsigned* const words = reinterpret_cast<unsigned*>(&weight[bin]);
    const unsigned low = static_cast<unsigned>(w), old = atomicAdd(&words[0], low);
    const unsigned high = static_cast<unsigned>(w >> 32) + (old + low < old ? 1 : 0);
    if (high != 0) atomicAdd(&words[1], high);
    atomicAdd(&count[bin], 1u);
  }
};

struct Shared {
  Histogram coarse, fine;
  double powers[kPowers];  // of 2: i / kPowers
  int32_t list[kListed];
  int listed;
  Mass sums[kWarps];
  double2 maxima[kWarps];
  Mass above;
  Candidate best;
  int bin, lowest, token;
};

__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline int warp() { return threadIdx.x / 32; }

__device__ inline Mass of_lane(Mass m, int lane) {
  return {__shfl_sync(kAllLanes, m.weight, lane), __shfl_sync(kAllLanes, m.count, lane)};
}

// Of the lanes in order, the sums up to and including each.
__device__ inline Mass warp_prefix(Mass m) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const Mass before{__shfl_up_sync(kAllLanes, m.weight, distance),
                      __shfl_up_sync(kAllLanes, m.count, distance)};
    if (lane() >= distance) m = m + before;
  }
  return m;
}

// Leaves the sums over the warps in order, up to and including each, in the lanes of every warp.
__device__ Mass prefix_of_warps(Mass of_this_warp, Shared& s) {
  __syncthreads();  // an earlier call's sums have been read
  if (lane() == 31) s.sums[warp()] = of_this_warp;
  __syncthreads();
  return warp_prefix(s.sums[lane()]);
}

// The same of the block's threads, and `total`.
__device__ Mass prefix(Mass m, Shared& s, Mass& total) {
  m = warp_prefix(m);
  const Mass warps = prefix_of_warps(m, s);
  total = of_lane(warps, 31);
  const Mass before = of_lane(warps, max(warp() - 1, 0));
  return warp() > 0 ? m + before : m;
}

__device__ inline double2 warp_maxima(double2 v) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    v.x = fmax(v.x, __shfl_xor_sync(kAllLanes, v.x, distance));
    v.y = fmax(v.y, __shfl_xor_sync(kAllLanes, v.y, distance));
  }
  return v;
}

// The largest x and the largest y of the block.
__device__ double2 maxima(double2 v, Shared& s) {
  v = warp_maxima(v);
  __syncthreads();  // an earlier call's maxima have been read
  if (lane() == 0) s.maxima[warp()] = v;
  __syncthreads();
  return warp_maxima(s.maxima[lane()]);
}

// The lowest id of the block.
__device__ int lowest(int id, Shared& s) {
  id = __reduce_min_sync(kAllLanes, id);
  __syncthreads();  // an earlier call's id has been read
  if (threadIdx.x == 0) s.lowest = kNoToken;
  __syncthreads();
  if (lane() == 0) atomicMin(&s.lowest, id);
  __syncthreads();
  return s.lowest;
}

struct Logit {
  float raw;
  unsigned flags;
};

// Few tokens need it: a call keeps the loops short. Nothing is fused here, as on the CPU.
__device__ __noinline__ double penalised(double x, double penalty) {
  return x > 0 ? __ddiv_rn(x, penalty) : __dmul_rn(x, penalty);
}

struct Row {
  const float* logits;
  const uint8_t* seen;  // null without a repetition penalty
  double penalty;
  int vocab_size;

  __device__ Row(const SampleStep& s, int row)
      : logits(s.logits + int64_t{row} * s.vocab_size),
        seen(nullptr),
        penalty(s.sampling->repetition_penalty),
        vocab_size(s.vocab_size) {
    if (penalty != 1) seen = s.seen + int64_t{row} * s.vocab_size;
    __builtin_assume(__isGlobal(logits));
    __builtin_assume(seen == nullptr || __isGlobal(seen));
  }
  __device__ Logit at(int id) const { return {logits[id], seen != nullptr ? seen[id] : 0u}; }
  __device__ double value(Logit l) const {
    const double x = l.raw;
    return l.flags & kSeen ? penalised(x, penalty) : x;
  }
  // Calls f(id, logit) for every `stride`th id; and at times with -inf for an id >= end.
  template <class F>
  __device__ void each(int begin, int end, int stride, const F& f) const {
    constexpr int kAhead = 4;  // loads under way
    for (int id = begin; id < end; id += kAhead * stride) {
      Logit l[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        l[i] = {-INFINITY, 0};
        if (id + i * stride < end) l[i].raw = logits[id + i * stride];
      }
      if (seen != nullptr) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (id + i * stride < end) l[i].flags = seen[id + i * stride];
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) f(id + i * stride, l[i]);
    }
  }
  template <class F>
  __device__ void each(const F& f) const {
    each(threadIdx.x, vocab_size, kThreads, f);
  }

  // By the logits after the penalty; the lower id among equals.
  __device__ int likeliest(double& best, Shared& s) const {
    double own = -INFINITY;
    int token = kNoToken;
    each([&](int id, Logit l) {
      const double x = value(l);
      if (x > own || token == kNoToken) {
        own = x;
        token = id;
      }
    });
    best = maxima({own, 0}, s).x;
    return lowest(own == best ? token : kNoToken, s);
  }
};

// A draw at a temperature. Where filters need the tokens from the likeliest down, that order also
// decides which of them a random number means, and the one wanted is found without sorting: a
// histogram over all tokens names a bin of it, further ones over that bin's tokens name ever
// narrower bins, until one holds equal logits only.
class Draw {
 public:
  __device__ Draw(const Row& row, const DeviceSampling& p, double best, Shared& s)
      : row_(row), p_(p), s_(s), best_(best) {
    constexpr double kLog2E = 1.4426950408889634;
    doublings_ = fmin(kLog2E * kPowers / p.temperature, 1e300);
    bins_ = static_cast<float>(kBins / -kLeast / kPowers * doublings_);
    if (threadIdx.x < kPowers) s.powers[threadIdx.x] = exp2(threadIdx.x / double(kPowers));
    __syncthreads();
  }

  __device__ int32_t token(double uniform) {
    const auto reached = [uniform](uint64_t total) { return share(uniform, total); };
    const bool top_k = p_.top_k > 0 && p_.top_k < row_.vocab_size;
    if (!top_k && !(p_.top_p < 1)) {
      const auto measure = [this](Logit l) {
        const double w = weight(row_.value(l));
        return w >= p_.min_p ? fixed(w) : 0;
      };
      return by_id(measure, reached);
    }
    uint64_t above_min_p;
    const Mass all = fill_coarse(above_min_p);
    uint64_t kept = all.weight;
#pragma unroll 1  // place() is long
    for (int step = top_k && p_.top_k < all.count ? kTopK : kTopP;; ++step) {
      if (step == kTopP && !(p_.top_p < 1)) continue;
      if (step == kDraw) kept = min(kept, above_min_p);  // both keep the likeliest
      const uint64_t target =
          step == kTopK ? p_.top_k : share(step == kTopP ? p_.top_p : uniform, kept);
      const Place at = place(target, step == kTopK);
      if (step == kDraw) return token_at(at);
      kept = at.through;
    }
  }

 private:
  enum Step { kTopK, kTopP, kDraw };
  struct Place {       // of a token in the order (logit descending, id ascending)
    double value;      // its logit
    uint64_t rank;     // counted from 1 among the tokens of equal logits
    uint64_t through;  // weight of the tokens up to and including it
  };

  // Of the tokens in some order: the least sum that is enough to reach `part` of the total.
  __device__ static uint64_t share(double part, uint64_t total) {
    const uint64_t wanted = __double2ull_ru(part * static_cast<double>(total));
    return min(max(wanted, uint64_t{1}), total);
  }

  // e^((value - best) / temperature) to 2^-44, in half the instructions of exp(): 2^(i / kPowers)
  // of the table, times a short series, times a power of two that is added to the exponent.
  __device__ double weight(double value) const {
    constexpr double kRounds = 1.5 * (uint64_t{1} << 52);  // added: whole, in the low bits
    constexpr double a = 0.6931471805599453 / kPowers, b = a * a / 2, c = b * a / 3, d = c * a / 4;
    const double x = __dmul_rn(value - best_, doublings_);  // never fused: the same everywhere
    const double rounded = x + kRounds, f = x - (rounded - kRounds);
    const int i = __double2loint(rounded);
    const double power = s_.powers[i & (kPowers - 1)];
    const double w = fma(power, f * fma(f, fma(f, fma(f, d, c), b), a), power);
    const int exponent = (i & ~(kPowers - 1)) * ((1 << 20) / kPowers);
    return x < kLeast * kPowers ? 0
                                : __hiloint2double(__double2hiint(w) + exponent, __double2loint(w));
  }
  __device__ static uint64_t fixed(double weight) {
    constexpr double kWhole = uint64_t{1} << 52;
    return __double_as_longlong(fma(weight, kUnits, kWhole)) - __double_as_longlong(kWhole);
  }

  // Bins need to be monotone in the logit, not exact.
  __device__ int coarse_bin(Logit l, double value) const {
    const float x = l.flags & kSeen ? static_cast<float>(value) : l.raw;
    return static_cast<int>(fminf((static_cast<float>(best_) - x) * bins_, kBins - 1.0f));
  }

  __device__ static void clear(Histogram& h) {
    h.weight[threadIdx.x] = 0;
    h.count[threadIdx.x] = 0;
    __syncthreads();
  }
  // Bins become the sums up to and including each.
  __device__ Mass accumulate(Histogram& h) {
    __syncthreads();
    Mass total;
    const Mass m = prefix({h.weight[threadIdx.x], h.count[threadIdx.x]}, s_, total);
    h.weight[threadIdx.x] = m.weight;
    h.count[threadIdx.x] = m.count;
    return total;
  }

  __device__ Mass fill_coarse(uint64_t& above_min_p) {
    clear(s_.coarse);
    const double min_p = p_.min_p;
    uint64_t own = 0;
    row_.each([&](int, Logit l) {
      const double x = row_.value(l), w = weight(x);
      const uint64_t units = fixed(w);
      if (units == 0) return;
      if (w >= min_p) own += units;
      s_.coarse.add(coarse_bin(l, x), units);
    });
    Mass total;
    prefix({own, 0}, s_, total);
    above_min_p = total.weight;
    return accumulate(s_.coarse);
  }

  // The bin in which the sum reaches `target`, and the sum before it.
  __device__ int find(const Histogram& h, uint64_t target, bool by_count, Mass& before) {
    __syncthreads();
    const int bin = threadIdx.x;
    const Mass below = bin > 0 ? Mass{h.weight[bin - 1], h.count[bin - 1]} : Mass{0, 0};
    const uint64_t from = by_count ? below.count : below.weight;
    const uint64_t to = by_count ? h.count[bin] : h.weight[bin];
    if (from < target && target <= to) {
      s_.bin = bin;
      s_.above = below;
    }
    __syncthreads();
    before = s_.above;
    return s_.bin;
  }

  // Lists the tokens of all coarse bins up to `bin`, or of that one alone, if they fit: what is
  // wanted next is most often among them.
  __device__ void gather(int bin) {
    if (first_ <= bin && bin <= last_) return;
    const uint32_t through = s_.coarse.count[bin];
    const uint32_t own = bin > 0 ? through - s_.coarse.count[bin - 1] : through;
    first_ = through <= kListed ? 0 : bin;
    last_ = bin;
    fits_ = through <= kListed || own <= kListed;
    if (!fits_) return;
    if (threadIdx.x == 0) s_.listed = 0;
    __syncthreads();
    row_.each([&](int id, Logit l) {
      const double x = row_.value(l);
      const int bin = coarse_bin(l, x);
      if (first_ <= bin && bin <= last_ && fixed(weight(x)) > 0) {
        s_.list[atomicAdd(&s_.listed, 1)] = id;
      }
    });
    __syncthreads();
  }

  // Calls f(id, logit) for the gathered tokens, and at times for others.
  template <class F>
  __device__ void each_gathered(const F& f) const {
    if (fits_) {
#pragma unroll 1
      for (int i = threadIdx.x; i < s_.listed; i += kThreads) f(s_.list[i], row_.at(s_.list[i]));
    } else {
      row_.each(f);
    }
  }

  // The highest logit, and minus the lowest, of the gathered tokens for which `belongs`.
  template <class Belongs>
  __device__ double2 range_of(const Belongs& belongs) {
    double2 own{-INFINITY, -INFINITY};
    each_gathered([&](int, Logit l) {
      const double x = row_.value(l);
      if (belongs(l, x)) own = {fmax(own.x, x), fmax(own.y, -x)};
    });
    return maxima(own, s_);
  }

  // Where the sum of weights (or the count) from the likeliest token down reaches `target`.
  __device__ Place place(uint64_t target, bool by_count) {
    Mass above;
    const int coarse = find(s_.coarse, target, by_count, above);
    gather(coarse);
    double2 range = range_of(
        [&](Logit l, double x) { return coarse_bin(l, x) == coarse && fixed(weight(x)) > 0; });
    while (range.x > -range.y) {
      const double high = range.x, low = -range.y, scale = (kBins - 1) / (high - low);
      const auto bin_of = [=](double x) {  // sets high and low apart, whatever they are
        return x < high ? static_cast<int>(fmin((high - x) * scale, kBins - 1.0)) : 0;
      };
      clear(s_.fine);
      each_gathered([&](int, Logit l) {
        const double x = row_.value(l);
        if (low <= x && x <= high) s_.fine.add(bin_of(x), fixed(weight(x)));
      });
      accumulate(s_.fine);
      Mass before;
      const int bin =
          find(s_.fine, target - (by_count ? above.count : above.weight), by_count, before);
      above = above + before;
      range = range_of([&](Logit, double x) { return low <= x && x <= high && bin_of(x) == bin; });
    }
    const uint64_t each = fixed(weight(range.x));
    const uint64_t rank =
        by_count ? target - above.count : (target - above.weight + each - 1) / each;
    return {range.x, rank, above.weight + rank * each};
  }

  __device__ int32_t token_at(Place at) {
    if (at.rank > 1) {
      const auto equal = [&](Logit l) { return uint64_t{row_.value(l) == at.value}; };
      return by_id(equal, [&](uint64_t) { return at.rank; });
    }
    int own = kNoToken;
    each_gathered([&](int id, Logit l) {
      if (row_.value(l) == at.value) own = min(own, id);
    });
    return lowest(own, s_);
  }

  // The token, in the order of ids, with which the sum of `measure` reaches target(its total).
  template <class Measure, class Target>
  __device__ int32_t by_id(const Measure& measure, const Target& target_of) {
    const int part = (row_.vocab_size + kWarps - 1) / kWarps;  // of a warp
    uint64_t own = 0;
    row_.each(warp() * part + lane(), min((warp() + 1) * part, row_.vocab_size), 32,
              [&](int, Logit l) { own += measure(l); });
    const Mass warps = prefix_of_warps(warp_prefix({own, 0}), s_);
    uint64_t target = target_of(of_lane(warps, 31).weight);
    const int chosen = __ffs(__ballot_sync(kAllLanes, warps.weight >= target)) - 1;
    const Mass before = of_lane(warps, max(chosen - 1, 0));
    if (chosen > 0) target -= before.weight;
    const int end = min((chosen + 1) * part, row_.vocab_size);
    for (int begin = chosen * part; begin < end; begin += kThreads) {
      const int id = begin + threadIdx.x;
      const uint64_t w = id < end ? measure(row_.at(id)) : 0;
      Mass total;
      const uint64_t through = prefix({w, 0}, s_, total).weight;
      if (through - w < target && target <= through) s_.token = id;
      if (target <= total.weight) break;
      target -= total.weight;
    }
    __syncthreads();
    return s_.token;
  }

  const Row& row_;
  const DeviceSampling& p_;
  Shared& s_;
  const double best_;
  double doublings_;  // of the weight for a unit of logit, times kPowers
  float bins_;        // the same in coarse bins

  int first_ = 0, last_ = -1;  // coarse bins that are gathered
  bool fits_ = false;
};

// Philox 4x32-10, exactly as the CPU sampler draws.
__device__ double uniform(uint64_t seed, int64_t sequence, int64_t position) {
  uint32_t c[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32),
                   static_cast<uint32_t>(sequence), static_cast<uint32_t>(sequence >> 32)};
  uint32_t k[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0];
    const uint64_t b = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t c1 = c[1], c3 = c[3];
    c[0] = static_cast<uint32_t>(b >> 32) ^ c1 ^ k[0];
    c[1] = static_cast<uint32_t>(b);
    c[2] = static_cast<uint32_t>(a >> 32) ^ c3 ^ k[1];
    c[3] = static_cast<uint32_t>(a);
    k[0] += 0x9E3779B9;
    k[1] += 0xBB67AE85;
  }
  return (c[0] + 0.5) / 4294967296.0;
}

}  // namespace tlinformer::cuda::sampler
