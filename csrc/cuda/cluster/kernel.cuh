// The cluster's kernel. In each block 16 warps compute and one thread more keeps their ring filled.
// Between products the blocks send their outputs to all blocks, each to its place.
#pragma once

#include "../attention/row_score.cuh"
#include "ring.cuh"

namespace tlinformer::cuda::cluster {

#if __CUDA_ARCH__ >= 900

template <class T, int d>
struct Worker {
  const ClusterParameters& p;
  const int block;
  char* const shared;
  const uint32_t local;   // address of `shared`
  const uint32_t remote;  // that of block `warp`
  const int thread, warp, lane;
  Ring ring;
  uint32_t phases = 0;  // of the exchanges, a bit each

  __device__ const Share& share() const { return *at<const Share>(p.layout.share); }

  template <class V>
  __device__ V* at(int offset) const {
    return reinterpret_cast<V*>(shared + offset);
  }

  // What follows product `i` comes from all blocks.
  __device__ void expect(int i) const {
    const int bytes = i == kQkv ? p.width * 2 : i == kGateUp ? p.hidden * 2 : p.width * 4;
    barrier_expect(local + kExchanges + 8 * i, bytes);
  }

  // Until the outputs of all blocks are here. Shared memory has no stale copies, so that a wait at
  // the block's scope serves.
  __device__ void receive(int i) {
    barrier_wait(local + kExchanges + 8 * i, (phases >> i) & 1);
    phases ^= 1u << i;
    if (thread == 0) expect(i);
  }

  // This block's part of an array, `bytes` (a multiple of 8) at an offset, to all blocks: each warp
  // sends it to one of them. That a block's own part is overwritten by itself does no harm.
  __device__ void broadcast(int offset, int bytes, int i) const {
    sync_workers();
#pragma unroll 1
    for (int j = 8 * lane; j < bytes; j += 8 * 32) {
      send(remote + offset + j, remote + kExchanges + 8 * i, *at<const uint2>(offset + j));
    }
  }

  __device__ void fetch_vectors(int visit) const {
    const Share& share = p.shares[block];  // the copy is not there at first
    const uint32_t barrier = local + kVectors + 8 * (visit & 1);
    barrier_expect(barrier, share.vector_bytes);
    copy_bulk(local + p.layout.vectors[visit & 1],
              p.packed + share.stream + int64_t{share.layer_bytes} * (p.first_layer + visit),
              share.vector_bytes, barrier);
  }

