/* The engine for C and for languages that call C; on the CPU or a GPU.
 *
 * Functions return a tlin_status; what went wrong stands in tlin_last_error(). Objects are
 * independent of each other and each serves one thread at a time. Structs begin with their own
 * size, so that a program and a library of different versions understand each other: fill them
 * with their _init function, then change what should differ. */
#ifndef TLINFORMER_TLINFORMER_H_
#define TLINFORMER_TLINFORMER_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define TLIN_API __attribute__((visibility("default")))
#else
#define TLIN_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum tlin_status {
  TLIN_OK = 0,
  TLIN_INVALID_ARGUMENT = 1, /* a value is outside what the call accepts; nothing has changed */
  TLIN_OUT_OF_MEMORY = 2,    /* the cache does not fit */
  TLIN_INTERRUPTED = 3,      /* a progress callback returned 0 */
  TLIN_FILE_ERROR = 4,       /* a file is missing, or cannot be read or written */
  TLIN_NUMERICAL_ERROR = 5,  /* the model produced NaN */
  TLIN_INTERNAL_ERROR = 6
} tlin_status;

typedef enum tlin_dtype {
  /* As the checkpoint is saved. On the CPU float32 if that is float16, on a GPU bfloat16 if that is
   * float32. */
  TLIN_DTYPE_AUTO = 0,
  TLIN_DTYPE_FLOAT32 = 1, /* CPU */
  TLIN_DTYPE_BFLOAT16 = 2,
  TLIN_DTYPE_FLOAT16 = 3 /* GPU */
} tlin_dtype;

typedef enum tlin_device {
  TLIN_DEVICE_CPU = 0,
  TLIN_DEVICE_CUDA = 1 /* of a library built with it; it becomes the calling thread's device */
} tlin_device;

typedef struct tlin_model tlin_model;
typedef struct tlin_engine tlin_engine;

TLIN_API const char* tlin_version(void); /* "0.1.0" */
/* Of this thread's last call that failed; valid until its next one. Never NULL. */
TLIN_API const char* tlin_last_error(void);

/* A model directory: config.json and model.safetensors. An engine keeps its model open, so the two
 * may go in any order. NULL may be closed and destroyed. */
TLIN_API tlin_status tlin_model_open(const char* directory, tlin_model** model);
TLIN_API void tlin_model_close(tlin_model* model);

typedef struct tlin_model_info {
  size_t size;
  int64_t vocab_size;
  int64_t parameters;
  int64_t generation_window; /* tokens between two slides */
} tlin_model_info;
TLIN_API void tlin_model_info_init(tlin_model_info* info);
TLIN_API tlin_status tlin_model_get_info(const tlin_model* model, tlin_model_info* info);

typedef struct tlin_engine_options {
  size_t size;
  int64_t max_context;  /* tokens a sequence may hold, prompt and generated together; no default */
  int64_t batch_size;   /* sequences; 1 */
  int64_t memory_limit; /* bytes that cache and workspace must fit in; 0: unlimited */
  int32_t dtype;        /* a tlin_dtype, of weights and cache */
  int32_t num_threads;  /* of the CPU; 0: as many as OpenMP gives */
  int32_t device;       /* a tlin_device; the CPU */
  int32_t device_index; /* which GPU; 0 */
} tlin_engine_options;
TLIN_API void tlin_engine_options_init(tlin_engine_options* options);

/* Allocates all the memory that the engine will ever use; on a GPU a copy of the weights, too. */
TLIN_API tlin_status tlin_engine_create(tlin_model* model, const tlin_engine_options* options,
                                        tlin_engine** engine);
TLIN_API void tlin_engine_destroy(tlin_engine* engine);

/* Callbacks return 0 to stop. They must not call the engine that calls them, nor throw. */
typedef int (*tlin_progress)(void* user, double share); /* 0 to 1 */
typedef int (*tlin_on_token)(void* user, int64_t sequence, int32_t token);

