/* The C interface from C11: test_c_api <model directory> [cuda]. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tlinformer/tlinformer.h"

#define CHECK(condition)                                                                      \
  do {                                                                                        \
    if (!(condition)) {                                                                       \
      fprintf(stderr, "%s:%d: failed: %s (last error: %s)\n", __FILE__, __LINE__, #condition, \
              tlin_last_error());                                                             \
      exit(1);                                                                                \
    }                                                                                         \
  } while (0)

enum { kPrompt = 300, kNew = 12 };

static int count_tokens(void* user, int64_t sequence, int32_t token) {
  (void)sequence, (void)token;
  return ++*(int*)user < 5;
}

static int never(void* user, double share) { return (void)user, (void)share, 0; }

/* Saved, forked into the second sequence, and generated from again. */
static void check_states(tlin_engine* engine) {
  const char* path = "test_c_api.state";
  const int64_t fork[2] = {0, 0};
  int32_t want[kNew], tokens[2 * kNew];
  CHECK(tlin_engine_save_state(engine, NULL, NULL, 0, NULL, NULL) == TLIN_INVALID_ARGUMENT);
  CHECK(tlin_engine_save_state(engine, path, NULL, 1, NULL, NULL) == TLIN_INVALID_ARGUMENT);
  CHECK(tlin_engine_save_state(engine, path, NULL, 0, never, NULL) == TLIN_INTERRUPTED);
  CHECK(tlin_engine_save_state(engine, path, NULL, 0, NULL, NULL) == TLIN_OK);
  CHECK(tlin_engine_generate(engine, kNew, NULL, want, NULL, NULL, NULL) == TLIN_OK);
  tlin_state_info info;
  tlin_state_info_init(&info);
  CHECK(tlin_state_get_info(path, &info) == TLIN_OK);
  CHECK(info.sequences == 1 && info.longest == kPrompt);
  CHECK(tlin_engine_load_state(engine, path, fork, 2, NULL, NULL) == TLIN_OK);
  CHECK(tlin_engine_generate(engine, kNew, NULL, tokens, NULL, NULL, NULL) == TLIN_OK);
  CHECK(memcmp(tokens, want, sizeof want) == 0);
  CHECK(memcmp(tokens + kNew, want, sizeof want) == 0);
  CHECK(remove(path) == 0);
  CHECK(tlin_engine_load_state(engine, path, NULL, 0, NULL, NULL) == TLIN_FILE_ERROR);
  CHECK(tlin_state_get_info(path, &info) == TLIN_FILE_ERROR);
}

