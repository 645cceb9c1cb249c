// tlinformer.h over the C++ engine: every call catches what it throws.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "place.h"
#include "tlinformer/checkpoint.h"
#include "tlinformer/engine.h"
#include "tlinformer/state.h"
#include "tlinformer/tlinformer.h"

using namespace tlinformer;

struct tlin_model {
  std::shared_ptr<Checkpoint> checkpoint;
};

namespace {

thread_local std::string last_error;

tlin_status failed(tlin_status status, const char* text) noexcept {
  try {
    last_error = text;
  } catch (...) {
    last_error.clear();
  }
  return status;
}

template <class Call>
tlin_status guarded(const Call& call) noexcept {
  try {
    call();
    return TLIN_OK;
  } catch (const InvalidArgument& error) {
    return failed(TLIN_INVALID_ARGUMENT, error.what());
  } catch (const OutOfMemory& error) {
    return failed(TLIN_OUT_OF_MEMORY, error.what());
  } catch (const Interrupted& error) {
    return failed(TLIN_INTERRUPTED, error.what());
  } catch (const FileError& error) {
    return failed(TLIN_FILE_ERROR, error.what());
  } catch (const NumericalError& error) {
    return failed(TLIN_NUMERICAL_ERROR, error.what());
  } catch (const std::bad_alloc&) {
    return failed(TLIN_OUT_OF_MEMORY, "the system gave no more memory");
  } catch (const std::exception& error) {
    return failed(TLIN_INTERNAL_ERROR, error.what());
  } catch (...) {
    return failed(TLIN_INTERNAL_ERROR, "an unknown exception");
  }
}

template <class Pointer>
void given(Pointer pointer, const char* name) {
  require(pointer != nullptr, name, " is NULL");
}

// How many bytes of a caller's struct both sides know.
template <class T>
size_t known_bytes(const T& theirs, const char* name) {
  require(theirs.size >= sizeof(size_t) && theirs.size <= sizeof(T), name, ".size is ", theirs.size,
          "; call ", name, "_init, and use a library (this one is ", tlin_version(), ", with ",
          sizeof(T), ") at least as new as the header");
  return theirs.size;
}

// A struct of an older header lacks fields; they keep their defaults.
template <class T>
T read(const T* theirs, void (*init)(T*), const char* name) {
  given(theirs, name);
  T mine;
  init(&mine);
  std::memcpy(&mine, theirs, known_bytes(*theirs, name));
  return mine;
}

template <class T>
void write(T mine, T* theirs, const char* name) {
  given(theirs, name);
  mine.size = known_bytes(*theirs, name);
  std::memcpy(theirs, &mine, mine.size);
}

DType dtype_of(const tlin_engine_options& o, DType saved) {
  if (o.dtype == TLIN_DTYPE_FLOAT32) return DType::float32;
  if (o.dtype == TLIN_DTYPE_BFLOAT16) return DType::bfloat16;
  if (o.dtype == TLIN_DTYPE_FLOAT16) return DType::float16;
  require(o.dtype == TLIN_DTYPE_AUTO, "dtype is ", o.dtype, "; it must be a tlin_dtype, 0 to 3");
  if (o.device == TLIN_DEVICE_CUDA) return saved == DType::float32 ? DType::bfloat16 : saved;
  return saved == DType::float16 ? DType::float32 : saved;
}

CachePlan plan_of(Checkpoint& checkpoint, const tlin_engine_options& o) {
  require(o.device == TLIN_DEVICE_CPU || o.device == TLIN_DEVICE_CUDA, "device is ", o.device,
          "; it must be a tlin_device, 0 or 1");
  const Device device = o.device == TLIN_DEVICE_CUDA ? Device::cuda : Device::cpu;
  const DType dtype = dtype_of(o, checkpoint.dtype());
  return CachePlan::make(checkpoint.config(),
                         {o.max_context, o.batch_size, dtype, o.memory_limit, device});
}

std::unique_ptr<c_api::Place> place_of(const tlin_engine_options& o) {
#if defined(TLINFORMER_CUDA)
  if (o.device == TLIN_DEVICE_CUDA) return c_api::make_cuda_place(o.device_index);
#endif
  require(o.device_index == 0, "device_index is ", o.device_index, "; the CPU is one device, 0");
  return c_api::make_cpu_place();
}

Progress progress_of(tlin_progress progress, void* user) {
  if (!progress) return {};
  return [=](double share) { return progress(user, share) != 0; };
}

std::vector<int64_t> chosen_of(const int64_t* sequences, int64_t count) {
  require(count >= 0 && (count == 0) == (sequences == nullptr), "count is ", count,
          " and sequences ", sequences ? "not " : "", "NULL; all are 0 and NULL");
  return {sequences, sequences + count};
}

}  // namespace

