// The seam between the engine and a backend. A layer is three verbs:
//   project   q, k, v = split(qkv_proj(attn_norm(x)));  k and v go to a cache, after RoPE
//   attend    softmax(rope(q) rope(K)^T / sqrt(d)) V, one softmax per cache, outputs added
//   finish    y = x + out_proj(o);  y + down_proj(silu(gate_proj(norm y)) * up_proj(norm y))
// The engine states what a token and a slide are as data, lists of verbs. A backend may interpret
// them one by one, or compile a whole stage into as few launches as it likes at creation.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "tlinformer/cache.h"
#include "tlinformer/config.h"
#include "tlinformer/engine.h"

namespace tlinformer {

// Which keys and values of a layer: of the history (compress layers only), of the compressed
// history (hidden and restore layers), or of the generation window (every layer).
enum class Cache { history, context, window };

// Which rows a stage works on; each has its own activation stream x.
enum class Scope { window, compressed, history };

struct Verb {
  enum class Kind {
    embed,    // x <- embed_tokens[token]
    load,     // x <- the stored history stream
    project,  // q of x if `queries`; k, v of x -> `keys_values` if given
    attend,   // o <- q against `context` if given, plus the causal window if `causal`
    finish,   // x <- finish(x, o)
    store,    // the stored history stream <- x
    keep,     // the compressed stream <- those rows of x that will be compressed
    head,     // logits <- norm(x of each span's last row) embed_tokens^T
  };
  Kind kind;
  int block = 0;
  int layer = 0;
  bool queries = false;
  bool causal = false;
  std::optional<Cache> keys_values{};
  std::optional<Cache> context{};
};

struct Stage {
  Scope scope;
  std::vector<Verb> verbs;
};
using Program = std::vector<Stage>;

// The two programs.
Stage window_program(const Config& config);
Program window_blocks(const Config& config);  // the same, a stage a block
Program slide_program(const Config& config);

// Consecutive rows of one sequence that a stage works on.
struct Span {
  int64_t sequence = 0;
  int64_t begin = 0;  // position of the first row
  int64_t rows = 0;
  int64_t history = 0;     // C: tokens before the generation window
  int64_t compressed = 0;  // rows the history is compressed to: positions C - compressed ... C - 1
};

// Where a layer's cache lies for a span: the slots in use, and which position slot 0 holds.
struct Slots {
  const Region* region;
  int64_t first;  // slot of the first valid row
  int64_t count;  // valid rows once the span's own rows are written
  int64_t base;   // position held by slot 0
};
Slots slots_of(const CachePlan& plan, Cache cache, int block, int layer, const Span& span);

// The spans, of at most `most` rows, in which a slide's stage goes through its rows.
std::vector<Span> pieces_of(const Stage& stage, const Span& all, int64_t most);

// Rows of its context that an attend verb reads.
int64_t keys_read(const Verb& verb, const Span& span);

// What to call a verb: "project", "attend history", ...
const char* name_of(const Verb& verb);

// Arithmetic of a verb over `count` spans, and the bytes of weights and cached rows that it reads
// or writes, each once. Activations are not counted.
struct Work {
  double flops = 0;
  double bytes = 0;
};
Work work_of(const Config& config, DType dtype, const Verb& verb, const Span* spans, size_t count);

// Multiply-adds of a stage over a span: the unit of progress.
double cost(const Config& config, const Stage& stage, const Span& span);

struct VerbMeter;

// Told the share of the stage that is done; throws Interrupted.
using Poll = std::function<void(double)>;

class Backend {
 public:
  virtual ~Backend() = default;

  // The backend keeps the token ids of every sequence, by position.
  virtual void write_tokens(int64_t sequence, int64_t begin, const int32_t* tokens,
                            int64_t count) = 0;
  // Host memory for `count` ids, from which write_tokens copies fastest; until the next call.
  virtual int32_t* staging(int64_t count) {
    staging_.resize(static_cast<size_t>(count));  // kept: new memory costs a first touch
    return staging_.data();
  }
  // The same for a prompt whose ids lie in the memory of the device, if that is not the host's.
  virtual bool in_vocabulary(const TokenIds& /*ids*/) { return false; }
  virtual void narrow_tokens(int64_t /*sequence*/, const TokenIds& /*ids*/) {}

  // Runs the stage's verbs over the spans, in order; polls between pieces of long work.
  virtual void run(const Stage& stage, const std::vector<Span>& spans, const Poll& poll) = 0;
  // Of one block: its compressed history, then the window that follows it. They have layers in
  // common, and each verb of the window reads what its own layer has compressed, so that a backend
  // may take all these rows through the layers together.
  virtual void run_pair(const Stage& compressed, const Span& history, const Stage& window,
                        const Span& own, const Poll& poll) {
    run(compressed, {history}, [&poll](double share) { poll(share / 2); });
    run(window, {own}, [&poll](double share) { poll((1 + share) / 2); });
  }

  // Float32 (batch_size, V), row = sequence, in the memory of the engine's device.
  virtual const float* logits() const = 0;
  virtual void copy_logits(float* to, int64_t sequences) const = 0;  // to the same device

  // Saving and restoring, once all work under way is done. `read` and `write` copy bytes between
  // the memory of the engine's device and the host's; logits that are written count as computed.
  virtual void read(const void* from, int64_t bytes, void* to) = 0;
  virtual void write(const void* from, int64_t bytes, void* to) = 0;
  virtual Tokens read_tokens(int64_t sequence, int64_t count) = 0;
  virtual void write_logits(int64_t sequence, const float* from) = 0;

  // generate: begin, then tokens drawn and run in turn, then end. `last` are the spans of the
  // newest token of every active sequence, as the engine counts them.
  virtual void begin(const SamplingParams& params, const std::vector<Span>& last) = 0;
  // The next `steps` draws will each be followed by a run of the window's stage over what was
  // drawn, nothing between: a device may go ahead of the host.
  virtual void expect(int64_t /*steps*/) {}
  // Draws the token of each span from its sequence's logits and stores it at the span's position.
  virtual void draw(const std::vector<Span>& next, Tokens& drawn) = 0;
  // Whatever was drawn or run beyond `last` never happened.
  virtual void end(const std::vector<Span>& /*last*/) {}

  // Where to count the seconds of verbs, if they run one by one.
  virtual void meter(VerbMeter* /*to*/) {}

 private:
  Tokens staging_;
};

std::unique_ptr<Backend> make_cpu_backend(const Config& config, const Weights& weights,
                                          const CachePlan& plan, Arena arena,
                                          const EngineOptions& options);
#if defined(TLINFORMER_CUDA)
std::unique_ptr<Backend> make_cuda_backend(const Config& config, const Weights& weights,
                                           const CachePlan& plan, Arena arena,
                                           const EngineOptions& options);
#endif

}  // namespace tlinformer
