// Named ranges for profilers that speak NVTX, in the domain "tlinformer". Without such a tool a
// range costs a comparison; where NVTX's headers were missing at build time, nothing.
#pragma once

#include <cstdint>

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define TLINFORMER_NVTX 1
#endif

namespace tlinformer {

class Range {
 public:
#if defined(TLINFORMER_NVTX)
  // `name` outlives the program; `number` says which of many: a position, or a layer.
  explicit Range(const char* name, int64_t number = 0) {
    if (!domain()) return;
    nvtxEventAttributes_t about{};
    about.version = NVTX_VERSION;
    about.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
    about.messageType = NVTX_MESSAGE_TYPE_ASCII;
    about.message.ascii = name;
    about.payloadType = NVTX_PAYLOAD_TYPE_INT64;
    about.payload.llValue = number;
    nvtxDomainRangePushEx(domain(), &about);
  }
  ~Range() {
    if (domain()) nvtxDomainRangePop(domain());
  }

 private:
  static nvtxDomainHandle_t domain() {
    static const nvtxDomainHandle_t handle = nvtxDomainCreateA("tlinformer");
    return handle;  // null without a tool
  }

 public:
#else
  explicit Range(const char*, int64_t = 0) {}
  ~Range() {}
#endif
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
};

}  // namespace tlinformer
