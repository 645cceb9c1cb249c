// The prompts of a prefill on their way to the backend: all are checked before any is written.
#pragma once

#include "backend.h"
#include "token_ids.h"

namespace tlinformer {

class Prompts {
 public:
  // Throws for a prompt that the engine can't take, with nothing changed. Long ones are checked by
  // so many threads.
  Prompts(const TokenIds* prompts, int64_t count, const Config& config, const CachePlan& plan,
          int threads, Backend& backend)
      : prompts_(prompts),
        vocab_(config.vocab_size),
        threads_(threads),
        device_(plan.options().device),
        backend_(backend) {
    check_lengths(count, plan.options());
    int64_t near = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (far(i)) {
        check_far(i);
      } else {
        near += prompts[i].count;
      }
    }
    int32_t* to = backend.staging(near);
    next_ = to;
    for (int64_t i = 0; i < count; ++i) {
      if (far(i)) continue;
      narrow_to(to, prompts[i], i);
      to += prompts[i].count;
    }
  }

  // Hands them to the backend, one after the other.
  void write(int64_t i) {
    if (far(i)) return backend_.narrow_tokens(i, prompts_[i]);
    backend_.write_tokens(i, 0, next_, prompts_[i].count);
    next_ += prompts_[i].count;
  }

 private:
  bool far(int64_t i) const {  // the host cannot read it
    return prompts_[i].on_device && device_ != Device::cpu;
  }

  void check_lengths(int64_t count, const CachePlanOptions& options) const {
    require(count >= 1 && count <= options.batch_size, "prefill got ", count,
            " prompts; this engine holds 1 to ", options.batch_size, " sequences (batch_size)");
    for (int64_t i = 0; i < count; ++i) {
      const int64_t length = prompts_[i].count;
      require(length > 0, "prompt ", i, " is empty; a prompt needs at least one token");
      require(length <= options.max_context, "prompt ", i, " has ", length,
              " tokens; this engine was planned for max_context = ", options.max_context,
              "; create it with a larger one");
    }
  }

  void check_far(int64_t i) const {
    const TokenIds& prompt = prompts_[i];
    if (backend_.in_vocabulary(prompt)) return;
    // The host says which id is wrong.
    std::vector<char> copy(static_cast<size_t>(prompt.count * (prompt.wide ? 8 : 4)));
    backend_.read(prompt.ids, static_cast<int64_t>(copy.size()), copy.data());
    Tokens narrowed(static_cast<size_t>(prompt.count));
    narrow_to(narrowed.data(), {copy.data(), prompt.count, prompt.wide, false}, i);
  }

  void narrow_to(int32_t* to, const TokenIds& prompt, int64_t i) const {
    const auto take = [&](const auto* ids) {
      narrow(ids, prompt.count, vocab_, threads_, to, "prompt ", i);
    };
    if (prompt.wide) {
      take(static_cast<const int64_t*>(prompt.ids));
    } else {
      take(static_cast<const int32_t*>(prompt.ids));
    }
  }

  const TokenIds* prompts_;
  int64_t vocab_;
  int threads_;
  Device device_;
  Backend& backend_;
  const int32_t* next_ = nullptr;  // of the ids that the host has narrowed, those not yet written
};

}  // namespace tlinformer
