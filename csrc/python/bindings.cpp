// The engine for Python: pointers come as integers, the GIL is released while it works, and
// Ctrl-C is answered between pieces of work.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>

#include "../cpu/kernels.h"
#include "../runtime/token_ids.h"
#include "tlinformer/checkpoint.h"
#include "tlinformer/engine.h"
#include "tlinformer/state.h"

namespace py = pybind11;
using namespace tlinformer;

namespace {

Weights weights_at(const Config& config, const std::string& dtype, const py::dict& tensors) {
  return make_weights(config, dtype_from_name(dtype), [&](const std::string& name, const auto&) {
    require(tensors.contains(name.c_str()), "tensor '", name, "' is missing from the weights");
    return reinterpret_cast<const void*>(tensors[name.c_str()].cast<uintptr_t>());
  });
}

CachePlanOptions options_of(int64_t max_context, int64_t batch_size, const std::string& dtype,
                            int64_t memory_limit, bool cuda) {
  return {max_context, batch_size, dtype_from_name(dtype), memory_limit,
          cuda ? Device::cuda : Device::cpu};
}

// A C++ callback that first lets Python handle its signals: Ctrl-C raises out of the engine.
// Without a function to call it does so now and then only, since other threads may hold the GIL.
template <class... Args>
std::function<bool(Args...)> callback(py::object function) {
  using Clock = std::chrono::steady_clock;
  return [function = std::move(function), last = Clock::time_point{}](Args... args) mutable {
    if (function.is_none() && Clock::now() - last < std::chrono::milliseconds(20)) return true;
    last = Clock::now();
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (function.is_none()) return true;
    return !function(args...).is(py::bool_(false));  // anything but False goes on
  };
}

class PyEngine {
 public:
  PyEngine(const Config& config, const std::string& dtype, const py::dict& tensors,
           const CachePlan& plan, uintptr_t arena, int64_t arena_bytes, int num_threads,
           uintptr_t stream)
      : engine_(config, weights_at(config, dtype, tensors), plan,
                {reinterpret_cast<void*>(arena), arena_bytes},
                {num_threads, reinterpret_cast<void*>(stream)}) {}

  // Prompts come as (address, count, whether int64, whether on the engine's device).
  using Ids = std::vector<std::tuple<uintptr_t, int64_t, bool, bool>>;

  void prefill(const Ids& prompts, py::object progress) {
    const auto report = callback<double>(std::move(progress));
    const auto lock = own();
    py::gil_scoped_release release;
    std::vector<TokenIds> ids;
    for (const auto& [at, count, wide, on_device] : prompts) {
      ids.push_back({reinterpret_cast<const void*>(at), count, wide, on_device});
    }
    engine_.prefill(ids.data(), static_cast<int64_t>(ids.size()), report);
  }

  void step(const std::vector<int64_t>& ids) {
    const auto report = callback<double>(py::none());
    const auto lock = own();
    py::gil_scoped_release release;
    step_.clear();
    for (int64_t id : ids) {
      require_token(id, engine_.config().vocab_size, "step");
      step_.push_back(static_cast<int32_t>(id));
    }
    engine_.step(step_, report);
  }

  std::vector<Tokens> generate(int64_t max_new_tokens, const SamplingParams& sampling,
                               py::object on_token, py::object progress) {
    const auto sink = callback<int64_t, int32_t>(std::move(on_token));
    const auto report = callback<double>(std::move(progress));
    const auto lock = own();
    py::gil_scoped_release release;
    return engine_.generate(max_new_tokens, sampling, sink, report);
  }

  void save_state(const std::string& path, const std::vector<int64_t>& chosen,
                  py::object progress) {
    const auto report = callback<double>(std::move(progress));
    const auto lock = own();
    py::gil_scoped_release release;
    engine_.save_state(path, chosen, report);
  }

  void load_state(const std::string& path, const std::vector<int64_t>& chosen,
                  py::object progress) {
    const auto report = callback<double>(std::move(progress));
    const auto lock = own();
    py::gil_scoped_release release;
    engine_.load_state(path, chosen, report);
  }

  // Copies the logits, (sequences, V) float32, to `to` on the engine's device.
  void copy_logits(uintptr_t to) {
    const auto lock = own();
    engine_.copy_logits(reinterpret_cast<float*>(to));
  }

  void reset() {
    const auto lock = own();
    engine_.reset();
  }
  void meter(bool on) {
    const auto lock = own();
    engine_.meter(on);
  }
  const std::vector<VerbStats>& metered() const { return engine_.metered(); }
  int64_t sequences() const { return engine_.sequences(); }
  EngineStats stats() const { return engine_.stats(); }

 private:
  // An engine serves one call at a time; callbacks must not call back into it either. The GIL is
  // held wherever this flag changes.
  struct Owner {
    bool& busy;
    ~Owner() { busy = false; }
  };
  Owner own() {
    require<Error>(!busy_, "the engine is busy with another call; use one engine per thread");
    busy_ = true;
    return {busy_};
  }

