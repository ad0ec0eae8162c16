// Answers with a .litertlm by LiteRT-LM: requests come as lines on stdin, events go as lines to stdout.
//
//   gemma-answer MODEL.litertlm CACHE_FOLDER THREADS CONTEXT IMAGES AUDIO      (IMAGES, AUDIO: 1 loads that encoder)
//
//   new TEMPERATURE TOP_K TOP_P SEED MESSAGES    begins a conversation after these messages, a JSON list
//   say MAX_TOKENS MESSAGE                       answers a message, a JSON object; MAX_TOKENS 0: the context's room
//   end
//
//   ready SECONDS                                loaded
//   piece MESSAGE                                a piece of the answer, as the engine's JSON
//   done HOW PREFILLED DECODED PREFILL_RATE DECODE_RATE HELD    HOW: end, full or cancelled; rates in tokens a second
//   error TEXT                                   no answer; the next request begins with `new`
//
// stdin may be a file that grows: its end is waited at. SIGINT ends the answer that is being made. Exit code 3 when the
// engine refuses the model.
#ifdef BARE_BIONIC
#include "bare/bionic.h"
#else
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#endif

#include "litert_lm.h"
#include "runner.h"

static const char kName[] = "gemma-answer";

typedef struct {
  char* text;
  size_t size, room;
} Line;

static volatile sig_atomic_t interrupted;
// Set by the engine's thread, which writes the pieces, and read by ours, which writes everything else.
static int over;
static char trouble[1024];

static void on_interrupt(int number) {
  (void)number;
  interrupted = 1;
}

static void nap(void) {
  struct timespec time = {0, 5000000};
  nanosleep(&time, NULL);
}

static void put(Line* line, const char* text, size_t size) {
  if (line->size + size + 1 > line->room) {
    line->room = 2 * (line->size + size + 1);
    line->text = realloc(line->text, line->room);
    if (!line->text) _exit(fail(kName, 1, "no memory for a message", ""));
  }
  memcpy(line->text + line->size, text, size);
  line->size += size;
  line->text[line->size] = 0;
}

// The next line of stdin, without its end.
static void next_line(Line* line) {
  static char held[1 << 16];
  static size_t at, size;
  line->size = 0;
  put(line, "", 0);
  for (;;) {
    while (at == size) {
      ssize_t got = read(0, held, sizeof held);
      at = 0;
      size = got > 0 ? (size_t)got : 0;
      if (!size) nap();
    }
    char* end = memchr(held + at, '\n', size - at);
    size_t taken = (end ? (size_t)(end - held) : size) - at;
    put(line, held + at, taken);
    at += taken + (end != NULL);
    if (end) return;
  }
}

// Writes "WORD TEXT" as one line.
static void tell(const char* word, const char* text) {
  static Line line;
  line.size = 0;
  put(&line, word, strlen(word));
  put(&line, " ", 1);
  put(&line, text, strlen(text));
  for (size_t i = 0; i < line.size; i++)
    if (line.text[i] == '\n') line.text[i] = ' ';
  put(&line, "\n", 1);
  say(1, line.text);
}

static void on_chunk(void* unused, const LiteRtLmStreamChunk* chunk) {
  (void)unused;
  const char* error = litert_lm_stream_chunk_get_error(chunk);
  const char* text = litert_lm_stream_chunk_get_text(chunk);
  if (error)
    snprintf(trouble, sizeof trouble, "%s", *error ? error : "the engine failed");
  else if (text && *text)
    tell("piece", text);
  if (error || litert_lm_stream_chunk_is_final(chunk)) __atomic_store_n(&over, 1, __ATOMIC_RELEASE);
}

// The number at *text, which goes on behind it and the space after it.
static double number(char** text) {
  double value = strtod(*text, text);
  if (**text == ' ') ++*text;
  return value;
}

static LiteRtLmConversation* begin(LiteRtLmEngine* engine, char* text) {
  double temperature = number(&text);
  int top_k = (int)number(&text);
  double top_p = number(&text);
  int seed = (int)number(&text);
  LiteRtLmSamplerParams* sampler = litert_lm_sampler_params_create(kTopP);
  litert_lm_sampler_params_set_temperature(sampler, (float)temperature);
  litert_lm_sampler_params_set_top_k(sampler, top_k);
  litert_lm_sampler_params_set_top_p(sampler, (float)top_p);
  litert_lm_sampler_params_set_seed(sampler, seed);
  LiteRtLmSessionConfig* session = litert_lm_session_config_create();
  litert_lm_session_config_set_sampler_params(session, sampler);
  LiteRtLmConversationConfig* config = litert_lm_conversation_config_create();
  litert_lm_conversation_config_set_session_config(config, session);
  litert_lm_conversation_config_set_messages(config, text);
  LiteRtLmConversation* made = litert_lm_conversation_create(engine, config);
  litert_lm_conversation_config_delete(config);
  litert_lm_session_config_delete(session);
  litert_lm_sampler_params_delete(sampler);
  if (!made) tell("error", litert_lm_get_last_error_message());
  return made;
}

