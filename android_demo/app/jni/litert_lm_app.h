// What the app calls of LiteRT-LM's C API beyond what the programs in bench/ call.
#pragma once

#include "../../bench/litert_lm.h"

// The engine takes the descriptor over. It keeps no file of packed weights then.
LiteRtLmEngineSettings* litert_lm_engine_settings_create_from_raw_file_descriptor(
    int fd, const char* backend, const char* vision_backend, const char* audio_backend);
void litert_lm_session_config_set_max_output_tokens(LiteRtLmSessionConfig*, int);
void litert_lm_conversation_config_set_system_message(LiteRtLmConversationConfig*, const char*);
