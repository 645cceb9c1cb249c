// The decode attention of a single sequence's layers that read few rows, where no query heads share
// keys and values (else batch_attention.cuh has it): the blocks of a head's cluster have its rows
// in shared memory before the query exists, eight or few times eight in each warp, and one of them
// merges the softmaxes of all warps.
#pragma once

#include "../dsmem.cuh"
#include "../warp_state.cuh"
#include "decode_attention.h"
#include "row_copy.cuh"
#include "window_parts.cuh"

namespace tlinformer::cuda {

constexpr int kWindowWarps = 8;
constexpr int window_blocks_each(int d) { return d <= 96 ? 2 : 1; }  // on a multiprocessor

template <class T, int d>
__global__ void __launch_bounds__(32 * kWindowWarps, window_blocks_each(d))
    tlin_window_attention(const __grid_constant__ DecodeAttention a, int shift_blocks,
                          int tiles_each) {
  constexpr int kWarps = kWindowWarps;
  using Places = WindowPlaces<d, kWarps, kEight>;
  using Rows = EightRows<T, d>;
  constexpr int kRecord = Places::kRecord;
  let_next_start();
  extern __shared__ __align__(128) char memory[];
  __shared__ uint64_t arrived[kWarps], all_records;
  __shared__ SequenceState known, current;
  __shared__ __align__(8) float parts[kWarps][d];  // of an output
  const int blocks = 1 << shift_blocks,
            shift_warps = shift_blocks + 3;  // a power of two, all of them
  const int head = blockIdx.x >> shift_blocks, block = blockIdx.x & (blocks - 1);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int most = static_cast<int>(a.most_rows);
  const Places places(kWarps * tiles_each, 1, blocks);
  float* const records = reinterpret_cast<float*>(memory + places.records);
  const uint32_t record_barrier = shared_address(&all_records);
  if (lane == 0) prepare_copies(&arrived[warp]);
  if (threadIdx.x == 0 && blocks > 1) dsmem::barrier_init(record_barrier, 1);
  __syncwarp();
  if (blocks > 1) dsmem::arrive_at_blocks();

  // Before the token's own row exists: all others are where they will be. Only `last` may be one
  // behind; then the window's last row but one comes later, too.
  const auto fetch_state = [&](SequenceState* to) {
    constexpr int kWords = sizeof(SequenceState) / sizeof(int);
    const int* const from = reinterpret_cast<const int*>(a.state) + threadIdx.x;
    if (threadIdx.x < kWords) reinterpret_cast<int*>(to)[threadIdx.x] = load_now(from, true);
  };
  fetch_state(&known);
  __syncthreads();
  const int history = static_cast<int>(known.history);
  const int compressed = a.context_rows == ContextRows::history ? history : known.compressed;
  const int context = a.context_rows == ContextRows::none ? 0 : min(max(compressed, 0), most);
  const int cached =
      static_cast<int>(min(max(known.last - history, int64_t{0}), int64_t{most - context}));
  // Units of eight rows, first those of the context, then the window's, are dealt to all warps.
  const int warps = blocks * kWarps, place = block + warp * blocks;
  const int context_units = (context + kEight - 1) / kEight;
  const int first_row = a.window_follows_history ? history : 0;
  const int window_shift = first_row % Places::kAligned;
  constexpr int kValues = Places::kTileBytes / static_cast<int>(sizeof(T));  // behind the keys
  char* const tiles = memory + warp * tiles_each * 2 * Places::kTileBytes;
  struct Unit {
    bool of_context;
    int first;  // of its rows
    int shift;  // rows between the beginning of the copy and the first
    const T *cached_keys, *cached_values;
    char* tile;
    T *keys, *values;
  };
  const auto unit_of = [&](int turn) {
    const int number = place + turn * warps;
    Unit u;
    u.of_context = number < context_units;
    u.first = (number - (u.of_context ? 0 : context_units)) * kEight;
    u.shift = u.of_context ? 0 : window_shift;
    const CachedRows& cache = u.of_context ? a.context : a.window;
    const int64_t offset =
        head * cache.head_stride + int64_t{u.first + (u.of_context ? 0 : first_row)} * d;
    u.cached_keys = static_cast<const T*>(cache.keys) + offset;
    u.cached_values = static_cast<const T*>(cache.values) + offset;
    u.tile = tiles + turn * 2 * Places::kTileBytes;
    u.keys = reinterpret_cast<T*>(u.tile) + u.shift * d;
    u.values = u.keys + kValues;
    return u;
  };
  const auto bytes_of = [&](const Unit& u, int window_rows) {
    const int rows = min(kEight, (u.of_context ? context : window_rows) - u.first);
    return rows <= 0 ? 0u : static_cast<uint32_t>(((u.shift + rows) * d * 2 + 15) / 16 * 16);
  };
  const auto copy = [&](const Unit& u, uint32_t part, uint64_t* barrier) {
    copy_rows(u.tile, u.cached_keys - u.shift * d, part, barrier, lane);
    copy_rows(u.tile + Places::kTileBytes, u.cached_values - u.shift * d, part, barrier, lane);
  };
  uint32_t bytes = 0;
#pragma unroll 1
  for (int turn = 0; turn < tiles_each; ++turn) bytes += 2 * bytes_of(unit_of(turn), cached);
  if (bytes > 0) expect_copies(bytes, &arrived[warp], lane);
#pragma unroll 1
  for (int turn = 0; turn < tiles_each; ++turn) {
    const Unit u = unit_of(turn);
    const uint32_t part = bytes_of(u, cached);
    if (part > 0) copy(u, part, &arrived[warp]);
  }
  commit_copies();
  // The rows that no copy has brought: one more than there may be, as `own` is not known yet.
  NewRow<T, d> newer[2];
  const auto turn_of_newer = [&](int i) {  // none: -1
    const int row = cached + i, number = context_units + row / kEight;
    const bool exists =
        row < most - context && int64_t{first_row + row + 1} * d <= a.window.head_stride;
    const int turn = number >> shift_warps;
    return exists && (number & (warps - 1)) == place && turn < tiles_each ? turn : -1;
  };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int turn = turn_of_newer(i);
    if (turn < 0) continue;
    const Unit u = unit_of(turn);
    const int at = (cached + i) % kEight * d;
    newer[i].aim(u.cached_keys + at, u.cached_values + at, u.keys + at, u.values + at);
  }
  // The other blocks have started: their barriers are there.
  if (blocks > 1) dsmem::wait_for_blocks();

