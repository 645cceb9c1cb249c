// XXH64 (Yann Collet's specification), with seed 0: a checksum at the speed of memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

namespace tlinformer {

class Hash64 {
 public:
  void add(const void* data, int64_t count) {
    const char* from = static_cast<const char*>(data);
    bytes_ += static_cast<uint64_t>(count);
    while (count > 0) {
      if (held_ == 0 && count >= kBlock) {
        for (; count >= kBlock; from += kBlock, count -= kBlock) block(from);
        continue;
      }
      const int64_t n = std::min(count, kBlock - held_);
      std::memcpy(rest_ + held_, from, static_cast<size_t>(n));
      held_ += n, from += n, count -= n;
      if (held_ < kBlock) continue;
      block(rest_);
      held_ = 0;
    }
  }

  uint64_t value() const {
    uint64_t h = k5;
    if (bytes_ >= kBlock) {
      h = turn(lanes_[0], 1) + turn(lanes_[1], 7) + turn(lanes_[2], 12) + turn(lanes_[3], 18);
      for (uint64_t lane : lanes_) h = (h ^ mixed(0, lane)) * k1 + k4;
    }
    h += bytes_;
    const char* at = rest_;
    const char* const end = rest_ + held_;
    for (; end - at >= 8; at += 8) h = turn(h ^ mixed(0, word<uint64_t>(at)), 27) * k1 + k4;
    for (; end - at >= 4; at += 4) h = turn(h ^ word<uint32_t>(at) * k1, 23) * k2 + k3;
    for (; at < end; ++at) h = turn(h ^ static_cast<unsigned char>(*at) * k5, 11) * k1;
    h = (h ^ h >> 33) * k2;
    h = (h ^ h >> 29) * k3;
    return h ^ h >> 32;
  }

  std::string hex() const {
    char digits[17];
    std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(value()));
    return digits;
  }

 private:
  static constexpr int64_t kBlock = 32;
  static constexpr uint64_t k1 = 0x9E3779B185EBCA87, k2 = 0xC2B2AE3D27D4EB4F,
                            k3 = 0x165667B19E3779F9, k4 = 0x85EBCA77C2B2AE63,
                            k5 = 0x27D4EB2F165667C5;

  static uint64_t turn(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }
  static uint64_t mixed(uint64_t lane, uint64_t x) { return turn(lane + x * k2, 31) * k1; }
  template <class T>
  static uint64_t word(const char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }

  void block(const char* from) {
    for (int i = 0; i < 4; ++i) lanes_[i] = mixed(lanes_[i], word<uint64_t>(from + 8 * i));
  }

  uint64_t lanes_[4] = {k1 + k2, k2, 0, 0 - k1};
  char rest_[kBlock];
  int64_t held_ = 0;
  uint64_t bytes_ = 0;
};

}  // namespace tlinformer
