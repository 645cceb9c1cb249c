// tlin-generate: continues a prompt, as `tlinformer generate` does, without Python.
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <new>
#include <thread>

#include "tlinformer/checkpoint.h"
#include "tlinformer/engine.h"
#include "tokenizer.h"

using namespace tlinformer;

namespace {

constexpr char kUsage[] =
    "usage: tlin-generate --model DIR --prompt-file FILE [--max-new-tokens N] [--temperature T]\n"
    "                     [--top-k K] [--top-p P] [--seed N] [--threads N]\n"
    "FILE - is standard input; --temperature 0 is greedy\n";

struct Options {
  std::string model, prompt_file;
  int64_t max_new_tokens = 256;
  int threads = 0;
  SamplingParams sampling;
};

Options options_of(int argc, char** argv) {
  Options o;
  o.sampling.temperature = 0.8;
  o.sampling.top_p = 0.95;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (name == "--help" || name == "-h") {
      std::fputs(kUsage, stdout);
      std::exit(0);
    }
    require(i + 1 < argc, name, " needs a value\n", kUsage);
    const std::string value = argv[i + 1];
    const auto number = [&] {
      char* end = nullptr;
      const double x = std::strtod(value.c_str(), &end);
      require(!value.empty() && *end == '\0', name, " is '", value, "'; it must be a number");
      return x;
    };
    if (name == "--model") {
      o.model = value;
    } else if (name == "--prompt-file") {
      o.prompt_file = value;
    } else if (name == "--max-new-tokens") {
      o.max_new_tokens = static_cast<int64_t>(number());
    } else if (name == "--temperature") {
      o.sampling.temperature = number();
    } else if (name == "--top-k") {
      o.sampling.top_k = static_cast<int64_t>(number());
    } else if (name == "--top-p") {
      o.sampling.top_p = number();
    } else if (name == "--seed") {
      number();
      o.sampling.seed = std::strtoull(value.c_str(), nullptr, 10);
    } else if (name == "--threads") {
      o.threads = static_cast<int>(number());
    } else {
      throw InvalidArgument("unknown option " + name + "\n" + kUsage);
    }
  }
  require(!o.model.empty() && !o.prompt_file.empty(), kUsage);
  require(o.max_new_tokens >= 1, "--max-new-tokens is ", o.max_new_tokens,
          "; it must be at least 1");
  if (o.threads == 0) o.threads = static_cast<int>(std::thread::hardware_concurrency());
  return o;
}

std::string read_prompt(const std::string& path) {
  FILE* file = path == "-" ? stdin : std::fopen(path.c_str(), "rb");
  require<FileError>(file != nullptr, path, ": no such file that can be read");
  std::string text;
  char piece[65536];
  while (const size_t n = std::fread(piece, 1, sizeof piece, file)) text.append(piece, n);
  if (file != stdin) std::fclose(file);
  require(!text.empty(), path, " is empty; give at least one character");
  return text;
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// 1234567 -> 1,234,567
std::string grouped(double number) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%.0f", number);
  std::string text = digits;
  for (size_t at = text.size(); at > 3;) text.insert(at -= 3, ",");
  return text;
}