  // normed <- norm(x) * weight + bias; each warp finds mean and variance itself, of differences
  // from the first value.
  __device__ void normalize(int x_offset, const T* weight, const T* bias) const {
    const float4* x = at<const float4>(x_offset);
    const int quads = p.width / 4;
    const float per_width = 1.0f / static_cast<float>(p.width), first = x->x;
    float sum = 0, squares = 0;
#pragma unroll 1
    for (int begin = lane; begin < quads; begin += 128) {
      float4 v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[i] = begin + 32 * i < quads ? x[begin + 32 * i] : float4{first, first, first, first};
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float a = v[i].x - first, b = v[i].y - first, c = v[i].z - first, e = v[i].w - first;
        sum += (a + b) + (c + e);
        squares += (a * a + b * b) + (c * c + e * e);
      }
    }
#pragma unroll
    for (int other = 16; other > 0; other /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, other);
      squares += __shfl_xor_sync(0xffffffffu, squares, other);
    }
    const float shift = sum * per_width, mean = first + shift;
    const float scale = rsqrtf(fmaxf(squares * per_width - shift * shift, 0.0f) + p.epsilon);
#pragma unroll 1
    for (int i = thread; i < quads; i += kThreads) {
      const float4 v = x[i];
      const uint2 weights = reinterpret_cast<const uint2*>(weight)[i];
      const uint2 biases = reinterpret_cast<const uint2*>(bias)[i];
      const float2 w = unpack<T>(weights.x), u = unpack<T>(weights.y);
      const float2 b = unpack<T>(biases.x), c = unpack<T>(biases.y);
      at<uint2>(p.layout.normed)[i] = {
          pack<T>((v.x - mean) * scale * w.x + b.x, (v.y - mean) * scale * w.y + b.y),
          pack<T>((v.z - mean) * scale * u.x + c.x, (v.w - mean) * scale * u.y + c.y)};
    }
  }

  // Each warp's sums, over its slice, go to `partial`: (rows of tiles, slices, 16).
  template <int kRows>
  __device__ void multiply(const Product& product, int input_offset) {
    constexpr int kDeep = kStageSteps / kRows;
    constexpr int kChains = kRows == 1 ? 2 : kRows;
    const int all = product.k, stage_k = product.stage_k, warps = product.warps();
    const int group = warp * product.slice_part / 256, slice = warp - group * product.slices;
    // All columns of B are the same.
    const uint2* input = at<const uint2>(input_offset) + slice * all * 4 + lane % 4;
    float c[kChains][4] = {};
#pragma unroll 1
    for (int k = 0; k < all; k += stage_k, input += 4 * stage_k) {
      const int here = min(stage_k, all - k);
      uint2 b[kDeep];
      uint4 a[kDeep][kRows];
#pragma unroll
      for (int i = 0; i < kDeep; ++i) b[i] = input[4 * i];  // beyond the end: unused, as below
      barrier_wait(ring.full(), ring.parity);
      const uint4* tiles = at<const uint4>(ring.stage() - local) + warp * 32 + lane;
#pragma unroll
      for (int i = 0; i < kDeep; ++i) {
#pragma unroll
        for (int r = 0; r < kRows; ++r, tiles += warps * 32) a[i][r] = *tiles;
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(ring.empty());
      ring.advance();
#pragma unroll
      for (int i = 0; i < kDeep; ++i) {
        if (i < here) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            mma<T>(c[kRows == 1 ? i % 2 : r], {a[i][r].x, a[i][r].y, a[i][r].z, a[i][r].w}, b[i].x,
                   b[i].y);
          }
        }
      }
    }
    if (warp >= warps || lane % 4 >= 2) return;
    float* to = at<float>(p.layout.partial) + lane / 4 + lane % 4 * 8;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float sum = lane % 4 == 0 ? c[r][0] : c[r][2];
      if (kRows == 1) sum += lane % 4 == 0 ? c[1][0] : c[1][2];
      to[((group + r * product.groups) * product.slices + slice) * 16] = sum;
    }
  }

  // Four neighbouring outputs, the first at a multiple of four of its row of tiles.
  __device__ float4 total(const Product& product, int row, int place) const {
    constexpr int kAtOnce = 8;
    const int slices = product.slices;
    const float4* from = at<const float4>(p.layout.partial) + row * slices * 4 + place / 4;
    float4 sum{};
#pragma unroll 1
    for (int slice = 0; slice < slices; slice += kAtOnce) {
      float4 part[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        part[i] = slice + i < slices ? from[(slice + i) * 4] : float4{};
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        sum.x += part[i].x;
        sum.y += part[i].y;
        sum.z += part[i].z;
        sum.w += part[i].w;
      }
    }
    return sum;
  }

  // Queries, keys, values of the block's heads; keys and values into the cache, too.
  __device__ void rotate(const Product& product, const T* bias, const Place& place, int64_t slot,
                         bool last) const {
    const int group = p.query_heads / p.kv_heads;
    const int head_rows = (group + 2) * d;
    int head = block, own = 0;
#pragma unroll 1
    for (int begin = 0; begin < product.rows; begin += head_rows, head += kBlocks, ++own) {
#pragma unroll 1
      for (int i = 4 * thread; i < head_rows; i += 4 * kThreads) {
        const int row = begin + i;
        const float4 sum = total(product, row / 16, row % 16);
        const uint2 words = *reinterpret_cast<const uint2*>(bias + row);
        const float2 low = unpack<T>(words.x), high = unpack<T>(words.y);
        float2 a{sum.x + low.x, sum.y + low.y}, b{sum.z + high.x, sum.w + high.y};
        const int part = i / d, column = i % d;
        if (part <= group) {
          const float2* turns = at<const float2>(p.layout.rotations) + column / 2;
          a = tlinformer::cuda::rotate(a, turns[0]);
          b = tlinformer::cuda::rotate(b, turns[1]);
        }
        if (part < group) {
          float* to =
              last ? p.query + head * group * d : at<float>(p.layout.query) + own * group * d;
          *reinterpret_cast<float4*>(to + i) = {a.x * p.scale, a.y * p.scale, b.x * p.scale,
                                                b.y * p.scale};
          continue;
        }
        const uint2 packed{pack<T>(a.x, a.y), pack<T>(b.x, b.y)};
        void* cache = part == group ? place.window_keys : place.window_values;
        const int64_t offset = head * place.window_head_stride + slot * d + column;
        *reinterpret_cast<uint2*>(static_cast<T*>(cache) + offset) = packed;
        *reinterpret_cast<uint2*>(at<T>(p.layout.fresh) + own * 2 * d + i - group * d) = packed;
      }
    }
  }

  // Up to 32 rows of keys and values against one query: record <- weighted sum of the values,
  // greatest score, sum of the weights relative to it.
  __device__ void attend(const T* keys, const T* values, int rows, const float* query,
                         float* record) const {
    constexpr int kQuads = d / 4;
    const float score = lane < rows ? row_score<T, d>(keys, query, lane) : -INFINITY;
    const float most = greatest(score);
    const float weight = exp2_fast(score - most);

    constexpr int kAtOnce = 32 / kQuads;  // rows
    constexpr int kPasses = (kUnitRows + kAtOnce - 1) / kAtOnce;
    const int offset = lane / kQuads;
    const int left = rows - offset;
    const uint2* value = reinterpret_cast<const uint2*>(values) + lane;
    float sum = 0;
    float4 mixed{};
#pragma unroll(kPasses <= 12 ? kPasses : 8)
    for (int pass = 0; pass < kPasses; ++pass) {
      const float w = __shfl_sync(0xffffffffu, weight, (pass * kAtOnce + offset) % 32);
      if (offset < kAtOnce && pass * kAtOnce < left) {
        const uint2 words = value[pass * kAtOnce * kQuads];
        const float2 low = unpack<T>(words.x), high = unpack<T>(words.y);
        sum += w;
        mixed.x += w * low.x;
        mixed.y += w * low.y;
        mixed.z += w * high.x;
        mixed.w += w * high.y;
      }
    }
    float4 all = mixed;
    float all_weights = sum;
#pragma unroll
    for (int i = 1; i < kAtOnce; ++i) {
      all.x += __shfl_down_sync(0xffffffffu, mixed.x, i * kQuads);
      all.y += __shfl_down_sync(0xffffffffu, mixed.y, i * kQuads);
      all.z += __shfl_down_sync(0xffffffffu, mixed.z, i * kQuads);
      all.w += __shfl_down_sync(0xffffffffu, mixed.w, i * kQuads);
      all_weights += __shfl_down_sync(0xffffffffu, sum, i * kQuads);
    }
    if (lane < kQuads) reinterpret_cast<float4*>(record)[lane] = all;
    if (lane == 0) *reinterpret_cast<float2*>(record + d) = {most, all_weights};
  }

  // The warp merges one query's records, `stride` apart: the softmax over those of the context plus
  // the softmax over those of the window.
  __device__ void merge(const float* records, int stride, int context_units, int units,
                        T* to) const {
    float most[2] = {-INFINITY, -INFINITY}, sums[2] = {};
#pragma unroll 1
    for (int i = lane; i < units; i += 32) {
      const float here = records[i * stride + d];
      if (i < context_units) most[0] = fmaxf(most[0], here);
      if (i >= context_units) most[1] = fmaxf(most[1], here);
    }
    most[0] = greatest(most[0]);
    most[1] = greatest(most[1]);
#pragma unroll 1
    for (int i = lane; i < units; i += 32) {
      const float2 here = *reinterpret_cast<const float2*>(records + i * stride + d);
      const float sum = here.y * exp2_fast(here.x - (i < context_units ? most[0] : most[1]));
      sums[0] += i < context_units ? sum : 0.0f;
      sums[1] += i < context_units ? 0.0f : sum;
    }
#pragma unroll
    for (int other = 16; other > 0; other /= 2) {
      sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], other);
      sums[1] += __shfl_xor_sync(0xffffffffu, sums[1], other);
    }
    float4 mixed{};
    const float4* values = reinterpret_cast<const float4*>(records) + min(lane, d / 4 - 1);
