// Sequences of an engine to a file and back, in pieces: no second copy of a cache exists.
#pragma once

#include <string>
#include <vector>

#include "backend.h"
#include "file.h"
#include "state_file.h"

namespace tlinformer {

// What saving and restoring need of an engine.
struct StateHolder {
  const Config& config;
  const CachePlan& plan;
  char* arena;
  Backend& backend;
  std::string fingerprint;  // of the weights
};

// 16 hexadecimal digits that follow from every byte of the weights.
std::string fingerprint_of(const Config& config, const Weights& weights, Backend& backend);

struct HeldSequence {
  int64_t index = 0;  // in the engine
  int64_t length = 0;
};
void save_sequences(const StateHolder& holder, const std::string& path,
                    const std::vector<HeldSequence>& sequences, const Progress& progress);

// A file that is known, once this exists, to be whole and made for this engine. It reports half of
// the progress; `restore` does the rest.
class SavedState {
 public:
  // Sequence i of the engine shall become the file's sequence chosen[i]; all, if it is empty.
  SavedState(const StateHolder& holder, const std::string& path, std::vector<int64_t> chosen,
             const Progress& progress);
  std::vector<int64_t> lengths() const;  // of the engine's new sequences
  void restore(const Progress& progress) const;

 private:
  StateHeader check_header();
  void check_room(const std::vector<int64_t>& saved) const;
  void check_data(const std::string& checksum, const Progress& progress);

  const StateHolder& holder_;
  InputFile file_;
  std::vector<int64_t> chosen_;
  StateLayout layout_;
  int64_t data_ = 0;            // where they begin in the file
  std::vector<Tokens> tokens_;  // of the engine's new sequences
};

}  // namespace tlinformer
