#include "dense.h"

#include <cublasLt.h>

#include <array>
#include <map>
#include <string>

namespace tlinformer::cuda {
namespace {

void check(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw Error(std::string(what) + ": " + cublasLtGetStatusName(status));
}

// What a call needs besides pointers. cuBLAS is column-major: rows of ours are its columns, and it
// computes to^T (outputs, rows) = weight input^T.
struct Plan {
  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t weight, input, to;
  cublasLtMatmulAlgo_t algorithm;
};

}  // namespace

struct Dense::Impl {
  using Key = std::array<int64_t, 6>;  // rows, outputs, inputs, to_stride, to float32, has a bias

  cudaDataType_t type = CUDA_R_16BF;
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
  cublasLtHandle_t handle = nullptr;
  std::map<Key, Plan> plans;

  Impl(DType dtype, void* memory, int64_t bytes)
      : type(dtype == DType::float16 ? CUDA_R_16F : CUDA_R_16BF),
        workspace(memory),
        workspace_bytes(static_cast<size_t>(bytes)) {
    require(dtype != DType::float32, "the CUDA backend computes in bfloat16 and float16");
    check(cublasLtCreate(&handle), "cublasLtCreate");
  }
  ~Impl() { cublasLtDestroy(handle); }

  Plan make(const Key& key, const void* bias) const;
  // to <- beta to + the product
  void multiply(const Key& key, const void* input, const void* weight, const void* bias, float beta,
                void* to, cudaStream_t stream);
};

Plan Dense::Impl::make(const Key& key, const void* bias) const {
  const auto [rows, outputs, inputs, to_stride, to_float32, has_bias] = key;
  const auto columns = static_cast<uint64_t>(rows);
  const auto m = static_cast<uint64_t>(outputs), k = static_cast<uint64_t>(inputs);
  const cudaDataType_t to_type = to_float32 ? CUDA_R_32F : type;  // a bias is of the same type
  Plan plan;
  check(cublasLtMatmulDescInit(&plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F),
        "cublasLtMatmulDescInit");
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
    check(cublasLtMatmulDescSetAttribute(&plan.operation, attribute, &value, sizeof(value)),
          "cublasLtMatmulDescSetAttribute");
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  if (has_bias) {
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
  }
  const auto lay_out = [](cublasLtMatrixLayout_t layout, cudaDataType_t of, uint64_t height,
                          uint64_t width, int64_t stride) {
    check(cublasLtMatrixLayoutInit(layout, of, height, width, stride), "cublasLtMatrixLayoutInit");
  };
  lay_out(&plan.weight, type, k, m, inputs);
  lay_out(&plan.input, type, k, columns, inputs);
  lay_out(&plan.to, to_type, m, columns, to_stride);

  cublasLtMatmulPreferenceOpaque_t preference;
  check(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit");
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    check(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof(value)),
          "cublasLtMatmulPreferenceSetAttribute");
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{workspace_bytes});
  // Partial sums of a split product must not be rounded to 16 bits.
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
         uint32_t{CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
  for (const auto alignment :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    prefer(alignment, uint32_t{16});
  }
  cublasLtMatmulHeuristicResult_t found;
  int count = 0;
  check(cublasLtMatmulAlgoGetHeuristic(handle, &plan.operation, &plan.weight, &plan.input, &plan.to,
                                       &plan.to, &preference, 1, &found, &count),
        "cublasLtMatmulAlgoGetHeuristic");
  check(count > 0 ? found.state : CUBLAS_STATUS_NOT_SUPPORTED, "cublasLtMatmulAlgoGetHeuristic");
  plan.algorithm = found.algo;
  return plan;
}

void Dense::Impl::multiply(const Key& key, const void* input, const void* weight, const void* bias,
                           float beta, void* to, cudaStream_t stream) {
  auto at = plans.find(key);
  if (at == plans.end()) {
    if (plans.size() >= 1024) plans.clear();  // of prompts of ever other lengths
    at = plans.emplace(key, make(key, bias)).first;
  }
  Plan& plan = at->second;
  if (bias != nullptr) {
    check(cublasLtMatmulDescSetAttribute(&plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias,
                                         sizeof(bias)),
          "cublasLtMatmulDescSetAttribute");
  }
  const float alpha = 1.0f;
  check(cublasLtMatmul(handle, &plan.operation, &alpha, weight, &plan.weight, input, &plan.input,
                       &beta, to, &plan.to, to, &plan.to, &plan.algorithm, workspace,
                       workspace_bytes, stream),
        "cublasLtMatmul");
}

Dense::Dense(DType dtype, void* workspace, int64_t workspace_bytes)
    : impl_(std::make_unique<Impl>(dtype, workspace, workspace_bytes)) {}

Dense::~Dense() = default;

void Dense::product(const void* input, int64_t rows, const void* weight, const void* bias,
                    int64_t outputs, int64_t inputs, void* to, int64_t to_stride,
                    const Launch& how) {
  if (rows == 0) return;
  impl_->multiply({rows, outputs, inputs, to_stride, 0, bias != nullptr}, input, weight, bias, 0.0f,
                  to, how.stream);
}

void Dense::set(const void* input, int64_t rows, const void* weight, const float* bias,
                int64_t outputs, int64_t inputs, float* x, const Launch& how) {
  if (rows == 0) return;
  impl_->multiply({rows, outputs, inputs, outputs, 1, bias != nullptr}, input, weight, bias, 0.0f,
                  x, how.stream);
}

void Dense::add(const void* input, int64_t rows, const void* weight, const float* bias,
                int64_t outputs, int64_t inputs, float* x, const Launch& how) {
  if (rows == 0) return;
  impl_->multiply({rows, outputs, inputs, outputs, 1, bias != nullptr}, input, weight, bias, 1.0f,
                  x, how.stream);
}

// What NVIDIA recommends for Hopper.
int64_t Dense::workspace_bytes() { return int64_t{32} << 20; }

}  // namespace tlinformer::cuda
