// Saved sequences: what was restored, forked or taken out of a batch goes on as if nothing had
// happened; a file that does not fit is refused and leaves the engine as it was.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>

#include "check.h"
#include "random_model.h"
#include "runtime/hash.h"
#include "tlinformer/engine.h"
#include "tlinformer/state.h"

using namespace tlinformer;

namespace {

Tokens tokens_of(int64_t length, int64_t step = 3) {
  Tokens tokens;
  for (int64_t i = 0; i < length; ++i) tokens.push_back(int32_t((i * i + step * i) % 37));
  return tokens;
}

SamplingParams sampling() {
  SamplingParams s;
  s.temperature = 0.9;
  s.top_p = 0.95;
  s.repetition_penalty = 1.2;
  s.seed = 5;
  return s;
}

struct Folder {
  std::string name = "/tmp/tlinformer-state-XXXXXX";
  Folder() { CHECK(mkdtemp(name.data()) != nullptr); }
  ~Folder() { CHECK(rmdir(name.c_str()) == 0); }  // nothing temporary may be left in it
};

struct File {
  std::string path;
  explicit File(const Folder& folder, const std::string& name = "state")
      : path(folder.name + "/" + name) {}
  ~File() { unlink(path.c_str()); }
  std::string bytes() const {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  void set(const std::string& bytes) const {
    std::ofstream(path, std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
  }
};

void check_continues(Engine& restored, Engine& original, int64_t tokens) {
  CHECK(restored.sequences() == original.sequences());
  const size_t count = size_t(original.sequences() * original.config().vocab_size);
  CHECK(std::equal(original.logits(), original.logits() + count, restored.logits()));
  CHECK(restored.generate(tokens / 2, {}) == original.generate(tokens / 2, {}));
  CHECK(restored.generate(tokens / 2, sampling()) == original.generate(tokens / 2, sampling()));
  CHECK(std::equal(original.logits(), original.logits() + count, restored.logits()));
  CHECK(restored.stats().window_fill == original.stats().window_fill);
}

void test_every_length(const Folder& folder, const Config& config, DType dtype) {
  const RandomModel model(config, dtype);
  const File file(folder);
  for (int64_t length = 1; length <= 14; ++length) {
    // Half of it a prompt, half pushed; the restoring engine has other room and other rests.
    Owned original(model, 40, 1, 1), restored(model, 52, 2, 1);
    restored.engine.prefill({tokens_of(30, 7), tokens_of(3)});
    const Tokens tokens = tokens_of(length);
    original.engine.prefill({Tokens(tokens.begin(), tokens.begin() + (length + 1) / 2)});
    for (int64_t i = (length + 1) / 2; i < length; ++i) {
      original.engine.step({tokens[size_t(i)]});
    }
    original.engine.save_state(file.path);
    const StateInfo info = read_state_info(file.path);
    CHECK(info.lengths == std::vector<int64_t>{length} && info.dtype == dtype);
    CHECK(info.config.hidden_size == config.hidden_size);
    restored.engine.load_state(file.path);
    check_continues(restored.engine, original.engine, 20);
    restored.engine.load_state(file.path);  // again, over what was generated
    restored.engine.save_state(file.path);
    original.engine.load_state(file.path);
    check_continues(restored.engine, original.engine, 10);
  }
}

void test_batches(const Folder& folder, const Config& config) {
  const RandomModel model(config, DType::float32);
  const File file(folder);
  const std::vector<Tokens> prompts{tokens_of(3), tokens_of(16), tokens_of(9)};
  Owned batch(model, 40, 3, 1), other(model, 40, 3, 1), single(model, 40, 1, 1);
  batch.engine.prefill(prompts);
  batch.engine.step({1, 2, 3});
  batch.engine.save_state(file.path);
  other.engine.load_state(file.path);
  check_continues(other.engine, batch.engine, 10);
  batch.engine.load_state(file.path);
  const std::vector<Tokens> together = batch.engine.generate(9, {});
  for (int64_t i = 0; i < 3; ++i) {  // one of a batch, chosen when loading or when saving
    for (bool when_saving : {false, true}) {
      const File one(folder, "one");
      batch.engine.load_state(file.path);
      if (when_saving) batch.engine.save_state(one.path, {i});
      const float* row = batch.engine.logits() + i * config.vocab_size;
      if (when_saving) single.engine.load_state(one.path);
      if (!when_saving) single.engine.load_state(file.path, {i});
      CHECK(std::equal(row, row + config.vocab_size, single.engine.logits()));
      CHECK(single.engine.generate(9, {})[0] == together[size_t(i)]);
    }
  }
  other.engine.load_state(file.path, {1, 1, 1});  // a fork
  const std::vector<Tokens> forked = other.engine.generate(9, {});
  CHECK(forked[1] == forked[0] && forked[2] == forked[0]);
  CHECK(together[1] == forked[0]);
  other.engine.load_state(file.path, {1, 1, 1});
  const std::vector<Tokens> drawn = other.engine.generate(12, sampling());
  CHECK(drawn[0] != drawn[1] && drawn[1] != drawn[2]);  // a random number for each place
  batch.engine.load_state(file.path, {2, 0});           // another order, and saved in a third
  batch.engine.save_state(file.path, {1});
  CHECK(read_state_info(file.path).lengths == std::vector<int64_t>{4});
}

void test_after_an_interrupted_slide(const Folder& folder, const Config& config) {
  const RandomModel model(config, DType::float32);
  const File file(folder);
  Owned original(model, 40, 2, 1), restored(model, 40, 2, 1);
  original.engine.prefill({tokens_of(16), tokens_of(8)});
  const int64_t slides = original.engine.stats().slides;
  check_throws<Interrupted>("interrupted", [&] {  // one has slid, the other is amid it
    original.engine.step({5, 6}, [&](double) { return original.engine.stats().slides == slides; });
  });
  original.engine.save_state(file.path);
  restored.engine.load_state(file.path);
  check_continues(restored.engine, original.engine, 10);
}

// A call that must fail with `part` in its text, and change nothing.
template <class E = InvalidArgument>
void check_refused(Owned& owned, const File& file, const std::string& part,
                   const std::vector<int64_t>& chosen = {}) {
  const std::vector<float> before = owned.logits();
  check_throws<E>(part.c_str(), [&] { owned.engine.load_state(file.path, chosen); });
  CHECK(owned.logits() == before);
}

void test_refusals(const Folder& folder, const Config& config) {
  const RandomModel model(config, DType::float32);
  const File file(folder);
  Owned saver(model, 40, 2, 1), own(model, 20, 1, 1), twin(model, 20, 1, 1);
  check_throws<InvalidArgument>("prefill first", [&] { saver.engine.save_state(file.path); });
  saver.engine.prefill({tokens_of(11), tokens_of(21)});
  check_throws<InvalidArgument>("no sequence 2", [&] { saver.engine.save_state(file.path, {2}); });
  check_throws<FileError>("/nowhere/x", [&] { saver.engine.save_state("/nowhere/x"); });
  check_throws<Interrupted>("interrupted", [&] {
    saver.engine.save_state(file.path, {}, [](double share) { return share < 0.5; });
  });
  CHECK(access(file.path.c_str(), F_OK) != 0);
  saver.engine.save_state(file.path);
  for (Owned* each : {&own, &twin}) each->engine.prefill({tokens_of(6)});
  check_refused(own, file, "2 of its sequences are to be loaded; this engine holds 1 to 1");
  check_refused(own, file, "sequence 1 has 21 tokens; this engine was planned for max_context = 20",
                {1});
  check_refused(own, file, "sequence 2 is not there; it holds 2", {2});
  check_refused(own, file, "sequence -1", {-1});

  saver.engine.save_state(file.path, {0});
  const std::string good = file.bytes();
  for (size_t size = 0; size < good.size(); size += 1 + size / 40) {
    file.set(good.substr(0, size));
    check_refused(own, file, file.path);
  }
  file.set(good + "x");
  check_refused(own, file, "bytes of data; its sequences need");
  for (size_t at = 0; at < good.size(); at += 1 + at / 60) {  // every single bit counts
    std::string bad = good;
    bad[at] = char(bad[at] ^ 1 << at % 8);
    file.set(bad);
    check_refused(own, file, file.path);
  }
  file.set("a text that is no state of any engine");
  check_refused(own, file, "no saved state");
  std::string newer = good;
  const std::string version = R"("version":"1")";
  newer.replace(newer.find(version), version.size(), R"("version":"7")");
  file.set(newer);
  check_refused(own, file, "version 7 of the format");
  file.set(good);
  unlink(file.path.c_str());
  check_refused<FileError>(own, file, "No such file");
  check_throws<FileError>("not a regular file", [&] { own.engine.load_state(folder.name); });

  file.set(good);
  Config narrow = config;
  narrow.history_window = 4;
  RandomModel weights(config, DType::float32);
  weights.storage.back().back() = char(weights.storage.back().back() ^ 1);
  const RandomModel halves(config, DType::bfloat16), narrower(narrow, DType::float32);
  Owned other_weights(weights, 20, 1, 1), other_dtype(halves, 20, 1, 1),
      narrowed(narrower, 20, 1, 1);
  for (Owned* each : {&other_weights, &other_dtype, &narrowed}) each->engine.prefill({{1}});
  check_refused(other_weights, file, "other weights");
  check_refused(other_dtype, file, "saved in float32; this engine computes in bfloat16");
  check_refused(narrowed, file, "history_window = 5; this engine's has 4");

  CHECK(own.engine.generate(10, sampling()) == twin.engine.generate(10, sampling()));
  check_throws<Interrupted>("interrupted", [&] {  // while it checks: as it was
    own.engine.load_state(file.path, {}, [](double share) { return share < 0.4; });
  });
  CHECK(own.engine.generate(4, {}) == twin.engine.generate(4, {}));
  check_throws<Interrupted>("interrupted", [&] {  // while it copies: empty
    own.engine.load_state(file.path, {}, [](double share) { return share < 0.6; });
  });
  CHECK(own.engine.sequences() == 0);
  own.engine.load_state(file.path);
  saver.engine.load_state(file.path);
  check_continues(own.engine, saver.engine, 8);
}

void test_hash() {  // the published algorithm's own values
  const auto hash = [](const std::string& text) {
    Hash64 h;
    for (size_t at = 0; at < text.size(); at += 7) {
      const std::string part = text.substr(at, 7);
      h.add(part.data(), int64_t(part.size()));
    }
    return h.hex();
  };
  CHECK(hash("") == "ef46db3751d8e999");
  CHECK(hash("abc") == "44bc2cf5ad770999");
  CHECK(hash("The quick brown fox jumps over the lazy dog") == "0b242d361fda71bc");
}

}  // namespace

int main() {
  const Folder folder;
  test_hash();
  Config config = small_config();
  test_every_length(folder, config, DType::float32);
  test_every_length(folder, config, DType::bfloat16);
  test_batches(folder, config);
  test_after_an_interrupted_slide(folder, config);
  test_refusals(folder, config);
  config.num_blocks = 1;
  config.block_depth = 2;
  config.history_window = Config::kAuto;
  config.variant = Variant::tconstformer;
  test_every_length(folder, config, DType::float32);
  config = small_config();
  config.generation_window = 1;
  test_every_length(folder, config, DType::float32);
}
