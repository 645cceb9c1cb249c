// What each verb cost: the engine counts its work, a backend that runs verbs one by one its time.
#pragma once

#include <chrono>

#include "backend.h"

namespace tlinformer {

struct VerbMeter {
  bool on = false;
  std::vector<VerbStats> rows;

  VerbStats& of(const char* verb) {
    for (VerbStats& row : rows) {
      if (row.verb == verb) return row;
    }
    rows.push_back({verb});
    return rows.back();
  }

  void count(const char* verb, const Work& work) {
    VerbStats& row = of(verb);
    ++row.calls;
    row.bytes += work.bytes;
    row.flops += work.flops;
  }

  // Times a verb from its creation to its end.
  class Timed {
    using Clock = std::chrono::steady_clock;

   public:
    Timed(VerbMeter* meter, const char* verb) : meter_(meter && meter->on ? meter : nullptr) {
      if (!meter_) return;
      verb_ = verb;
      began_ = Clock::now();
    }
    ~Timed() {
      if (!meter_) return;
      const std::chrono::duration<double> took = Clock::now() - began_;
      meter_->of(verb_).seconds += took.count();
    }
    Timed(const Timed&) = delete;
    Timed& operator=(const Timed&) = delete;

   private:
    VerbMeter* meter_;
    const char* verb_ = nullptr;
    Clock::time_point began_{};
  };
};

}  // namespace tlinformer
