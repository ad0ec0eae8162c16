// Native methods of dev.gemmaedge.engine.Native on LiteRT-LM's C API. Nothing is kept here: Java holds every handle.
#include <jni.h>
#include <stdint.h>

#include "litert_lm_app.h"

#define METHOD(type, name) JNIEXPORT type JNICALL Java_dev_gemmaedge_engine_Native_##name

static JavaVM* machine;
static jmethodID on_piece;

JNIEXPORT jint JNICALL JNI_OnLoad(JavaVM* vm, void* unused) {
  (void)unused;
  JNIEnv* env;
  if ((*vm)->GetEnv(vm, (void**)&env, JNI_VERSION_1_6) != JNI_OK) return JNI_ERR;
  jclass listener = (*env)->FindClass(env, "dev/gemmaedge/engine/Native$Listener");
  if (!listener) return JNI_ERR;
  on_piece = (*env)->GetMethodID(env, listener, "piece", "([BZ[B)V");
  if (!on_piece) return JNI_ERR;
  machine = vm;
  litert_lm_set_min_log_level(kLogError);
  return JNI_VERSION_1_6;
}

// Throws with what the engine says of itself, or `what`; ASCII, as JNI wants it.
static void refuse(JNIEnv* env, const char* what) {
  static const char unknown = '?';
  char text[512];
  const char* said = litert_lm_get_last_error_message();
  if (!said || !*said) said = what;
  size_t size = 0;
  for (; said[size] && size < sizeof text - 1; size++)
    text[size] = said[size] >= ' ' && said[size] <= '~' ? said[size] : unknown;
  text[size] = 0;
  jclass kind = (*env)->FindClass(env, "dev/gemmaedge/engine/EngineException");
  if (kind) (*env)->ThrowNew(env, kind, text);
}

// Text of a Java array that ends with a zero byte; NULL after an OutOfMemoryError, or where it has none.
static char* text_of(JNIEnv* env, jbyteArray array) {
  return array ? (char*)(*env)->GetByteArrayElements(env, array, NULL) : NULL;
}

static void release(JNIEnv* env, jbyteArray array, char* text) {
  if (text) (*env)->ReleaseByteArrayElements(env, array, (jbyte*)text, JNI_ABORT);
}

static void* pointer(jlong handle) { return (void*)(intptr_t)handle; }

static jbyteArray bytes_of(JNIEnv* env, const char* text) {
  if (!text) return NULL;
  jsize size = 0;
  while (text[size]) size++;
  jbyteArray array = (*env)->NewByteArray(env, size);
  if (array) (*env)->SetByteArrayRegion(env, array, 0, size, (const jbyte*)text);
  return array;
}

// On a thread of the engine. Java must see neither an exception left behind nor a thread that ends attached.
static void stream(void* listener, const LiteRtLmStreamChunk* chunk) {
  JNIEnv* env;
  int attached = (*machine)->GetEnv(machine, (void**)&env, JNI_VERSION_1_6) == JNI_OK;
  // The NDK's header has JNIEnv** here, the JDK's void**.
  if (!attached && (*machine)->AttachCurrentThread(machine, (void*)&env, NULL) != JNI_OK) return;
  jbyteArray json = bytes_of(env, litert_lm_stream_chunk_get_text(chunk));
  jbyteArray error = bytes_of(env, litert_lm_stream_chunk_get_error(chunk));
  (*env)->CallVoidMethod(env, (jobject)listener, on_piece, json, (jboolean)litert_lm_stream_chunk_is_final(chunk), error);
  if ((*env)->ExceptionCheck(env)) (*env)->ExceptionClear(env);
  if (json) (*env)->DeleteLocalRef(env, json);
  if (error) (*env)->DeleteLocalRef(env, error);
  if (!attached) (*machine)->DetachCurrentThread(machine);
}

