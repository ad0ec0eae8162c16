// Measures a .litertlm with LiteRT-LM and prints one JSON line; logs are on stderr.
//
//   gemma-bench MODEL.litertlm CACHE_FOLDER PROMPT_TOKENS DECODE_TOKENS REPETITIONS THREADS CONTEXT
//
// The engine is loaded once. A repetition is a new session: PROMPT_TOKENS are prefilled into an empty cache and
// DECODE_TOKENS decoded after them; both are timed by the engine. One unmeasured repetition comes first. Exit code 3
// when the engine refuses the model or counts other tokens than were asked for: then there is no figure.
#ifdef BARE_BIONIC
#include "bare/bionic.h"
#else
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#endif

#include "litert_lm.h"
#include "runner.h"

enum { kMost = 1000 };
static const char kName[] = "gemma-bench";

typedef struct {
  double prefill_ns, decode_ns, first_token_ns;
} Sample;

static Sample samples[kMost];

// Bytes of a line "KEY:  n kB" of a file in /proc; -1 where there is none.
static long proc_bytes(const char* path, const char* key) {
  static char text[16384];
  int fd = open(path, O_RDONLY);
  if (fd < 0) return -1;
  size_t size = 0;
  ssize_t got;
  while (size < sizeof text - 1 && (got = read(fd, text + size, sizeof text - 1 - size)) > 0) size += (size_t)got;
  close(fd);
  text[size] = 0;
  size_t length = strlen(key);
  for (const char* line = text; line; line = strchr(line, '\n')) {
    if (*line == '\n') line++;
    if (strncmp(line, key, length) == 0 && line[length] == ':') return strtol(line + length + 1, NULL, 10) * 1024;
  }
  return -1;
}

// One repetition; 0 when the engine did what was asked for.
static int repeat(LiteRtLmEngine* engine, int prompt, int decode, Sample* sample) {
  static const char text[] = "The";  // filled up to `prompt` tokens by the engine
  LiteRtLmSessionConfig* config = litert_lm_session_config_create();
  // With a template the model's turn would be a second prefill, filled up to `prompt` tokens as well.
  litert_lm_session_config_set_apply_prompt_template(config, false);
  LiteRtLmSession* session = litert_lm_engine_create_session(engine, config);
  litert_lm_session_config_delete(config);
  if (!session) return fail(kName, kBadModel, "no session", litert_lm_get_last_error_message());
  LiteRtLmInputData* input = litert_lm_input_data_create(kInputText, text, sizeof text - 1);
  const LiteRtLmInputData* inputs[] = {input};
  LiteRtLmResponses* responses = litert_lm_session_generate_content(session, inputs, 1);
  if (!responses) return fail(kName, kBadModel, "nothing was generated", litert_lm_get_last_error_message());
  litert_lm_responses_delete(responses);
  litert_lm_input_data_delete(input);

  LiteRtLmBenchmarkInfo* info = litert_lm_session_get_benchmark_info(session);
  if (!info || litert_lm_benchmark_info_get_num_prefill_turns(info) != 1 ||
      litert_lm_benchmark_info_get_num_decode_turns(info) != 1)
    return fail(kName, kBadModel, "the engine measured other than one prefill and one decode", "");
  int prefilled = litert_lm_benchmark_info_get_prefill_token_count_at(info, 0);
  int decoded = litert_lm_benchmark_info_get_decode_token_count_at(info, 0);
  double prefill_rate = litert_lm_benchmark_info_get_prefill_tokens_per_sec_at(info, 0);
  double decode_rate = litert_lm_benchmark_info_get_decode_tokens_per_sec_at(info, 0);
  if (prefilled != prompt || decoded != decode || prefill_rate <= 0 || decode_rate <= 0) {
    char counts[128];
    snprintf(counts, sizeof counts, "%d and %d instead of %d and %d", prefilled, decoded, prompt, decode);
    return fail(kName, kBadModel, "tokens prefilled and decoded", counts);
  }
  sample->prefill_ns = 1e9 * prefilled / prefill_rate;
  sample->decode_ns = 1e9 * decoded / decode_rate;
  sample->first_token_ns = 1e9 * litert_lm_benchmark_info_get_time_to_first_token(info);
  litert_lm_benchmark_info_delete(info);
  litert_lm_session_delete(session);
  return 0;
}

int main(int argc, char** argv) {
  if (argc != 8) return fail(kName, kUsage, "usage", "gemma-bench MODEL CACHE PROMPT DECODE REPETITIONS THREADS CONTEXT");
  int numbers[5];
  for (int i = 0; i < 5; i++) {
    char* end;
    long number = strtol(argv[i + 3], &end, 10);
    if (*end || number < 1 || number > 1 << 20) return fail(kName, kUsage, "not a number above 0", argv[i + 3]);
    numbers[i] = (int)number;
  }
  int prompt = numbers[0], decode = numbers[1], repetitions = numbers[2];
  if (repetitions > kMost) return fail(kName, kUsage, "too many repetitions", argv[5]);

  litert_lm_set_min_log_level(kLogError);
  double start = seconds();
  LiteRtLmEngineSettings* settings = litert_lm_engine_settings_create(argv[1], "cpu", NULL, NULL);
  if (!settings) return fail(kName, kBadModel, argv[1], litert_lm_get_last_error_message());
  litert_lm_engine_settings_set_cache_dir(settings, argv[2]);
  litert_lm_engine_settings_set_num_threads(settings, numbers[3]);
  litert_lm_engine_settings_set_max_num_tokens(settings, numbers[4]);
  litert_lm_engine_settings_enable_benchmark(settings);
  litert_lm_engine_settings_set_num_prefill_tokens(settings, prompt);
  litert_lm_engine_settings_set_num_decode_tokens(settings, decode);
  LiteRtLmEngine* engine = litert_lm_engine_create(settings);
  litert_lm_engine_settings_delete(settings);
  if (!engine) return fail(kName, kBadModel, argv[1], litert_lm_get_last_error_message());
  double load = seconds() - start;

  for (int i = -1; i < repetitions; i++) {
    int code = repeat(engine, prompt, decode, &samples[i < 0 ? 0 : i]);
    if (code) return code;
  }

  char text[512];
  snprintf(text, sizeof text, "{\"load_s\": %.6f, \"n_prompt\": %d, \"n_gen\": %d, \"samples\": [", load, prompt, decode);
  say(1, text);
  for (int i = 0; i < repetitions; i++) {
    snprintf(text, sizeof text, "%s{\"prefill_ns\": %.0f, \"decode_ns\": %.0f, \"ttft_ns\": %.0f}", i ? ", " : "",
             samples[i].prefill_ns, samples[i].decode_ns, samples[i].first_token_ns);
    say(1, text);
  }
  snprintf(text, sizeof text,
           "], \"memory\": {\"rss_anon\": %ld, \"rss_file\": %ld, \"rss_shmem\": %ld, \"pss\": %ld, \"high_water\": %ld}}\n",
           proc_bytes("/proc/self/status", "RssAnon"), proc_bytes("/proc/self/status", "RssFile"),
           proc_bytes("/proc/self/status", "RssShmem"), proc_bytes("/proc/self/smaps_rollup", "Pss"),
           proc_bytes("/proc/self/status", "VmHWM"));
  say(1, text);
  // The engine's own threads need not be waited for: nothing is left to write.
  _exit(0);
}