/* Replaces what was cached by `count` prompts, 1 to batch_size: prompt i is tokens[i], of
 * lengths[i] ids. progress may be NULL; after TLIN_INTERRUPTED the engine is empty. */
TLIN_API tlin_status tlin_engine_prefill(tlin_engine* engine, const int32_t* const* tokens,
                                         const int64_t* lengths, int64_t count,
                                         tlin_progress progress, void* user);

/* Pushes one token onto each of the `count` sequences. */
TLIN_API tlin_status tlin_engine_step(tlin_engine* engine, const int32_t* tokens, int64_t count);

typedef struct tlin_sampling {
  size_t size;
  double temperature;            /* 0, the default: greedy */
  double top_p;                  /* keep the smallest set whose probability reaches p; 1: all */
  double min_p;                  /* drop tokens less likely than min_p times the likeliest; 0 */
  double repetition_penalty;     /* above 1 tokens already there become less likely; 1 */
  int64_t top_k;                 /* keep the k likeliest; 0: all */
  uint64_t seed;                 /* same seed, same tokens */
  const int32_t* stop_token_ids; /* a sequence ends after drawing one of these; may be NULL */
  int64_t num_stop_token_ids;
} tlin_sampling;
TLIN_API void tlin_sampling_init(tlin_sampling* sampling);

/* Draws and pushes up to max_new_tokens tokens on every sequence. sampling may be NULL: greedy.
 * tokens: (sequences, max_new_tokens), lengths: (sequences), how many of a row were drawn; both may
 * be NULL. on_token, if any, gets each token as it is drawn. */
TLIN_API tlin_status tlin_engine_generate(tlin_engine* engine, int64_t max_new_tokens,
                                          const tlin_sampling* sampling, int32_t* tokens,
                                          int64_t* lengths, tlin_on_token on_token, void* user);

/* Copies the logits of the next token, (sequences, vocab_size), to the host; count is the room in
 * floats. */
TLIN_API tlin_status tlin_engine_copy_logits(const tlin_engine* engine, float* to, int64_t count);

/* Writes sequences to a file from which tlin_engine_load_state goes on exactly: the `count` named
 * ones, or all if sequences is NULL and count 0. The file appears once it is complete. progress may
 * be NULL. */
TLIN_API tlin_status tlin_engine_save_state(tlin_engine* engine, const char* path,
                                            const int64_t* sequences, int64_t count,
                                            tlin_progress progress, void* user);
/* Replaces what was cached: sequence i becomes the file's sequence sequences[i]. The same one may
 * be named many times. A file that is damaged or of another model is TLIN_INVALID_ARGUMENT; after
 * TLIN_INTERRUPTED the engine is as it was, or empty. */
TLIN_API tlin_status tlin_engine_load_state(tlin_engine* engine, const char* path,
                                            const int64_t* sequences, int64_t count,
                                            tlin_progress progress, void* user);

typedef struct tlin_state_info {
  size_t size;
  int64_t sequences;
  int64_t longest; /* tokens of the longest one */
} tlin_state_info;
TLIN_API void tlin_state_info_init(tlin_state_info* info);
TLIN_API tlin_status tlin_state_get_info(const char* path, tlin_state_info* info);

typedef struct tlin_stats {
  size_t size;
  int64_t sequences;      /* held now */
  int64_t hits;           /* tokens that read the cache and left the history alone */
  int64_t slides;         /* recomputations of the compressed history */
  int64_t prefill_tokens; /* prompt tokens read */
  int64_t cache_bytes;    /* of keys and values */
} tlin_stats;
TLIN_API void tlin_stats_init(tlin_stats* stats);
TLIN_API tlin_status tlin_engine_get_stats(const tlin_engine* engine, tlin_stats* stats);
TLIN_API tlin_status tlin_engine_reset(tlin_engine* engine); /* forgets sequences and counters */

#ifdef __cplusplus
}
#endif

#endif