METHOD(jlong, load)
(JNIEnv* env, jclass self, jbyteArray path_bytes, jint fd, jbyteArray cache_bytes, jint threads, jint context,
 jboolean sees, jboolean hears, jint prompt, jint decode) {
  (void)self;
  char* path = text_of(env, path_bytes);
  char* cache = text_of(env, cache_bytes);
  LiteRtLmEngine* engine = NULL;
  const char* vision = sees ? "cpu" : NULL;
  const char* audio = hears ? "cpu" : NULL;
  LiteRtLmEngineSettings* settings =
      fd >= 0 ? litert_lm_engine_settings_create_from_raw_file_descriptor(fd, "cpu", vision, audio)
              : litert_lm_engine_settings_create(path, "cpu", vision, audio);
  if (settings) {
    if (cache && *cache) litert_lm_engine_settings_set_cache_dir(settings, cache);
    litert_lm_engine_settings_set_num_threads(settings, threads);
    litert_lm_engine_settings_set_max_num_tokens(settings, context);
    litert_lm_engine_settings_enable_benchmark(settings);  // the engine's own clock; alone it changes no answer
    if (prompt > 0) {
      litert_lm_engine_settings_set_num_prefill_tokens(settings, prompt);
      litert_lm_engine_settings_set_num_decode_tokens(settings, decode);
    }
    engine = litert_lm_engine_create(settings);
    litert_lm_engine_settings_delete(settings);
  }
  release(env, path_bytes, path);
  release(env, cache_bytes, cache);
  if (!engine) refuse(env, "the model cannot be loaded");
  return (jlong)(intptr_t)engine;
}

METHOD(void, unload)(JNIEnv* env, jclass self, jlong engine) {
  (void)env, (void)self;
  litert_lm_engine_delete(pointer(engine));
}

METHOD(jlong, hold)(JNIEnv* env, jclass self, jobject listener) {
  (void)self;
  return (jlong)(intptr_t)(*env)->NewGlobalRef(env, listener);
}

METHOD(void, letGo)(JNIEnv* env, jclass self, jlong listener) {
  (void)self;
  (*env)->DeleteGlobalRef(env, (jobject)pointer(listener));
}

// The engine's greedy sampler is not implemented: the likeliest of one is the same.
static LiteRtLmSessionConfig* session_config(int top_k, float top_p, float temperature, int seed) {
  LiteRtLmSamplerParams* sampler = litert_lm_sampler_params_create(kTopP);
  litert_lm_sampler_params_set_top_k(sampler, top_k);
  litert_lm_sampler_params_set_top_p(sampler, top_p);
  litert_lm_sampler_params_set_temperature(sampler, temperature);
  litert_lm_sampler_params_set_seed(sampler, seed);
  LiteRtLmSessionConfig* config = litert_lm_session_config_create();
  litert_lm_session_config_set_sampler_params(config, sampler);
  litert_lm_sampler_params_delete(sampler);
  return config;
}

METHOD(jlong, converse)
(JNIEnv* env, jclass self, jlong engine, jbyteArray system_bytes, jbyteArray history_bytes, jint top_k, jfloat top_p,
 jfloat temperature, jint seed, jint most) {
  (void)self;
  char* system = text_of(env, system_bytes);
  char* history = text_of(env, history_bytes);
  LiteRtLmSessionConfig* session = session_config(top_k, top_p, temperature, seed);
  litert_lm_session_config_set_max_output_tokens(session, most);
  LiteRtLmConversationConfig* config = litert_lm_conversation_config_create();
  litert_lm_conversation_config_set_session_config(config, session);
  if (system && *system) litert_lm_conversation_config_set_system_message(config, system);
  if (history && history[0] == '[' && history[1] != ']') litert_lm_conversation_config_set_messages(config, history);
  LiteRtLmConversation* conversation = litert_lm_conversation_create(pointer(engine), config);
  litert_lm_conversation_config_delete(config);
  litert_lm_session_config_delete(session);
  release(env, system_bytes, system);
  release(env, history_bytes, history);
  if (!conversation) refuse(env, "no conversation");
  return (jlong)(intptr_t)conversation;
}

METHOD(void, end)(JNIEnv* env, jclass self, jlong conversation) {
  (void)env, (void)self;
  litert_lm_conversation_delete(pointer(conversation));
}

