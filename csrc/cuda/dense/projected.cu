// A thread has four neighbouring columns of a row: two pairs to rotate, never of two heads. The
// rotations of the block's rows lie in shared memory, the same for all heads.
#include "projected.h"
#include "stationary.cuh"

namespace tlinformer::cuda {
namespace {

constexpr int kPairs = 2;  // of a thread, 8 bytes: heads start on no more
constexpr int kTogether = 8 * kPairs;
constexpr int kDivisionBits = 20;
constexpr int kMostColumns = 8192;  // that multiplying by a reciprocal divides exactly
constexpr int kMemory = 227 * 1024 - 256;

struct Heads {  // where a row of them goes
  void* to = nullptr;
  int64_t row_stride = 0, head_stride = 0;
  int columns = 0;
  bool rotated = false;
};

struct Projected {
  Stationary<1> product;
  const void* bias;
  Heads parts[3];  // q, k, v, or some of them
  int64_t begin;   // position of row 0
  Rope rope;
  int head_dim;
  int per_head;  // 2^kDivisionBits / head_dim, rounded up
};

int rotation_bytes(int head_dim) { return kBlockRows * head_dim / 2 * int{sizeof(float2)}; }

template <class T>
__global__ void __launch_bounds__(kStationaryThreads, 1)
    tlin_projected_rows(const __grid_constant__ Projected p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const uint32_t rotations = aligned_memory() + p.product.end();
  const int64_t block_row = int64_t{blockIdx.x} * kBlockRows;
  // Shared address of the rotations of pairs 2 `piece` and 2 `piece` + 1 of a row of the block.
  // Rows a multiple of 128 bytes long would meet in the same banks.
  const auto rotation_place = [&](int row, int piece) {
    if (p.head_dim % 32 == 0) piece ^= row & 7;
    return rotations + (row * (p.head_dim / 4) + piece) * static_cast<int>(2 * sizeof(float2));
  };
  const auto begin = [&](int group) {
    const int thread = threadIdx.x % 128, row = 64 * group + thread % 64;
    for (int pair = thread / 64; pair < p.head_dim / 2; pair += 2) {
      const float2 by = rotation(p.rope.turns[pair], p.begin + block_row + row);
      const uint32_t to = rotation_place(row, pair / 2) + pair % 2 * sizeof(float2);
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(by.x), "f"(by.y) : "memory");
    }
    asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
  };
  const auto store = [&](const float (&c)[64], int64_t row, int column) {
#pragma unroll
    for (int group = 0; group < kTileColumns / kTogether; ++group) {
      if (column + group * kTogether >= p.product.outputs) break;
      const int output = column + group * kTogether + threadIdx.x % 4 * (2 * kPairs);
      int part = 0, at = output;
      while (at >= p.parts[part].columns) at -= p.parts[part++].columns;
      const Heads& heads = p.parts[part];
      const int head = at * p.per_head >> kDivisionBits, first = at - head * p.head_dim;
      const uint2 bias = *reinterpret_cast<const uint2*>(static_cast<const T*>(p.bias) + output);
      const float2 bias0 = unpack<T>(bias.x), bias1 = unpack<T>(bias.y);
      T* to = static_cast<T*>(heads.to) + row * heads.row_stride + head * heads.head_stride + first;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (row + 8 * half >= p.product.rows) break;
        const int i = 4 * kPairs * group + 2 * half;
        float2 pair0 = {c[i] + bias0.x, c[i + 1] + bias0.y};
        float2 pair1 = {c[i + 4] + bias1.x, c[i + 5] + bias1.y};
        if (heads.rotated) {
          const int own = static_cast<int>(row - block_row) + 8 * half;
          float2 by0, by1;
          asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                       : "=f"(by0.x), "=f"(by0.y), "=f"(by1.x), "=f"(by1.y)
                       : "r"(rotation_place(own, first / 4))
                       : "memory");
          pair0 = rotate(pair0, by0);
          pair1 = rotate(pair1, by1);
        }
        *reinterpret_cast<uint2*>(to + 8 * half * heads.row_stride) = {pack<T>(pair0.x, pair0.y),
                                                                       pack<T>(pair1.x, pair1.y)};
      }
    }
  };
  multiply_stationary<T, 1>(p.product, begin, store);
#endif
}

int64_t query_columns(const ProjectedRows& p) {
  return p.query != nullptr ? int64_t{p.query_heads} * p.head_dim : 0;
}
int64_t key_columns(const ProjectedRows& p) {
  return p.keys != nullptr ? int64_t{p.kv_heads} * p.head_dim : 0;
}
int64_t columns(const ProjectedRows& p) { return query_columns(p) + 2 * key_columns(p); }

}  // namespace

bool takes_projected_rows(DType dtype, int64_t inputs, int64_t columns, int head_dim) {
  const int64_t chunks = (inputs + kTileInputs - 1) / kTileInputs;
  const int64_t memory =
      chunks * kInputBytes + kStages<1> * kMatrixBytes + rotation_bytes(head_dim) + 1024;
  bool takes = stationary_takes(inputs, columns, kTogether) && head_dim % 4 == 0 &&
               head_dim <= 128 && memory <= kMemory && columns <= kMostColumns;
  with_type(dtype, [&](auto tag) {
    static const bool has = has_products(tlin_projected_rows<typename decltype(tag)::type>);
    takes = takes && has;
  });
  return takes;
}

void projected_rows(const ProjectedRows& p, const Launch& how) {
  require(takes_projected_rows(p.dtype, p.inputs, columns(p), p.head_dim), "no kernel projects ",
          p.inputs, " inputs to ", columns(p), " columns of heads of size ", p.head_dim, " here");
  if (p.rows == 0 || columns(p) == 0) return;
  Projected q{};
  q.product = stationary<1>(p.dtype, p.input, p.rows, p.inputs, {p.weight}, columns(p), kPairs);
  q.bias = p.bias;
  q.begin = p.begin;
  q.rope = p.rope;
  q.head_dim = p.head_dim;
  q.per_head = ((1 << kDivisionBits) + p.head_dim - 1) / p.head_dim;
  Heads* part = q.parts;
  const int64_t d = p.head_dim;
  if (p.query != nullptr) {
    *part++ = {p.query, p.query_heads * d, d, static_cast<int>(query_columns(p)), true};
  }
  if (p.keys != nullptr) {
    const int64_t skipped = p.slot * d * size_of(p.dtype);
    const int count = static_cast<int>(key_columns(p));
    *part++ = {static_cast<char*>(p.keys) + skipped, d, p.head_stride, count, true};
    *part++ = {static_cast<char*>(p.values) + skipped, d, p.head_stride, count, false};
  }
  with_type(p.dtype, [&](auto tag) {
    launch(how, tlin_projected_rows<typename decltype(tag)::type>, "projected_rows",
           stationary_grid(q.product), kStationaryThreads,
           static_cast<size_t>(q.product.end() + rotation_bytes(p.head_dim) + 1024), q);
  });
}

}  // namespace tlinformer::cuda
