// The part of LiteRT-LM's C API (c/engine.h, version 0.18) that the runner calls.
#pragma once

#include <stdbool.h>
#include <stddef.h>

typedef struct LiteRtLmEngineSettings LiteRtLmEngineSettings;
typedef struct LiteRtLmEngine LiteRtLmEngine;
typedef struct LiteRtLmSessionConfig LiteRtLmSessionConfig;
typedef struct LiteRtLmSession LiteRtLmSession;
typedef struct LiteRtLmInputData LiteRtLmInputData;
typedef struct LiteRtLmResponses LiteRtLmResponses;
typedef struct LiteRtLmBenchmarkInfo LiteRtLmBenchmarkInfo;
typedef struct LiteRtLmSamplerParams LiteRtLmSamplerParams;
typedef struct LiteRtLmConversationConfig LiteRtLmConversationConfig;
typedef struct LiteRtLmConversation LiteRtLmConversation;
typedef struct LiteRtLmConversationOptionalArgs LiteRtLmConversationOptionalArgs;
typedef struct LiteRtLmStreamChunk LiteRtLmStreamChunk;

enum { kInputText = 0, kTopP = 2, kLogError = 4 };

const char* litert_lm_get_last_error_message(void);
void litert_lm_set_min_log_level(int level);

LiteRtLmEngineSettings* litert_lm_engine_settings_create(
    const char* model_path, const char* backend, const char* vision_backend, const char* audio_backend);
void litert_lm_engine_settings_delete(LiteRtLmEngineSettings*);
void litert_lm_engine_settings_set_max_num_tokens(LiteRtLmEngineSettings*, int);
void litert_lm_engine_settings_set_num_threads(LiteRtLmEngineSettings*, int);
void litert_lm_engine_settings_set_cache_dir(LiteRtLmEngineSettings*, const char*);
// In this mode every prompt is filled up or cut to that many tokens, and decoding stops at no token.
void litert_lm_engine_settings_enable_benchmark(LiteRtLmEngineSettings*);
void litert_lm_engine_settings_set_num_prefill_tokens(LiteRtLmEngineSettings*, int);
void litert_lm_engine_settings_set_num_decode_tokens(LiteRtLmEngineSettings*, int);

LiteRtLmEngine* litert_lm_engine_create(const LiteRtLmEngineSettings*);
void litert_lm_engine_delete(LiteRtLmEngine*);
LiteRtLmSessionConfig* litert_lm_session_config_create(void);
void litert_lm_session_config_set_apply_prompt_template(LiteRtLmSessionConfig*, bool);
void litert_lm_session_config_delete(LiteRtLmSessionConfig*);
LiteRtLmSession* litert_lm_engine_create_session(LiteRtLmEngine*, LiteRtLmSessionConfig*);
void litert_lm_session_delete(LiteRtLmSession*);
LiteRtLmInputData* litert_lm_input_data_create(int type, const void* data, size_t size);
void litert_lm_input_data_delete(LiteRtLmInputData*);
LiteRtLmResponses* litert_lm_session_generate_content(
    LiteRtLmSession*, const LiteRtLmInputData* const* inputs, size_t count);
void litert_lm_responses_delete(LiteRtLmResponses*);

LiteRtLmBenchmarkInfo* litert_lm_session_get_benchmark_info(LiteRtLmSession*);
void litert_lm_benchmark_info_delete(LiteRtLmBenchmarkInfo*);
double litert_lm_benchmark_info_get_time_to_first_token(const LiteRtLmBenchmarkInfo*);
int litert_lm_benchmark_info_get_num_prefill_turns(const LiteRtLmBenchmarkInfo*);
int litert_lm_benchmark_info_get_num_decode_turns(const LiteRtLmBenchmarkInfo*);
int litert_lm_benchmark_info_get_prefill_token_count_at(const LiteRtLmBenchmarkInfo*, int);
int litert_lm_benchmark_info_get_decode_token_count_at(const LiteRtLmBenchmarkInfo*, int);
double litert_lm_benchmark_info_get_prefill_tokens_per_sec_at(const LiteRtLmBenchmarkInfo*, int);
double litert_lm_benchmark_info_get_decode_tokens_per_sec_at(const LiteRtLmBenchmarkInfo*, int);

LiteRtLmSamplerParams* litert_lm_sampler_params_create(int type);
void litert_lm_sampler_params_delete(LiteRtLmSamplerParams*);
void litert_lm_sampler_params_set_temperature(LiteRtLmSamplerParams*, float);
void litert_lm_sampler_params_set_top_k(LiteRtLmSamplerParams*, int);
void litert_lm_sampler_params_set_top_p(LiteRtLmSamplerParams*, float);
void litert_lm_sampler_params_set_seed(LiteRtLmSamplerParams*, int);
void litert_lm_session_config_set_sampler_params(LiteRtLmSessionConfig*, const LiteRtLmSamplerParams*);

LiteRtLmConversationConfig* litert_lm_conversation_config_create(void);
void litert_lm_conversation_config_delete(LiteRtLmConversationConfig*);
void litert_lm_conversation_config_set_session_config(LiteRtLmConversationConfig*, const LiteRtLmSessionConfig*);
void litert_lm_conversation_config_set_messages(LiteRtLmConversationConfig*, const char* json);
LiteRtLmConversation* litert_lm_conversation_create(LiteRtLmEngine*, LiteRtLmConversationConfig*);
void litert_lm_conversation_delete(LiteRtLmConversation*);
LiteRtLmConversationOptionalArgs* litert_lm_conversation_optional_args_create(void);
void litert_lm_conversation_optional_args_delete(LiteRtLmConversationOptionalArgs*);
void litert_lm_conversation_optional_args_set_max_output_tokens(LiteRtLmConversationOptionalArgs*, int);
// Calls back from a thread of the engine; 0 if it will.
int litert_lm_conversation_send_message_stream(
    LiteRtLmConversation*, const char* message, const char* extra_context, const LiteRtLmConversationOptionalArgs*,
    void (*)(void* data, const LiteRtLmStreamChunk*), void* data);
void litert_lm_conversation_cancel_process(LiteRtLmConversation*);
int litert_lm_conversation_get_token_count(LiteRtLmConversation*);
LiteRtLmBenchmarkInfo* litert_lm_conversation_get_benchmark_info(LiteRtLmConversation*);
const char* litert_lm_stream_chunk_get_text(const LiteRtLmStreamChunk*);
const char* litert_lm_stream_chunk_get_error(const LiteRtLmStreamChunk*);
bool litert_lm_stream_chunk_is_final(const LiteRtLmStreamChunk*);
