// What profilers see: NVTX ranges of calls, slides, pieces and verbs; and the meter of verbs.
#include <map>
#include <set>
#include <string>

#include "check.h"
#include "random_model.h"
#include "tlinformer/engine.h"
#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#endif

using namespace tlinformer;

namespace {

// "outer/inner" -> how often; as a tool that NVTX's headers load sees it.
std::map<std::string, int> seen;
std::vector<std::string> open_ranges;

#if defined(NVTX_LOAD_SEQUENCE_VERSION) && NVTX_LOAD_SEQUENCE_VERSION >= 2
constexpr bool kTool = true;
char domain_of_tlinformer;

nvtxDomainHandle_t on_create(const char* name) {
  CHECK(std::string(name) == "tlinformer");
  return reinterpret_cast<nvtxDomainHandle_t>(&domain_of_tlinformer);
}
int on_push(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* about) {
  CHECK(domain == reinterpret_cast<nvtxDomainHandle_t>(&domain_of_tlinformer));
  open_ranges.push_back(about->message.ascii);
  std::string path;
  for (const std::string& name : open_ranges) path += (path.empty() ? "" : "/") + name;
  ++seen[path];
  return static_cast<int>(open_ranges.size()) - 1;
}
int on_pop(nvtxDomainHandle_t) {
  CHECK(!open_ranges.empty());
  open_ranges.pop_back();
  return 0;
}

int attach(NvtxGetExportTableFunc_t export_table) {
  const auto* callbacks =
      static_cast<const NvtxExportTableCallbacks*>(export_table(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table = nullptr;
  unsigned size = 0;
  if (!callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size)) return 0;
  *table[NVTX_CBID_CORE2_DomainCreateA] = reinterpret_cast<NvtxFunctionPointer>(on_create);
  *table[NVTX_CBID_CORE2_DomainRangePushEx] = reinterpret_cast<NvtxFunctionPointer>(on_push);
  *table[NVTX_CBID_CORE2_DomainRangePop] = reinterpret_cast<NvtxFunctionPointer>(on_pop);
  return 1;
}
#else
constexpr bool kTool = false;
#endif

Config two_blocks() {
  Config c = small_config();
  c.num_blocks = 2;
  return c;
}

void test_ranges() {
  const RandomModel model(two_blocks(), DType::float32);
  Owned owned(model, 30, 1, 1);
  seen.clear();
  owned.engine.prefill({Tokens(7, 1)});  // a history of 4, a window of 3
  CHECK(seen["prefill"] == 1 && seen["prefill/slide"] == 1 && seen["prefill/slide/piece"] == 4);
  // Of two blocks: compressed rows finish two layers, those of the window three; restored rows one.
  CHECK(seen["prefill/slide/piece/finish"] == 4 + 1 + 6 && seen["prefill/slide/piece/head"] == 1);
  seen.clear();
  owned.engine.generate(3, {});  // a hit, a slide, a hit
  CHECK(seen["generate"] == 1 && seen["generate/draw"] == 3 && seen["generate/step"] == 3);
  CHECK(seen["generate/slide"] == 1);
  CHECK(seen["generate/step/project"] == 18 && seen["generate/step/attend history"] == 6);
  seen.clear();
  owned.engine.step({1});
  CHECK(seen["step"] == 1 && seen["step/attend context"] == 4);
  CHECK(open_ranges.empty());
}

void test_meter() {
  const Config c = two_blocks();
  const RandomModel model(c, DType::bfloat16);
  Owned owned(model, 60, 2, 1);
  owned.engine.prefill({Tokens(10, 1), Tokens(17, 2)});
  CHECK(owned.engine.metered().empty());
  owned.engine.meter(true);
  owned.engine.step({3, 4});  // hits at positions 10 and 17, of windows that begin at 8 and 16
  std::map<std::string, VerbStats> rows;
  for (const VerbStats& row : owned.engine.metered()) rows[row.verb] = row;
  const double qkv = double(c.hidden_size) * double(c.query_dim() + 2 * c.kv_dim());
  const double row = 2.0 * double(c.kv_dim()) * 2;  // bytes of a cached row
  CHECK(rows["project"].calls == 6 && rows["project"].flops == 6 * 2 * 2 * qkv);
  CHECK(rows["project"].bytes == 6 * (2 * qkv + 2 * row));
  CHECK(rows["attend history"].calls == 2);
  CHECK(rows["attend history"].bytes == 2 * row * (11 + 18));
  CHECK(rows["attend context"].bytes == 4 * row * (3 + 5 + 2 + 5));
  CHECK(rows["attend context"].flops == 4 * 4.0 * double(c.query_dim()) * (3 + 5 + 2 + 5));
  CHECK(rows["finish"].flops == 6 * 2 * 2 * double(24 * 24 + 3 * 24 * 40));
  CHECK(rows["head"].calls == 1 && rows["head"].flops == 2 * 2 * double(37 * 24));
  for (const auto& [verb, stats] : rows) CHECK(stats.seconds > 0);
  owned.engine.generate(2, {});
  rows.clear();
  for (const VerbStats& stats : owned.engine.metered()) rows[stats.verb] = stats;
  CHECK(rows["draw"].calls == 2 && rows["draw"].bytes == 2 * 2 * 37 * 4);
  CHECK(rows["head"].calls == 3);
  owned.engine.meter(false);
  owned.engine.step({1, 2});
  CHECK(owned.engine.metered().empty());
}

}  // namespace

int main() {
#if defined(NVTX_LOAD_SEQUENCE_VERSION) && NVTX_LOAD_SEQUENCE_VERSION >= 2
  InitializeInjectionNvtx2_fnptr = attach;  // before the first range: this program is the tool
#endif
  test_meter();
  if (kTool) test_ranges();
  std::puts(kTool ? "ok" : "ok, without NVTX: its headers are missing or too old to be tested");
}