  wait_for_previous();
  const auto query = Rows::load(a.query + head * d);
#pragma unroll
  for (auto& row : newer) row.load();
  fetch_state(&current);
  if (bytes > 0) await_tile<1>(&arrived[warp], 0, false);
#pragma unroll
  for (const auto& row : newer) row.store();
  __syncthreads();
  if (current.live == 0) return;
  const int window = static_cast<int>(current.last) - history + 1,
            window_units = (window + kEight - 1) / kEight;
  const int units = context_units + window_units;
  // Block 0 merges. A softmax's records are as many as warps with rows of it.
  const auto records_of = [&](int softmax) {
    return min(softmax == 0 ? context_units : window_units, warps);
  };
  if (threadIdx.x == 0 && blocks > 1 && block == 0) {
    dsmem::barrier_expect(record_barrier, (records_of(0) + records_of(1)) * kRecord * 4);
  }

  int turn = 0;
#pragma unroll 1
  for (int softmax = 0; softmax < 2; ++softmax) {
    const int first = turn, end = softmax == 0 ? context_units : units;
    Rows rows;
#pragma unroll 1
    for (; place + turn * warps < end; ++turn) {
      const int number = place + turn * warps;
      const int left =
          softmax == 0 ? context - number * kEight : window - (number - context_units) * kEight;
      const T* const keys = reinterpret_cast<const T*>(tiles + turn * 2 * Places::kTileBytes) +
                            (softmax == 0 ? 0 : window_shift * d);
      rows.add(query, keys, keys + kValues, min(kEight, left));
    }
    if (turn == first) continue;
    const int number = softmax == 0 ? place : (place + first * warps - context_units);
    float* const record = records + ((softmax << shift_warps) + number) * kRecord;
    if (blocks == 1) {
      rows.finish([&](int at, float2 x) { *reinterpret_cast<float2*>(record + at) = x; });
    } else {
      const uint32_t to = dsmem::address_in_block(shared_address(record), 0);
      const uint32_t barrier = dsmem::address_in_block(record_barrier, 0);
      rows.finish([&](int at, float2 x) { dsmem::send(to + 4 * at, x, barrier); });
    }
  }
  if (block > 0) return;
  if (blocks > 1) {
    dsmem::barrier_wait(record_barrier, 0);
  } else {
    __syncthreads();
  }
  const int softmax = warp % 2;
  merge_records<T, d, kWarps, kWarps / 2>(records + (softmax << shift_warps) * kRecord,
                                          records_of(softmax), warp / 2, parts[warp]);
  __syncthreads();
  if (warp > 0 || lane >= Rows::kValueLanes) return;
  T* const to = static_cast<T*>(a.output) + head * d;
#pragma unroll
  for (int i = 0; i < Rows::kOwnValues; i += 2) {
    const int at = Rows::kOwnValues * lane + i;
    float2 sum = {0, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 part = *reinterpret_cast<const float2*>(&parts[w][at]);
      sum = {sum.x + part.x, sum.y + part.y};
    }
    *reinterpret_cast<uint32_t*>(to + at) = pack<T>(sum.x, sum.y);
  }
}

