// on_gpu PROGRAM [ARGUMENT...]: becomes the program where there is a GPU, and exits with 77, which
// ctest counts as skipped, where there is none.
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <cstdio>

int main(int count, char** arguments) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("skipped: no GPU");
    return 77;
  }
  if (count > 1) execv(arguments[1], arguments + 1);
  std::perror("on_gpu");
  return 1;
}