int main(int argc, char** argv) {
  CHECK(argc == 2 || argc == 3);
  tlin_model* model = NULL;
  CHECK(tlin_model_open("/nowhere", &model) == TLIN_FILE_ERROR && model == NULL);
  CHECK(strstr(tlin_last_error(), "/nowhere/config.json: No such file"));
  CHECK(tlin_model_open(NULL, &model) == TLIN_INVALID_ARGUMENT);
  CHECK(tlin_model_open(argv[1], &model) == TLIN_OK);
  tlin_model_info info;
  tlin_model_info_init(&info);
  CHECK(tlin_model_get_info(model, &info) == TLIN_OK);
  CHECK(info.vocab_size == 4096 && info.generation_window == 256 && info.parameters > 7000000);

  tlin_engine_options options;
  tlin_engine_options_init(&options);
  options.max_context = 512;
  options.batch_size = 2;
  options.num_threads = 1;
  options.device = argc == 3 ? TLIN_DEVICE_CUDA : TLIN_DEVICE_CPU;
  tlin_engine* engine = NULL;
  options.size = 4096; /* as a header of the future would say */
  CHECK(tlin_engine_create(model, &options, &engine) == TLIN_INVALID_ARGUMENT);
  CHECK(strstr(tlin_last_error(), "tlin_engine_options.size is 4096"));
  options.size = offsetof(tlin_engine_options, dtype); /* as one of the past would */
  options.memory_limit = 1;
  CHECK(tlin_engine_create(model, &options, &engine) == TLIN_OUT_OF_MEMORY);
  options.memory_limit = 0;
  options.size = sizeof options;
  const int32_t device = options.device;
  options.device = 77;
  CHECK(tlin_engine_create(model, &options, &engine) == TLIN_INVALID_ARGUMENT);
  options.size = offsetof(tlin_engine_options, device); /* of a header that knew the CPU alone */
  CHECK(tlin_engine_create(model, &options, &engine) == TLIN_OK);
  tlin_engine_destroy(engine);
  engine = NULL;
  options.size = sizeof options;
  options.device = device;
  options.device_index = 99;
  CHECK(tlin_engine_create(model, &options, &engine) == TLIN_INVALID_ARGUMENT);
  CHECK(strstr(tlin_last_error(), "device_index is 99"));
  options.device_index = 0;
  CHECK(tlin_engine_create(model, &options, &engine) == TLIN_OK);
  tlin_model_close(model); /* the engine keeps what it needs */

  int32_t prompt[kPrompt], tokens[2 * kNew], again[kNew];
  int64_t lengths[2] = {kPrompt, 3};
  for (int i = 0; i < kPrompt; ++i) prompt[i] = i * i % 4096;
  const int32_t* prompts[2] = {prompt, prompt};
  CHECK(tlin_engine_step(engine, prompt, 0) == TLIN_INVALID_ARGUMENT);
  CHECK(tlin_engine_prefill(engine, prompts, lengths, 3, NULL, NULL) == TLIN_INVALID_ARGUMENT);
  CHECK(tlin_engine_prefill(engine, prompts, lengths, 2, never, NULL) == TLIN_INTERRUPTED);
  CHECK(tlin_engine_prefill(engine, prompts, lengths, 2, NULL, NULL) == TLIN_OK);
  CHECK(tlin_engine_generate(engine, kNew, NULL, tokens, lengths, NULL, NULL) == TLIN_OK);
  CHECK(lengths[0] == kNew && lengths[1] == kNew);

  /* The likeliest of the logits, pushed one at a time, are the greedy tokens. */
  float* logits = malloc(sizeof(float) * (size_t)info.vocab_size);
  lengths[0] = kPrompt;
  CHECK(tlin_engine_prefill(engine, prompts, lengths, 1, NULL, NULL) == TLIN_OK);
  for (int i = 0; i < kNew; ++i) {
    CHECK(tlin_engine_copy_logits(engine, logits, 10) == TLIN_INVALID_ARGUMENT);
    CHECK(tlin_engine_copy_logits(engine, logits, info.vocab_size) == TLIN_OK);
    again[i] = 0;
    for (int32_t id = 1; id < info.vocab_size; ++id) {
      if (logits[id] > logits[again[i]]) again[i] = id;
    }
    CHECK(tlin_engine_step(engine, &again[i], 1) == TLIN_OK);
  }
  CHECK(memcmp(tokens, again, sizeof again) == 0);
  free(logits);

  lengths[0] = kPrompt;
  CHECK(tlin_engine_prefill(engine, prompts, lengths, 1, NULL, NULL) == TLIN_OK);
  check_states(engine);
  CHECK(tlin_engine_prefill(engine, prompts, lengths, 1, NULL, NULL) == TLIN_OK);

  int drawn = 0;
  tlin_sampling sampling;
  tlin_sampling_init(&sampling);
  sampling.top_p = 2;
  CHECK(tlin_engine_generate(engine, 9, &sampling, NULL, NULL, NULL, NULL) ==
        TLIN_INVALID_ARGUMENT);
  sampling.top_p = 0.9;
  sampling.temperature = 0.8;
  CHECK(tlin_engine_generate(engine, 9, &sampling, NULL, lengths, count_tokens, &drawn) == TLIN_OK);
  CHECK(drawn == 5 && lengths[0] == 5);

  tlin_stats stats;
  tlin_stats_init(&stats);
  CHECK(tlin_engine_get_stats(engine, &stats) == TLIN_OK);
  CHECK(stats.sequences == 1 && stats.hits > 0 && stats.slides > 0 && stats.cache_bytes > 0);
  CHECK(tlin_engine_reset(engine) == TLIN_OK);
  tlin_engine_destroy(engine);
  tlin_engine_destroy(NULL);
  tlin_model_close(NULL);
  return strcmp(tlin_version(), "") == 0;
}
