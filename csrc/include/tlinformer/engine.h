// The inference engine: prefill a prompt, push tokens one at a time, or let it generate.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tlinformer/cache.h"
#include "tlinformer/config.h"
#include "tlinformer/error.h"
#include "tlinformer/sampling.h"

namespace tlinformer {

struct Arena {  // caller-owned memory of at least CachePlan::total_bytes()
  void* data = nullptr;
  int64_t bytes = 0;
};

struct EngineOptions {
  int num_threads = 0;     // of the CPU; 0: as many as OpenMP gives
  void* stream = nullptr;  // of the CUDA backend: the cudaStream_t that all work goes to
};

struct EngineStats {
  int64_t hits = 0;      // tokens that read the cache and left the history alone
  int64_t slides = 0;    // recomputations of the compressed history, those of prefills included
  int64_t prefills = 0;  // calls of prefill that were done
  int64_t prefill_tokens = 0;
  int64_t rows_read = 0;  // key/value rows that pushed tokens attended to, over all layers
  int64_t cache_bytes = 0;
  std::vector<int64_t> history_length;  // per sequence: tokens before the generation window
  std::vector<int64_t> window_fill;     // per sequence: tokens in the generation window
};

// One verb of the engine's programs (csrc/runtime/backend.h), over all its calls.
struct VerbStats {
  std::string verb;
  int64_t calls = 0;
  double seconds = 0;  // on the CPU; a GPU runs many verbs in a launch: ask a profiler there
  double bytes = 0;  // of weights and cached rows that it needs to read or write, each once a call
  double flops = 0;
};

using Tokens = std::vector<int32_t>;
// Where the caller has the token ids of a prompt, of 32 or 64 bits each; they are only read: on the
// host before the call returns, on the engine's device in the order of its stream.
struct TokenIds {
  const void* ids = nullptr;
  int64_t count = 0;
  bool wide = false;       // int64, else int32
  bool on_device = false;  // in the memory of the engine's device
};
// Called between pieces of long work with the share done, in [0, 1]; return false to interrupt.
using Progress = std::function<bool(double)>;
// Called with each generated token; return false to stop generating.
using TokenSink = std::function<bool(int64_t sequence, int32_t token)>;

class Engine {
 public:
  Engine(const Config& config, const Weights& weights, const CachePlan& plan, Arena arena,
         const EngineOptions& options = {});
  ~Engine();
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;

  // Replaces what was cached by one prompt per sequence (1 <= prompts <= batch_size). Invalid
  // prompts change nothing; after an interruption the sequences are empty.
  void prefill(const std::vector<Tokens>& prompts, const Progress& progress = {});
  void prefill(const TokenIds* prompts, int64_t count, const Progress& progress = {});

  // Pushes one token onto every sequence.
  void step(const Tokens& tokens, const Progress& progress = {});

  // Draws and pushes up to max_new_tokens tokens on every sequence; a sequence ends early after a
  // stop token. Every returned token is in the cache afterwards, so calls can follow one another.
  // The sink gets each token as soon as it is drawn; an error or interruption in that token's push
  // leaves it out of the cache. Progress tells the share of a slide under way.
  std::vector<Tokens> generate(int64_t max_new_tokens, const SamplingParams& sampling,
                               const TokenSink& sink = {}, const Progress& progress = {});

  // Float32 logits of the token after the last one, (active sequences, V), in the memory of the
  // engine's device and in the order of its stream; valid until the next call that changes the
  // engine. copy_logits copies them to memory of the same device. Both require a sequence.
  const float* logits() const;
  void copy_logits(float* to) const;

  // Writes sequences to a file, of which load_state makes the same sequences again: what is
  // generated next is the same to the last bit. All sequences are written, or those chosen, in that
  // order. The file appears when it is complete. Throws FileError where it cannot be written.
  void save_state(const std::string& path, const std::vector<int64_t>& chosen = {},
                  const Progress& progress = {});

  // Replaces what was cached by saved sequences: all of them, or sequence i by the file's sequence
  // chosen[i]. {0, 0, 0} makes three of the first. Random numbers depend on a sequence's new place.
  // A file of another model, dtype or version, or a damaged one, is refused and changes nothing;
  // after an interruption, or where reading fails halfway, the engine may be empty.
  void load_state(const std::string& path, const std::vector<int64_t>& chosen = {},
                  const Progress& progress = {});

  int64_t sequences() const;  // of the last prefill or load_state; 0 when empty
  EngineStats stats() const;
  // Counts verbs from now on, from zero; false stops it.
  void meter(bool on);
  const std::vector<VerbStats>& metered() const;
  void reset();  // forgets all sequences and counters
  const Config& config() const;
  const CachePlan& plan() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tlinformer