std::string text_of_bytes(double bytes) {
  const char* units[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  for (; bytes >= 1024 && unit < 4; ++unit) bytes /= 1024;
  char text[48];
  std::snprintf(text, sizeof text, unit ? "%.1f %s" : "%.0f %s", bytes, units[unit]);
  return text;
}

// Writes whole characters only: a token may end in the middle of one.
struct TextStream {
  std::string pending;
  void add(const std::string& bytes) {
    pending += bytes;
    size_t whole = pending.size(), back = 0;
    while (back < 3 && back < whole && (pending[whole - 1 - back] & 0xc0) == 0x80) ++back;
    if (back < whole) {
      const auto lead = static_cast<unsigned char>(pending[whole - 1 - back]);
      const size_t length = lead < 0xc0 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
      if (length > back + 1) whole -= back + 1;
    }
    flush(whole);
  }
  void flush(size_t bytes) {
    std::fwrite(pending.data(), 1, bytes, stdout);
    std::fflush(stdout);
    pending.erase(0, bytes);
  }
};

void run(const Options& o) {
  Checkpoint checkpoint(o.model);
  const Tokenizer tokenizer(o.model + "/tokenizer.json");
  const Config& c = checkpoint.config();
  require(tokenizer.vocab_size() <= c.vocab_size, o.model, ": tokenizer.json has ",
          tokenizer.vocab_size(), " tokens, the model ", c.vocab_size,
          "; use the tokenizer that the model was trained with");
  const Tokens prompt = tokenizer.encode(read_prompt(o.prompt_file));
  const DType saved = checkpoint.dtype();
  const DType dtype = saved == DType::float16 ? DType::float32 : saved;
  const int64_t length = static_cast<int64_t>(prompt.size());
  const CachePlan plan = CachePlan::make(c, {length + o.max_new_tokens, 1, dtype});
  constexpr std::align_val_t kAlignment{CachePlan::kAlignment};
  const auto release = [&](void* memory) { ::operator delete(memory, kAlignment); };
  const std::unique_ptr<void, decltype(release)> arena(
      ::operator new(static_cast<size_t>(plan.total_bytes()), kAlignment), release);
  Engine engine(c, checkpoint.weights(dtype), plan, {arena.get(), plan.total_bytes()}, {o.threads});

  const size_t slash = o.model.find_last_not_of('/');
  const std::string trimmed = o.model.substr(0, slash + 1);
  std::fprintf(stderr, "%s: %.1fM parameters, %s, %d threads\n",
               trimmed.substr(trimmed.find_last_of('/') + 1).c_str(),
               static_cast<double>(checkpoint.parameters()) / 1e6, name_of(dtype), o.threads);
  double began = now();
  engine.prefill({prompt});
  const double prefill = now() - began;

  const EngineStats before = engine.stats();
  TextStream stream;
  double generated = 0, sliding = 0, slid = began = now();
  engine.generate(
      o.max_new_tokens, o.sampling,
      [&](int64_t, int32_t token) {
        stream.add(tokenizer.bytes_of(token));
        ++generated;
        slid = now();
        return true;
      },
      [&](double) {
        sliding += now() - slid;
        slid = now();
        return true;
      });
  const double decode = now() - began;
  stream.flush(stream.pending.size());
  std::puts("");
  std::fflush(stdout);

  const EngineStats stats = engine.stats();
  const double cache = static_cast<double>(stats.cache_bytes);
  const double standard = 2.0 * static_cast<double>(size_of(dtype) * c.kv_dim() * c.num_layers() *
                                                    (length + o.max_new_tokens));
  const double tokens = static_cast<double>(length);
  std::fprintf(stderr, "\n  prompt     %s tokens in %.2f s, %s tokens/s\n", grouped(tokens).c_str(),
               prefill, grouped(tokens / prefill).c_str());
  std::fprintf(stderr, "  generated  %s tokens in %.2f s, %s tokens/s", grouped(generated).c_str(),
               decode, grouped(generated / decode).c_str());
  if (sliding > 0) {
    std::fprintf(stderr, " (%s between slides)", grouped(generated / (decode - sliding)).c_str());
  }
  const auto slides = static_cast<double>(stats.slides - before.slides);
  std::fprintf(stderr, "\n  cache      %s hits, %s slide%s",
               grouped(static_cast<double>(stats.hits - before.hits)).c_str(),
               grouped(slides).c_str(), slides == 1 ? "" : "s");
  if (sliding > 0) std::fprintf(stderr, ", %.2f s in all", sliding);
  std::fprintf(stderr, "\n  memory     %s of keys and values; a Transformer's: %s (%.1fx)\n",
               text_of_bytes(cache).c_str(), text_of_bytes(standard).c_str(), standard / cache);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(options_of(argc, argv));
    return 0;
  } catch (const InvalidArgument& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