inline bool has_clusters() {
  static const bool has = compiled_for(tlin_window_attention<bf16, 64>, 90);
  return has;
}

// How a head's rows are dealt.
struct WindowGrid {
  int blocks = 0;  // of a head, a power of two; 0: another kernel has to do it
  int tiles = 0;   // of a block

  int shift() const {  // `blocks` as a power
    int shift = 0;
    while (1 << shift < blocks) ++shift;
    return shift;
  }
};

// As many blocks of a head as the multiprocessors and the rows have work for, and the shared memory
// needs.
template <int d>
WindowGrid window_grid(const DecodeAttention& a) {
  using Places = WindowPlaces<d, kWindowWarps, kEight>;
  const int rows = static_cast<int>(a.most_rows);
  const int most = has_clusters() ? kWindowCluster : 1;
  WindowGrid grid{1, 0};
  while (grid.blocks < most && 2 * grid.blocks * a.kv_heads <= multiprocessors() &&
         rows > grid.blocks * kWindowWarps * kEight) {
    grid.blocks *= 2;
  }
  constexpr int kOthers = kWindowWarps * d * 4 + 512;  // that is not dynamic
  const int room = std::min(160 * 1024, shared_memory_of_block() - kOthers);
  const auto fits = [&] {
    const int tiles = Places::tiles_of(rows, grid.blocks);
    grid.tiles = (tiles + kWindowWarps - 1) / kWindowWarps * kWindowWarps;
    return Places(grid.tiles, 1, grid.blocks).end <= room;
  };
  while (grid.blocks < most && !fits()) grid.blocks *= 2;
  return fits() ? grid : WindowGrid{};
}

// Of a single sequence whose query heads share no keys. False, and nothing is launched, where rows
// are too many.
template <class T, int d>
bool launch_window_attention(const DecodeAttention& a, const Launch& how) {
  if (a.most_rows <= 0 || a.most_rows > 16384) return false;
  const WindowGrid grid = window_grid<d>(a);
  if (grid.blocks == 0) return false;
  Launch clusters = how;
  clusters.cluster = grid.blocks;
  const WindowPlaces<d, kWindowWarps, kEight> places(grid.tiles, 1, grid.blocks);
  launch(clusters, tlin_window_attention<T, d>, "window attention",
         static_cast<unsigned>(a.kv_heads * grid.blocks), 32 * kWindowWarps,
         static_cast<size_t>(places.end), a, grid.shift(), grid.tiles / kWindowWarps);
  return true;
}

}  // namespace tlinformer::cuda