static void answer(LiteRtLmConversation* conversation, char* text) {
  int most = (int)number(&text);
  LiteRtLmConversationOptionalArgs* options = litert_lm_conversation_optional_args_create();
  if (most > 0) litert_lm_conversation_optional_args_set_max_output_tokens(options, most);
  *trouble = 0;
  over = interrupted = 0;
  int refused = litert_lm_conversation_send_message_stream(conversation, text, "{}", options, on_chunk, NULL);
  litert_lm_conversation_optional_args_delete(options);
  if (refused) {
    tell("error", litert_lm_get_last_error_message());
    return;
  }
  for (int told = 0; !__atomic_load_n(&over, __ATOMIC_ACQUIRE); nap()) {
    if (interrupted && !told) litert_lm_conversation_cancel_process(conversation);
    told = interrupted;
  }
  int full = strstr(trouble, "Max number of tokens") != NULL, cancelled = strstr(trouble, "CANCELLED") != NULL;
  if (*trouble && !full && !cancelled) {
    tell("error", trouble);
    return;
  }
  LiteRtLmBenchmarkInfo* info = litert_lm_conversation_get_benchmark_info(conversation);
  int prefill = info ? litert_lm_benchmark_info_get_num_prefill_turns(info) - 1 : -1;
  int decode = info ? litert_lm_benchmark_info_get_num_decode_turns(info) - 1 : -1;
  char line[256];
  snprintf(line, sizeof line, "%s %d %d %.3f %.3f %d", cancelled ? "cancelled" : full ? "full" : "end",
           prefill < 0 ? 0 : litert_lm_benchmark_info_get_prefill_token_count_at(info, prefill),
           decode < 0 ? 0 : litert_lm_benchmark_info_get_decode_token_count_at(info, decode),
           prefill < 0 ? 0 : litert_lm_benchmark_info_get_prefill_tokens_per_sec_at(info, prefill),
           decode < 0 ? 0 : litert_lm_benchmark_info_get_decode_tokens_per_sec_at(info, decode),
           litert_lm_conversation_get_token_count(conversation));
  if (info) litert_lm_benchmark_info_delete(info);
  tell("done", line);
}

int main(int argc, char** argv) {
  if (argc != 7) return fail(kName, kUsage, "usage", "gemma-answer MODEL CACHE THREADS CONTEXT IMAGES AUDIO");
  signal(SIGINT, on_interrupt);
  litert_lm_set_min_log_level(kLogError);
  double start = seconds();
  LiteRtLmEngineSettings* settings = litert_lm_engine_settings_create(
      argv[1], "cpu", *argv[5] == '1' ? "cpu" : NULL, *argv[6] == '1' ? "cpu" : NULL);
  if (!settings) return fail(kName, kBadModel, argv[1], litert_lm_get_last_error_message());
  litert_lm_engine_settings_set_cache_dir(settings, argv[2]);
  litert_lm_engine_settings_set_num_threads(settings, (int)strtol(argv[3], NULL, 10));
  litert_lm_engine_settings_set_max_num_tokens(settings, (int)strtol(argv[4], NULL, 10));
  litert_lm_engine_settings_enable_benchmark(settings);  // without it, nothing counts tokens
  LiteRtLmEngine* engine = litert_lm_engine_create(settings);
  litert_lm_engine_settings_delete(settings);
  if (!engine) return fail(kName, kBadModel, argv[1], litert_lm_get_last_error_message());
  char text[64];
  snprintf(text, sizeof text, "%.3f", seconds() - start);
  tell("ready", text);

  static Line line;
  LiteRtLmConversation* conversation = NULL;
  for (;;) {
    next_line(&line);
    if (strncmp(line.text, "new ", 4) == 0) {
      if (conversation) litert_lm_conversation_delete(conversation);
      conversation = begin(engine, line.text + 4);
    } else if (strncmp(line.text, "say ", 4) == 0) {
      if (conversation)
        answer(conversation, line.text + 4);
      else
        tell("error", "there is no conversation");
    } else {
      break;
    }
  }
  // The engine's own threads need not be waited for: nothing is left to write.
  _exit(*line.text && strcmp(line.text, "end") ? fail(kName, kUsage, "no such request", line.text) : 0);
}
