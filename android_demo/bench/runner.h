// What the runner's programs share.
#pragma once

enum { kUsage = 2, kBadModel = 3 };

static inline void say(int fd, const char* text) {
  size_t left = strlen(text);
  while (left > 0) {
    ssize_t written = write(fd, text, left);
    if (written <= 0) return;
    text += written;
    left -= (size_t)written;
  }
}

static inline int fail(const char* name, int code, const char* what, const char* why) {
  char line[1024];
  snprintf(line, sizeof line, "%s: error: %s%s%s\n", name, what, *why ? ": " : "", why);
  say(2, line);
  return code;
}

static inline double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}