#pragma unroll 1
    for (int begin = 0; begin < units; begin += 32) {
      const int unit = begin + lane;
      const bool old = unit < context_units;
      float weight = 0;
      if (unit < units) {
        weight = exp2_fast(records[unit * stride + d] - (old ? most[0] : most[1])) /
                 (old ? sums[0] : sums[1]);
      }
      const int here = min(32, units - begin);
#pragma unroll 8
      for (int i = 0; i < here; ++i, values += stride / 4) {
        const float w = __shfl_sync(0xffffffffu, weight, i);
        const float4 v = *values;
        mixed.x += w * v.x;
        mixed.y += w * v.y;
        mixed.z += w * v.z;
        mixed.w += w * v.w;
      }
    }
    if (lane < d / 4) {
      reinterpret_cast<uint2*>(to)[lane] = {pack<T>(mixed.x, mixed.y), pack<T>(mixed.z, mixed.w)};
    }
  }

  // The block's heads attend; everybody gets their outputs.
  __device__ void attend_heads(const CachedCounts& counts) {
    const int group = p.query_heads / p.kv_heads, heads = owned_heads(p, block);
    const int context_units = (counts.context + kUnitRows - 1) / kUnitRows;
    const int units = context_units + (counts.window + kUnitRows - 1) / kUnitRows;
    constexpr int kRecord = d + 4;
    float* records = at<float>(p.layout.records);
#pragma unroll 1
    for (int own = 0; own < heads; ++own) {
      const float* queries = at<const float>(p.layout.query) + own * group * d;
      const T* fresh_rows = at<const T>(p.layout.fresh) + own * 2 * d;
#pragma unroll 1
      for (int kind = 0; kind < 2; ++kind) {
        const int rows = kind == 0 ? counts.context : counts.window;
        const int fresh = kind == 0 ? -1 : rows - 1;
        const int first_unit = kind == 0 ? 0 : context_units;
#pragma unroll 1
        for (int row = 0; row < rows; row += kChunkRows<d>) {
          static_assert(kChunkRows<d> <= kUnitRows * kBlocks, "a unit or none for each warp");
          const int chunk_unit = first_unit + row / kUnitRows;
          const int begin = ((warp - chunk_unit) & (kBlocks - 1)) * kUnitRows;  // in the chunk
          const int here = min(kChunkRows<d>, rows - row);
          T* const keys = at<T>(ring.stage() - local) + begin * d;
          T* const values = keys + kChunkRows<d> * d;
          barrier_wait(ring.full(), ring.parity);
          if (begin < here) {
            const int at_fresh = fresh - row - begin;  // this warp's row that is not in the cache
            if (at_fresh >= 0 && at_fresh < kUnitRows) {
              if (lane < d / 4) {
                const uint2* from = reinterpret_cast<const uint2*>(fresh_rows) + lane;
                reinterpret_cast<uint2*>(keys + at_fresh * d)[lane] = from[0];
                reinterpret_cast<uint2*>(values + at_fresh * d)[lane] = from[d / 4];
              }
              // A later copy overwrites them.
              asm volatile("fence.proxy.async;" ::: "memory");
              __syncwarp();
            }
            float* record = records + (chunk_unit + begin / kUnitRows) * group * kRecord;
#pragma unroll 1
            for (int i = 0; i < group; ++i) {
              attend(keys, values, min(kUnitRows, here - begin), queries + i * d,
                     record + i * kRecord);
            }
          }
          __syncwarp();
          if (lane == 0) barrier_arrive(ring.empty());
          ring.advance();
        }
      }
      sync_workers();
      const int first = (block + own * kBlocks) * group * d;
#pragma unroll 1
      for (int i = warp; i < group; i += kBlocks) {
        merge(records + i * kRecord, group * kRecord, context_units, units,
              at<T>(p.layout.attended) + first + i * d);
      }
      broadcast(p.layout.attended + first * 2, group * d * 2, kQkv);
    }
  }

  // to <- from + outputs (+ bias); in global memory, too.
  __device__ void add(const Product& product, const T* bias, int from, int to,
                      float* global) const {
#pragma unroll 1
    for (int i = 4 * thread; i < product.rows; i += 4 * kThreads) {
      const int column = product.first + i;
      float4 sum = total(product, i / 16, i % 16);
      const float4 x = *at<const float4>(from + column * 4);
      sum = {x.x + sum.x, x.y + sum.y, x.z + sum.z, x.w + sum.w};
      if (bias != nullptr) {
        const uint2 words = *reinterpret_cast<const uint2*>(bias + i);
        const float2 low = unpack<T>(words.x), high = unpack<T>(words.y);
        sum = {sum.x + low.x, sum.y + low.y, sum.z + high.x, sum.w + high.y};
      }
      *at<float4>(to + column * 4) = sum;
      if (global != nullptr) *reinterpret_cast<float4*>(global + column) = sum;
    }
  }

  __device__ void gate(const Product& product) const {
    const auto gated = [](float x, float up) { return __fdividef(x, 1.0f + __expf(-x)) * up; };
#pragma unroll 1
    for (int i = 4 * thread; i < product.rows; i += 4 * kThreads) {
      const float4 g = total(product, i / 8, i % 8), u = total(product, i / 8, 8 + i % 8);
      *at<uint2>(p.layout.hidden + (product.first + i) * 2) = {
          pack<T>(gated(g.x, u.x), gated(g.y, u.y)), pack<T>(gated(g.z, u.z), gated(g.w, u.w))};
    }
  }

  __device__ void run() {
    const Layout& at_ = p.layout;
    const double turns = thread < d / 2 ? p.turns[thread] : 0;
    wait_for_previous();
    const SequenceState now = *p.state;
#pragma unroll 1
    for (int i = thread; i < p.width / 4; i += kThreads) {
      at<float4>(at_.x)[i] = reinterpret_cast<const float4*>(p.x)[i];
    }
    if (p.resumes) {
#pragma unroll 1
      for (int i = thread; i < p.width / 8; i += kThreads) {
        at<uint4>(at_.attended)[i] = reinterpret_cast<const uint4*>(p.attended)[i];
      }
    }
    if (now.live == 0) return;
    if (thread < d / 2) at<float2>(at_.rotations)[thread] = rotation(turns, now.last);
    if (thread == 0) *at<SequenceState>(at_.state) = now;
    sync_workers();
    const SequenceState& state = *at<const SequenceState>(at_.state);
    const CachedCounts counts = counts_of(state);

#pragma unroll 1
    for (int visit = 0; visit < p.visits; ++visit) {
      const bool finishes = p.resumes && visit < p.depth;
      const int begin = visit > 0 || !p.resumes ? kQkv : kOut;
      const T* vectors = at<const T>(at_.vectors[visit & 1]);
      barrier_wait(local + kVectors + 8 * (visit & 1), (visit >> 1) & 1);
      // One loop over the products keeps the code small: it has to stay in the instruction cache.
#pragma unroll 1
      for (int i = begin; i < kMatrices; ++i) {
        const Product product = share().matrices[i];
        int input = i == kOut ? at_.attended : at_.hidden;
        if (i == kQkv || i == kGateUp) {
          const T* norm = vectors + i * p.width;
          input = at_.normed;
          normalize(i == kQkv ? at_.x : at_.middle, norm, norm + p.width);
          sync_workers();
        }
        if (product.per_warp == 1) {
          multiply<1>(product, input);
        } else if (product.per_warp == 2) {
          multiply<2>(product, input);
        } else if (product.per_warp == 3) {
          multiply<3>(product, input);
        } else if (product.per_warp == 6) {
          multiply<6>(product, input);
        }
        sync_workers();
        // All are done with the visit before.
        if (i == begin && thread == 0 && visit + 1 < p.visits) fetch_vectors(visit + 1);
        if (i == kQkv) {
          const bool follows = !finishes && p.follows_history;
          rotate(product, vectors + 4 * p.width, at<const Place>(at_.places)[visit],
                 state.last - (follows ? 0 : state.history), !finishes);
          if (!finishes) return;
          sync_workers();
          attend_heads(counts);
        } else if (i == kGateUp) {
          gate(product);
          broadcast(at_.hidden + product.first * 2, product.rows * 2, i);
        } else {
          const bool ends = i == kDown && visit + 1 == p.depth;
          const T* bias = vectors + 4 * p.width + share().matrices[kQkv].rows;
          const int to = i == kOut ? at_.middle : at_.x;
          add(product, i == kOut ? bias : nullptr, i == kOut ? at_.x : at_.middle, to,
              ends ? p.x : nullptr);
          if (i == kDown && visit + 1 == p.visits) return;
          broadcast(to + product.first * 4, product.rows * 4, i);
        }
        receive(i);
      }
    }
  }
};