struct tlin_engine {
  std::shared_ptr<Checkpoint> checkpoint;
  CachePlan plan;  // before the place: it says whether this build has that device
  std::unique_ptr<c_api::Place> place;
  void* arena;
  Engine engine;

  tlin_engine(std::shared_ptr<Checkpoint> from, const tlin_engine_options& o)
      : checkpoint(std::move(from)),
        plan(plan_of(*checkpoint, o)),
        place(place_of(o)),
        arena(place->take(plan.total_bytes())),
        engine(checkpoint->config(),
               place->bring(checkpoint->config(), checkpoint->weights(plan.options().dtype)), plan,
               {arena, plan.total_bytes()}, {o.num_threads, place->stream()}) {}
};

namespace {

// The engine of a handle, on this thread's device.
template <class Handle>
auto& engine_of(Handle* handle) {
  given(handle, "engine");
  handle->place->enter();
  return handle->engine;
}

}  // namespace

const char* tlin_version(void) { return TLINFORMER_VERSION; }
const char* tlin_last_error(void) { return last_error.c_str(); }

void tlin_model_info_init(tlin_model_info* info) { *info = {sizeof *info, 0, 0, 0}; }
void tlin_engine_options_init(tlin_engine_options* options) {
  *options = {sizeof *options, 0, 1, 0, TLIN_DTYPE_AUTO, 0, TLIN_DEVICE_CPU, 0};
}
void tlin_sampling_init(tlin_sampling* sampling) {
  *sampling = {sizeof *sampling, 0, 1, 0, 1, 0, 0, nullptr, 0};
}
void tlin_state_info_init(tlin_state_info* info) { *info = {sizeof *info, 0, 0}; }
void tlin_stats_init(tlin_stats* stats) { *stats = {sizeof *stats, 0, 0, 0, 0, 0}; }

tlin_status tlin_model_open(const char* directory, tlin_model** model) {
  return guarded([&] {
    given(directory, "directory");
    given(model, "model");
    *model = new tlin_model{std::make_shared<Checkpoint>(directory)};
  });
}

void tlin_model_close(tlin_model* model) { delete model; }

tlin_status tlin_model_get_info(const tlin_model* model, tlin_model_info* info) {
  return guarded([&] {
    given(model, "model");
    const Config& c = model->checkpoint->config();
    write({0, c.vocab_size, model->checkpoint->parameters(), c.generation_window}, info,
          "tlin_model_info");
  });
}

tlin_status tlin_engine_create(tlin_model* model, const tlin_engine_options* options,
                               tlin_engine** engine) {
  return guarded([&] {
    given(model, "model");
    given(engine, "engine");
    const auto o = read(options, tlin_engine_options_init, "tlin_engine_options");
    *engine = new tlin_engine(model->checkpoint, o);
  });
}

void tlin_engine_destroy(tlin_engine* engine) {
  if (!engine) return;
  guarded([&] { engine->place->enter(); });
  delete engine;
}

tlin_status tlin_engine_prefill(tlin_engine* engine, const int32_t* const* tokens,
                                const int64_t* lengths, int64_t count, tlin_progress progress,
                                void* user) {
  return guarded([&] {
    Engine& own = engine_of(engine);
    given(tokens, "tokens");
    given(lengths, "lengths");
    const int64_t most = own.plan().options().batch_size;
    require(count >= 1 && count <= most, "count is ", count, "; this engine takes 1 to ", most,
            " prompts (batch_size)");
    std::vector<TokenIds> prompts;
    for (int64_t i = 0; i < count; ++i) {
      require(lengths[i] >= 0, "lengths[", i, "] is ", lengths[i]);
      if (lengths[i] > 0) given(tokens[i], "a prompt");
      prompts.push_back({tokens[i], lengths[i]});
    }
    own.prefill(prompts.data(), count, progress_of(progress, user));
  });
}