METHOD(void, send)(JNIEnv* env, jclass self, jlong conversation, jbyteArray message_bytes, jlong listener) {
  (void)self;
  char* message = text_of(env, message_bytes);
  if (!message) return;
  int code = litert_lm_conversation_send_message_stream(pointer(conversation), message, NULL, NULL, stream,
                                                        pointer(listener));
  release(env, message_bytes, message);
  if (code) refuse(env, "the message was refused");
}

METHOD(void, cancel)(JNIEnv* env, jclass self, jlong conversation) {
  (void)env, (void)self;
  litert_lm_conversation_cancel_process(pointer(conversation));
}

METHOD(jint, tokens)(JNIEnv* env, jclass self, jlong conversation) {
  (void)env, (void)self;
  return litert_lm_conversation_get_token_count(pointer(conversation));
}

static jdoubleArray doubles(JNIEnv* env, const jdouble* values, jsize count) {
  jdoubleArray array = (*env)->NewDoubleArray(env, count);
  if (array) (*env)->SetDoubleArrayRegion(env, array, 0, count, values);
  return array;
}

METHOD(jdoubleArray, figures)(JNIEnv* env, jclass self, jlong conversation) {
  (void)self;
  jdouble values[3] = {0, 0, 0};
  LiteRtLmBenchmarkInfo* info = litert_lm_conversation_get_benchmark_info(pointer(conversation));
  if (info) {
    int prefill = litert_lm_benchmark_info_get_num_prefill_turns(info) - 1;
    int decode = litert_lm_benchmark_info_get_num_decode_turns(info) - 1;
    if (prefill >= 0) values[2] = litert_lm_benchmark_info_get_prefill_token_count_at(info, prefill);
    if (decode >= 0) {
      values[0] = litert_lm_benchmark_info_get_decode_token_count_at(info, decode);
      values[1] = litert_lm_benchmark_info_get_decode_tokens_per_sec_at(info, decode);
    }
    litert_lm_benchmark_info_delete(info);
  }
  return doubles(env, values, 3);
}

METHOD(jdoubleArray, repeat)(JNIEnv* env, jclass self, jlong engine, jint prompt, jint decode) {
  (void)self;
  jdouble values[3] = {0, 0, 0};
  LiteRtLmSessionConfig* config = session_config(1, 1, 1, 0);
  // With a template the model's turn would be a second prefill, filled up to `prompt` tokens as well.
  litert_lm_session_config_set_apply_prompt_template(config, 0);
  LiteRtLmSession* session = litert_lm_engine_create_session(pointer(engine), config);
  litert_lm_session_config_delete(config);
  if (!session) {
    refuse(env, "no session");
    return NULL;
  }
  LiteRtLmInputData* input = litert_lm_input_data_create(kInputText, "The", 3);  // the engine fills it up
  const LiteRtLmInputData* inputs[1];
  inputs[0] = input;
  LiteRtLmResponses* responses = litert_lm_session_generate_content(session, inputs, 1);
  litert_lm_input_data_delete(input);
  int measured = 0;
  if (responses) {
    litert_lm_responses_delete(responses);
    LiteRtLmBenchmarkInfo* info = litert_lm_session_get_benchmark_info(session);
    if (info) {
      measured = litert_lm_benchmark_info_get_num_prefill_turns(info) == 1 &&
                 litert_lm_benchmark_info_get_num_decode_turns(info) == 1 &&
                 litert_lm_benchmark_info_get_prefill_token_count_at(info, 0) == prompt &&
                 litert_lm_benchmark_info_get_decode_token_count_at(info, 0) == decode;
      if (measured) {
        values[0] = 1e9 * prompt / litert_lm_benchmark_info_get_prefill_tokens_per_sec_at(info, 0);
        values[1] = 1e9 * decode / litert_lm_benchmark_info_get_decode_tokens_per_sec_at(info, 0);
        values[2] = 1e9 * litert_lm_benchmark_info_get_time_to_first_token(info);
      }
      litert_lm_benchmark_info_delete(info);
    }
  }
  litert_lm_session_delete(session);
  if (!measured) {
    refuse(env, "the engine measured other tokens than were asked for");
    return NULL;
  }
  return doubles(env, values, 3);
}