#endif

template <class T, int d>
__global__ void __launch_bounds__(kThreads + 32, 1)
    tlin_cluster_step(const __grid_constant__ ClusterParameters p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char shared[];
  const uint32_t local = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const Ring ring{local, local + p.layout.ring, p.layout.stages};
  Worker<T, d> worker{
      p,      block,       shared,      local, address_in_block(local, thread / 32 % kBlocks),
      thread, thread / 32, thread % 32, ring};
  let_next_start();
  if (thread == kThreads) {
#pragma unroll 1
    for (int i = 0; i < p.layout.stages; ++i) {
      barrier_init(local + kFull + 8 * i, 1);
      barrier_init(local + kEmpty + 8 * i, kBlocks);
    }
#pragma unroll 1
    for (int i = 0; i < 2; ++i) barrier_init(local + kVectors + 8 * i, 1);
#pragma unroll 1
    for (int i = 0; i < kMatrices; ++i) barrier_init(local + kExchanges + 8 * i, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
#pragma unroll 1
    for (int i = 0; i < kMatrices; ++i) worker.expect(i);
    worker.fetch_vectors(0);
  }
  // Inputs of products are zero where others never write: beyond the width.
#pragma unroll 1
  for (int i = p.layout.normed / 4 + thread; i < p.layout.share / 4; i += kThreads + 32) {
    reinterpret_cast<uint32_t*>(shared)[i] = 0;
  }
  // Copies, as reading parameters at places found at run time is slow.
  if (thread == 0) *worker.template at<Share>(p.layout.share) = p.shares[block];
  if (thread < p.visits) worker.template at<Place>(p.layout.places)[thread] = p.places[thread];
  // A block's shared memory may be written from outside once all threads have arrived.
  arrive_at_cluster();
  if (thread == kThreads) produce<T, d>(p, block, ring);
  wait_for_cluster();
  if (thread < kThreads) {
    worker.run();
  } else if (thread > kThreads) {
    wait_for_previous();
  }
#endif
}

}  // namespace tlinformer::cuda::cluster