tlin_status tlin_engine_step(tlin_engine* engine, const int32_t* tokens, int64_t count) {
  return guarded([&] {
    Engine& own = engine_of(engine);
    given(tokens, "tokens");
    require(count == own.sequences(), "step got ", count, " tokens for ", own.sequences(),
            " sequences; it takes one each");
    own.step(Tokens(tokens, tokens + count));
  });
}

tlin_status tlin_engine_generate(tlin_engine* engine, int64_t max_new_tokens,
                                 const tlin_sampling* sampling, int32_t* tokens, int64_t* lengths,
                                 tlin_on_token on_token, void* user) {
  return guarded([&] {
    Engine& own = engine_of(engine);
    SamplingParams params;
    if (sampling) {
      const auto s = read(sampling, tlin_sampling_init, "tlin_sampling");
      params = {s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty, s.seed, {}};
      require(s.num_stop_token_ids == 0 || (s.num_stop_token_ids > 0 && s.stop_token_ids),
              "num_stop_token_ids is ", s.num_stop_token_ids, ", and stop_token_ids NULL");
      const int32_t* stops = s.stop_token_ids;
      if (stops) params.stop_token_ids.assign(stops, stops + s.num_stop_token_ids);
    }
    TokenSink sink;
    if (on_token) {
      sink = [&](int64_t sequence, int32_t id) { return on_token(user, sequence, id) != 0; };
    }
    const std::vector<Tokens> rows = own.generate(max_new_tokens, params, sink);
    for (size_t i = 0; i < rows.size(); ++i) {
      if (tokens) std::copy(rows[i].begin(), rows[i].end(), tokens + int64_t(i) * max_new_tokens);
      if (lengths) lengths[i] = static_cast<int64_t>(rows[i].size());
    }
  });
}

tlin_status tlin_engine_copy_logits(const tlin_engine* engine, float* to, int64_t count) {
  return guarded([&] {
    const Engine& own = engine_of(engine);
    given(to, "to");
    const int64_t needed = own.sequences() * own.config().vocab_size;
    require(count >= needed, "count is ", count, "; the logits are ", needed, " floats");
    engine->place->fetch(own.logits(), needed, to);
  });
}

tlin_status tlin_engine_save_state(tlin_engine* engine, const char* path, const int64_t* sequences,
                                   int64_t count, tlin_progress progress, void* user) {
  return guarded([&] {
    Engine& own = engine_of(engine);
    given(path, "path");
    own.save_state(path, chosen_of(sequences, count), progress_of(progress, user));
  });
}

tlin_status tlin_engine_load_state(tlin_engine* engine, const char* path, const int64_t* sequences,
                                   int64_t count, tlin_progress progress, void* user) {
  return guarded([&] {
    Engine& own = engine_of(engine);
    given(path, "path");
    own.load_state(path, chosen_of(sequences, count), progress_of(progress, user));
  });
}

tlin_status tlin_state_get_info(const char* path, tlin_state_info* info) {
  return guarded([&] {
    given(path, "path");
    const std::vector<int64_t> lengths = read_state_info(path).lengths;
    write({0, static_cast<int64_t>(lengths.size()),
           *std::max_element(lengths.begin(), lengths.end())},
          info, "tlin_state_info");
  });
}

tlin_status tlin_engine_get_stats(const tlin_engine* engine, tlin_stats* stats) {
  return guarded([&] {
    const Engine& own = engine_of(engine);
    const EngineStats s = own.stats();
    write({0, own.sequences(), s.hits, s.slides, s.prefill_tokens, s.cache_bytes}, stats,
          "tlin_stats");
  });
}

tlin_status tlin_engine_reset(tlin_engine* engine) {
  return guarded([&] { engine_of(engine).reset(); });
}
