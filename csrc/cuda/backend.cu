// The backend on a GPU: the host enqueues, the device goes from token to token by itself.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>

#include "../runtime/backend.h"
#include "attention/speeds.h"
#include "many_rows.h"
#include "model.h"
#include "step/step.h"
#include "token_ids.h"
#include "workspace.h"

namespace tlinformer {
namespace cuda {
namespace {

constexpr int64_t kRing = 64;         // draws whose tokens the host may be late to fetch
constexpr int64_t kAhead = 16;        // tokens that the device may be ahead of the host
constexpr int64_t kTogether = 4;      // tokens that are launched at once, if as many are expected
constexpr int64_t kEvents = 4;        // pieces of a slide that may be under way
constexpr int64_t kStaged = 1 << 20;  // ids of prompts that there is pinned memory for at first

__global__ void tlin_set_history(SequenceState* state, int64_t history, int32_t compressed) {
  state->history = history;
  state->compressed = compressed;
}

__global__ void tlin_mark_seen(const int32_t* tokens, int64_t count, uint8_t* seen) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    seen[tokens[i]] = kSeen;
  }
}

// A sequence of kernel launches, recorded once.
class Graph {
 public:
  template <class Record>
  explicit Graph(const Record& record) {
    cudaStream_t stream;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture of a step");
    cudaGraph_t graph = nullptr;
    try {
      record(stream);
    } catch (...) {
      cudaStreamEndCapture(stream, &graph);
      if (graph) cudaGraphDestroy(graph);
      cudaStreamDestroy(stream);
      throw;
    }
    const cudaError_t captured = cudaStreamEndCapture(stream, &graph);
    cudaStreamDestroy(stream);
    check(captured, "capture of a step");
    const cudaError_t made = cudaGraphInstantiate(&exec_, graph, 0);
    cudaGraphDestroy(graph);
    check(made, "cudaGraphInstantiate");
  }
  ~Graph() { cudaGraphExecDestroy(exec_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  void launch(cudaStream_t stream) const { check(cudaGraphLaunch(exec_, stream), "a step"); }

 private:
  cudaGraphExec_t exec_ = nullptr;
};

class CudaBackend final : public Backend {
 public:
  CudaBackend(const Config& config, const Weights& weights, const CachePlan& plan, Arena arena,
              const EngineOptions& options)
      : m_(config, weights, plan, arena),
        stream_(static_cast<cudaStream_t>(options.stream)),
        batch_(plan.options().batch_size),
        w_(Workspace::layout(config, plan)),
        base_(m_.arena + plan.find("workspace")->offset),
        device_(static_cast<size_t>(batch_)) {
    require(weights.dtype == m_.dtype, "the weights are ", name_of(weights.dtype),
            ", the cache plan is ", name_of(m_.dtype), "; they must agree");
    check(cudaMemsetAsync(base_, 0, static_cast<size_t>(w_.step_bytes), stream_), "cudaMemset");
    check(cudaHostAlloc(&ring_, static_cast<size_t>(kRing * batch_) * sizeof(int32_t),
                        cudaHostAllocMapped),
          "pinned memory for the tokens");
    std::fill(ring_, ring_ + kRing * batch_, kPending);
    try {
      for (cudaEvent_t& event : events_) {
        check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
      }
      check(cudaStreamCreateWithFlags(&side_, cudaStreamNonBlocking), "cudaStreamCreate");
      staging(std::min(kStaged, plan.options().max_context));
      many_[0] = std::make_unique<ManyRows>(m_, w_, 0, base_, stream_);
      fork();
      many_[1] = std::make_unique<ManyRows>(m_, w_, 1, base_, side_);
      join();
      multiprocessor_speeds();  // what captures use must not be measured within them
      step_ = std::make_unique<Step>(m_, w_, base_);
      step_->set_ring(ring_, kRing);
      set_state();
      push_ = std::make_unique<Graph>([&](cudaStream_t stream) { step_->push({stream, false}); });
      one_ = std::make_unique<Graph>([&](cudaStream_t stream) { draw_and_push(stream, 1); });
      several_ =
          std::make_unique<Graph>([&](cudaStream_t stream) { draw_and_push(stream, kTogether); });
      check(cudaStreamSynchronize(stream_), "creation of the engine");
    } catch (...) {
      release();
      throw;
    }
  }

  ~CudaBackend() override {
    cudaStreamSynchronize(stream_);
    cudaStreamSynchronize(side_);
    release();
  }

  int32_t* staging(int64_t count) override { return staged_.room(count); }

  void write_tokens(int64_t sequence, int64_t begin, const int32_t* tokens,
                    int64_t count) override {
    join();
    check(cudaMemcpyAsync(tokens_of(sequence) + begin, tokens,
                          static_cast<size_t>(count) * sizeof(int32_t), cudaMemcpyHostToDevice,
                          stream_),
          "copy of token ids");
    if (staged_.holds(tokens)) staged_.sent(stream_);
  }
  bool in_vocabulary(const TokenIds& ids) override {
    join();
    return staged_.in_vocabulary(ids, m_.c.vocab_size, stream_);
  }
  void narrow_tokens(int64_t sequence, const TokenIds& ids) override {
    join();
    narrow_ids(ids, tokens_of(sequence), stream_);
  }

  void run(const Stage& stage, const std::vector<Span>& spans, const Poll&) override {
    if (stage.scope == Scope::history) return piece(stage, spans.front());
    join();
    const bool tokens =
        stage.scope == Scope::window &&
        std::all_of(spans.begin(), spans.end(), [](const Span& span) { return span.rows == 1; });
    if (tokens) return push(spans);
    for (const Span& span : spans) {
      const float* last = many_[0]->run(stage, span);
      if (stage.verbs.back().kind == Verb::Kind::head) head(span, last);
      wait_for_an_earlier_piece(stream_);
    }
  }

  void run_pair(const Stage& compressed, const Span& history, const Stage& window, const Span& own,
                const Poll&) override {
    join();
    const float* last = many_[0]->run_pair(compressed, history, window, own);
    if (window.verbs.back().kind == Verb::Kind::head) head(own, last);
    wait_for_an_earlier_piece(stream_);
  }

  const float* logits() const override { return reinterpret_cast<const float*>(base_ + w_.logits); }

  void copy_logits(float* to, int64_t sequences) const override {
    check(cudaMemcpyAsync(to, logits(), static_cast<size_t>(sequences * m_.c.vocab_size) * 4,
                          cudaMemcpyDeviceToDevice, stream_),
          "copy of the logits");
  }

  void read(const void* from, int64_t bytes, void* to) override {
    join();
    check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, stream_),
          "copy of a saved state from the device");
    check(cudaStreamSynchronize(stream_), "copy of a saved state from the device");
  }
  void write(const void* from, int64_t bytes, void* to) override {
    join();
    check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream_),
          "copy of a saved state to the device");
    check(cudaStreamSynchronize(stream_), "copy of a saved state to the device");
  }
  Tokens read_tokens(int64_t sequence, int64_t count) override {
    Tokens tokens(static_cast<size_t>(count));
    read(tokens_of(sequence), count * int64_t{sizeof(int32_t)}, tokens.data());
    return tokens;
  }
  // The sampler's candidates are as many as the head has blocks; the likeliest token of all stands
  // for each of them.
  void write_logits(int64_t sequence, const float* from) override {
    const int64_t v = m_.c.vocab_size, count = head_candidates(m_.vocab());
    int32_t best = 0;
    for (int32_t i = 0; i < v && !std::isnan(from[best]); ++i) {
      if (from[i] > from[best] || std::isnan(from[i])) best = i;
    }
    const std::vector<Candidate> candidates(static_cast<size_t>(count), {from[best], best});
    const int64_t bytes = count * int64_t{sizeof(Candidate)};
    write(candidates.data(), bytes, base_ + w_.candidates + sequence * bytes);
    write(from, v * int64_t{sizeof(float)},
          base_ + w_.logits + sequence * v * int64_t{sizeof(float)});
  }

  void begin(const SamplingParams& params, const std::vector<Span>& last) override {
    join();
    const DeviceSampling sampling{params.temperature,        params.top_p, params.min_p,
                                  params.repetition_penalty, params.top_k, params.seed};
    check(cudaMemcpyAsync(base_ + w_.sampling, &sampling, sizeof sampling, cudaMemcpyHostToDevice,
                          stream_),
          "copy of the sampling parameters");
    const size_t vocab = static_cast<size_t>(m_.c.vocab_size);
    stops_.assign(vocab, 0);
    for (int32_t token : params.stop_token_ids) stops_[static_cast<size_t>(token)] = 1;
    check(cudaMemcpyAsync(base_ + w_.stops, stops_.data(), vocab, cudaMemcpyHostToDevice, stream_),
          "copy of the stop tokens");
    if (params.repetition_penalty != 1.0) {
      uint8_t* seen = reinterpret_cast<uint8_t*>(base_ + w_.seen);
      check(cudaMemsetAsync(seen, 0, vocab * static_cast<size_t>(batch_), stream_), "cudaMemset");
      for (const Span& span : last) {
        launch({stream_, false}, tlin_mark_seen, "tlin_mark_seen", 64, 256, 0,
               tokens_of(span.sequence), span.begin + 1, seen + span.sequence * m_.c.vocab_size);
      }
    }
    for (SequenceState& state : device_) state.live = 0;
    for (const Span& span : last) state(span) = {span.begin, span.history, rows_of(span), 1};
    set_state();
  }

  void expect(int64_t steps) override {
    expected_ = steps;
    to_launch_ = steps;
  }

  void draw(const std::vector<Span>& next, Tokens& drawn) override {
    if (expected_ == 0) {
      step_->sample({stream_, false});
      ++launched_;
    }
    while (to_launch_ > 0) {
      const int64_t tokens = to_launch_ < kTogether ? 1 : kTogether;
      if (launched_ - taken_ + tokens > kAhead) break;
      (tokens == 1 ? one_ : several_)->launch(stream_);
      to_launch_ -= tokens;
      launched_ += tokens;
    }
    drawn.clear();
    for (SequenceState& state : device_) state.live %= 2;  // 2, a stop token's sequence, is over
    int32_t* row = ring_ + taken_ % kRing * batch_;
    for (const Span& span : next) drawn.push_back(await(row[span.sequence]));
    std::fill(row, row + batch_, kPending);
    ++taken_;
    drawn_ = true;
    for (size_t i = 0; i < next.size(); ++i) {
      require<NumericalError>(drawn[i] >= 0, "the logits of sequence ", next[i].sequence,
                              " at position ", next[i].begin, " contain NaN (token ", -2 - drawn[i],
                              "): the weights hold NaN or infinity, or overflowed their dtype");
      state(next[i]).last = next[i].begin;
      state(next[i]).live = stops_[static_cast<size_t>(drawn[i])] ? 2 : 1;
    }
  }

  void end(const std::vector<Span>& last) override {
    const bool ahead = launched_ > taken_ || (drawn_ && expected_ > 0);
    expected_ = to_launch_ = 0;
    drawn_ = false;
    if (!ahead) return;
    try {  // the device went on: its newest tokens never happened
      check(cudaStreamSynchronize(stream_), "generate");
      std::fill(ring_, ring_ + kRing * batch_, kPending);
      taken_ = launched_;
      push(last);
    } catch (const Error&) {
      // The device has failed; the next call will say so, too.
    }
  }

 private:
  SequenceState& state(const Span& span) { return device_[static_cast<size_t>(span.sequence)]; }
  static int32_t rows_of(const Span& span) { return static_cast<int32_t>(span.compressed); }
  SequenceState* states() const { return reinterpret_cast<SequenceState*>(base_ + w_.state); }
  int32_t* tokens_of(int64_t sequence) const {
    return reinterpret_cast<int32_t*>(base_ + w_.tokens) + sequence * m_.plan.options().max_context;
  }

  void set_state() {
    check(cudaMemcpyAsync(states(), device_.data(), device_.size() * sizeof(SequenceState),
                          cudaMemcpyHostToDevice, stream_),
          "copy of the sequences' state");
  }

  void draw_and_push(cudaStream_t stream, int64_t tokens) const {
    for (int64_t i = 0; i < tokens; ++i) {
      step_->sample({stream, i > 0});
      step_->push({stream, true});
    }
  }

  // One token of each span through the model.
  void push(const std::vector<Span>& spans) {
    join();
    if (expected_ > 0) {  // enqueued together with its draw
      --expected_;
      drawn_ = false;
      return;
    }
    if (drawn_) {  // the sampler has fed it; only a slide may have come between
      for (const Span& span : spans) {
        SequenceState& known = state(span);
        if (known.history == span.history) continue;
        known.history = span.history;
        known.compressed = rows_of(span);
        launch({stream_, false}, tlin_set_history, "tlin_set_history", 1, 1, 0,
               states() + span.sequence, known.history, known.compressed);
      }
      drawn_ = false;
    } else {
      const std::vector<SequenceState> known = device_;
      for (SequenceState& state : device_) state.live = 0;
      for (const Span& span : spans) state(span) = {span.begin - 1, span.history, rows_of(span), 1};
      const auto same = [](const SequenceState& a, const SequenceState& b) {
        return a.last == b.last && a.history == b.history && a.compressed == b.compressed &&
               a.live == b.live;
      };
      if (!std::equal(known.begin(), known.end(), device_.begin(), same)) set_state();
      step_->feed({stream_, false});
      for (const Span& span : spans) state(span).last = span.begin;
    }
    push_->launch(stream_);
  }

  // Pieces of a history go through two lanes in turn: where one waits for memory, the other
  // computes, and neither leaves multiprocessors idle at the end of its kernels.
  void piece(const Stage& stage, const Span& span) {
    const int lane = static_cast<int>(piece_ % 2);
    if (!forked_) fork();
    many_[lane]->run(stage, span);
    wait_for_an_earlier_piece(lane == 0 ? stream_ : side_);
  }

  void fork() {
    check(cudaEventRecord(meeting_, stream_), "cudaEventRecord");
    check(cudaStreamWaitEvent(side_, meeting_, 0), "cudaStreamWaitEvent");
    forked_ = true;
  }

  void join() {
    if (!forked_) return;
    check(cudaEventRecord(meeting_, side_), "cudaEventRecord");
    check(cudaStreamWaitEvent(stream_, meeting_, 0), "cudaStreamWaitEvent");
    forked_ = false;
  }

  // The logits of a sequence from the last row of its prompt.
  void head(const Span& span, const float* x) {
    for (SequenceState& state : device_) state.live = 0;
    state(span) = {span.begin + span.rows - 1, span.history, rows_of(span), 1};
    set_state();
    check(cudaMemcpyAsync(
              reinterpret_cast<float*>(base_ + w_.step_x) + span.sequence * m_.c.hidden_size, x,
              static_cast<size_t>(m_.c.hidden_size) * 4, cudaMemcpyDeviceToDevice, stream_),
          "copy of the last row");
    step_->head({stream_, false});
  }

  // Keeps the host a few pieces ahead of the device, so that Ctrl-C and progress mean something.
  void wait_for_an_earlier_piece(cudaStream_t stream) {
    cudaEvent_t event = events_[piece_++ % kEvents];
    check(cudaEventSynchronize(event), "a piece of a slide");
    check(cudaEventRecord(event, stream), "cudaEventRecord");
  }

  // The token that the device writes to pinned memory.
  int32_t await(const int32_t& slot) const {
    const volatile int32_t* at = &slot;
    for (int64_t spins = 1; *at == kPending; ++spins) {
      if (spins % 1024 != 0) continue;
      const cudaError_t status = cudaStreamQuery(stream_);
      if (status == cudaErrorNotReady) continue;
      check(status, "generate");
      require<Error>(*at != kPending, "the device ended a step without a token");
    }
    std::atomic_thread_fence(std::memory_order_acquire);
    return *at;
  }

  void release() {
    several_.reset();
    one_.reset();
    push_.reset();
    step_.reset();
    for (auto& many : many_) many.reset();
    for (cudaEvent_t event : events_) {
      if (event) cudaEventDestroy(event);
    }
    if (side_) cudaStreamDestroy(side_);
    cudaFreeHost(ring_);
  }

  const Model m_;
  cudaStream_t stream_;
  int64_t batch_;
  const Workspace w_;
  char* base_;
  std::unique_ptr<ManyRows> many_[2];  // on stream_ and on side_
  std::unique_ptr<Step> step_;
  std::unique_ptr<Graph> push_, one_, several_;  // one_, several_: tokens, drawn first
  cudaEvent_t events_[kEvents + 1] = {};
  cudaEvent_t& meeting_ = events_[kEvents];  // of the two streams
  cudaStream_t side_ = nullptr;
  bool forked_ = false;  // the two streams go their own ways
  uint64_t piece_ = 0;

  std::vector<SequenceState> device_;  // what the device's states are once all is done
  std::vector<uint8_t> stops_;
  int32_t* ring_ = nullptr;
  StagedIds staged_;                  // of prompts
  int64_t expected_ = 0;              // pushes still to come that are enqueued with their draws
  int64_t to_launch_ = 0;             // of the expected draws
  int64_t launched_ = 0, taken_ = 0;  // draws
  bool drawn_ = false;                // tokens were drawn and not pushed yet
};

}  // namespace
}  // namespace cuda

std::unique_ptr<Backend> make_cuda_backend(const Config& config, const Weights& weights,
                                           const CachePlan& plan, Arena arena,
                                           const EngineOptions& options) {
  return std::make_unique<cuda::CudaBackend>(config, weights, plan, arena, options);
}

}  // namespace tlinformer