  Engine engine_;
  bool busy_ = false;
  Tokens step_;  // kept, so that a step allocates nothing
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The tlinformer engine (C++); use tlinformer.Engine.";
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const InvalidArgument& e) {
      PyErr_SetString(PyExc_ValueError, e.what());
    } catch (const FileError& e) {
      PyErr_SetString(PyExc_OSError, e.what());
    } catch (const Error& e) {
      PyErr_SetString(PyExc_RuntimeError, e.what());
    }
  });

  py::class_<Config>(m, "Config").def(py::init([](const py::dict& fields) {
    Config c;
    const auto get = [&](const char* name, auto& field) {
      field = fields[name].cast<std::decay_t<decltype(field)>>();
    };
    get("vocab_size", c.vocab_size);
    get("hidden_size", c.hidden_size);
    get("num_attention_heads", c.num_attention_heads);
    get("num_key_value_heads", c.num_key_value_heads);
    get("num_blocks", c.num_blocks);
    get("block_depth", c.block_depth);
    get("generation_window", c.generation_window);
    get("intermediate_size", c.intermediate_size);
    get("rope_theta", c.rope_theta);
    get("layer_norm_eps", c.layer_norm_eps);
    get("history_window_coefficient", c.history_window_coefficient);
    const py::object window = fields["history_window"];
    c.history_window = py::isinstance<py::str>(window) ? Config::kAuto : window.cast<int64_t>();
    c.variant = fields["variant"].cast<std::string>() == "tconstformer" ? Variant::tconstformer
                                                                        : Variant::tlinformer;
    c.validate();
    return c;
  }));

  py::class_<Region>(m, "Region")
      .def_readonly("name", &Region::name)
      .def_readonly("block", &Region::block)
      .def_readonly("layer", &Region::layer)
      .def_readonly("rows", &Region::rows)
      .def_readonly("offset", &Region::offset)
      .def_readonly("bytes", &Region::bytes);

  py::class_<CachePlan>(m, "CachePlan")
      .def(py::init([](const Config& config, int64_t max_context, int64_t batch_size,
                       const std::string& dtype, int64_t memory_limit, bool cuda) {
             return CachePlan::make(config,
                                    options_of(max_context, batch_size, dtype, memory_limit, cuda));
           }),
           py::arg("config"), py::arg("max_context"), py::arg("batch_size"), py::arg("dtype"),
           py::arg("memory_limit"), py::arg("cuda"))
      .def_static("longest_context",
                  [](const Config& config, int64_t max_context, int64_t batch_size,
                     const std::string& dtype, int64_t memory_limit, bool cuda) {
                    return CachePlan::longest_context(
                        config, options_of(max_context, batch_size, dtype, memory_limit, cuda));
                  })
      .def_property_readonly("regions", &CachePlan::regions)
      .def_property_readonly("total_bytes", &CachePlan::total_bytes)
      .def_property_readonly("cache_bytes", &CachePlan::cache_bytes)
      .def("bytes_of", &CachePlan::bytes_of);

  py::class_<SamplingParams>(m, "SamplingParams")
      .def(py::init([](double temperature, int64_t top_k, double top_p, double min_p,
                       double repetition_penalty, uint64_t seed, Tokens stop_token_ids) {
        return SamplingParams{
            temperature, top_k, top_p, min_p, repetition_penalty, seed, std::move(stop_token_ids)};
      }));

  py::class_<EngineStats>(m, "EngineStats")
      .def_readonly("hits", &EngineStats::hits)
      .def_readonly("slides", &EngineStats::slides)
      .def_readonly("prefills", &EngineStats::prefills)
      .def_readonly("prefill_tokens", &EngineStats::prefill_tokens)
      .def_readonly("rows_read", &EngineStats::rows_read)
      .def_readonly("cache_bytes", &EngineStats::cache_bytes)
      .def_readonly("history_length", &EngineStats::history_length)
      .def_readonly("window_fill", &EngineStats::window_fill);

  py::class_<VerbStats>(m, "VerbStats")
      .def_readonly("verb", &VerbStats::verb)
      .def_readonly("calls", &VerbStats::calls)
      .def_readonly("seconds", &VerbStats::seconds)
      .def_readonly("bytes", &VerbStats::bytes)
      .def_readonly("flops", &VerbStats::flops);

  py::class_<PyEngine>(m, "Engine")
      .def(py::init<const Config&, const std::string&, const py::dict&, const CachePlan&, uintptr_t,
                    int64_t, int, uintptr_t>())
      .def("prefill", &PyEngine::prefill)
      .def("step", &PyEngine::step)
      .def("generate", &PyEngine::generate)
      .def("save_state", &PyEngine::save_state)
      .def("load_state", &PyEngine::load_state)
      .def("copy_logits", &PyEngine::copy_logits)
      .def("reset", &PyEngine::reset)
      .def("meter", &PyEngine::meter)
      .def_property_readonly("metered", &PyEngine::metered)
      .def_property_readonly("sequences", &PyEngine::sequences)
      .def_property_readonly("stats", &PyEngine::stats);

  m.def("state_lengths", [](const std::string& path) { return read_state_info(path).lengths; });
  m.def("instruction_set", [] { return cpu::kernels().name; });
#if defined(TLINFORMER_CUDA)
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
}
