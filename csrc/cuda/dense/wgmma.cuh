// Hopper's products of a warp group (128 threads) on tiles in shared memory, and the tensor copies
// that bring the tiles. Other devices compile to nothing.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "../numeric.cuh"

namespace tlinformer::cuda {

// A tile's rows are 64 elements of 16 bits, 128 bytes, 16-byte pieces swizzled within eight rows as
// the copies and the products both do it. Tiles start on 1024 bytes.
constexpr int kTileInputs = 64;
constexpr int kTileRowBytes = 2 * kTileInputs;

// Shared memory to multiply with: address and the distance of groups of eight rows in units of 16
// bytes, and the swizzle of 128 bytes. Sixteen inputs further are 32 bytes, 2 units.
__device__ inline uint64_t tile_descriptor(uint32_t address) {
  constexpr uint64_t kGroup = 8 * kTileRowBytes / 16;
  return uint64_t{(address & 0x3ffffu) >> 4} | uint64_t{1} << 16 | kGroup << 32 | uint64_t{1} << 62;
}

// By one thread: copies the box at `place` (innermost first) of a tensor; the barrier counts bytes.
__device__ inline void copy_box(uint32_t to, const CUtensorMap* tensor, uint32_t barrier,
                                const int (&place)[5]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(to),
      "l"(tensor), "r"(barrier), "r"(place[0]), "r"(place[1]), "r"(place[2]), "r"(place[3]),
      "r"(place[4])
      : "memory");
#endif
}

// Registers of the sums may be used, by earlier instructions, up to here.
__device__ inline void begin_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
// The products since the last call are a group.
__device__ inline void end_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until at most `kLeft` groups are under way.
template <int kLeft>
__device__ inline void wait_for_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#endif
}

// c (64 x 256) <- a (64 x 16) b^T (256 x 16), added to c unless `fresh`. Thread t of the group has
// rows r = t / 32 * 16 + t % 32 / 4 and r + 8: c[4 j + i] is of row r + i / 2 * 8, column
// 8 j + t % 4 * 2 + i % 2.
template <class T>
__device__ inline void multiply_tile(float (&c)[128], uint64_t a, uint64_t b, bool fresh) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TLINFORMER_MULTIPLY(type)                                                                  \
  asm volatile(                                                                                    \
      "{\n.reg .pred adds;\nsetp.eq.b32 adds, %130, 0;\n"                                          \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                 \
      " {"                                                                                         \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                     \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "           \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "           \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "           \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "           \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "     \
      "%111, "                                                                                     \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
      "%127}, "                                                                                    \
      "%128, %129, adds, 1, 1, 0, 0;\n}"                                                           \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]),        \
        "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]),    \
        "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), \
        "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), \
        "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]), "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), \
        "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), "+f"(c[41]), \
        "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), "+f"(c[48]), \
        "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]), \
        "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), \
        "+f"(c[63]), "+f"(c[64]), "+f"(c[65]), "+f"(c[66]), "+f"(c[67]), "+f"(c[68]), "+f"(c[69]), \
        "+f"(c[70]), "+f"(c[71]), "+f"(c[72]), "+f"(c[73]), "+f"(c[74]), "+f"(c[75]), "+f"(c[76]), \
        "+f"(c[77]), "+f"(c[78]), "+f"(c[79]), "+f"(c[80]), "+f"(c[81]), "+f"(c[82]), "+f"(c[83]), \
        "+f"(c[84]), "+f"(c[85]), "+f"(c[86]), "+f"(c[87]), "+f"(c[88]), "+f"(c[89]), "+f"(c[90]), \
        "+f"(c[91]), "+f"(c[92]), "+f"(c[93]), "+f"(c[94]), "+f"(c[95]), "+f"(c[96]), "+f"(c[97]), \
        "+f"(c[98]), "+f"(c[99]), "+f"(c[100]), "+f"(c[101]), "+f"(c[102]), "+f"(c[103]),          \
        "+f"(c[104]), "+f"(c[105]), "+f"(c[106]), "+f"(c[107]), "+f"(c[108]), "+f"(c[109]),        \
        "+f"(c[110]), "+f"(c[111]), "+f"(c[112]), "+f"(c[113]), "+f"(c[114]), "+f"(c[115]),        \
        "+f"(c[116]), "+f"(c[117]), "+f"(c[118]), "+f"(c[119]), "+f"(c[120]), "+f"(c[121]),        \
        "+f"(c[122]), "+f"(c[123]), "+f"(c[124]), "+f"(c[125]), "+f"(c[126]), "+f"(c[127])         \
      : "l"(a), "l"(b), "r"(int{fresh}))
  if constexpr (std::is_same_v<T, bf16>) {
    TLINFORMER_MULTIPLY("bf16");
  } else {
    TLINFORMER_MULTIPLY("f16");
  }
#undef TLINFORMER_MULTIPLY
#endif
}

}  // namespace tlinformer::cuda
