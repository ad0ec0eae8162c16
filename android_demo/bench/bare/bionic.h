// What the runner needs of bionic (Android's libc, LP64), where there is no NDK to take its headers from.
#pragma once

#include <stddef.h>

typedef long ssize_t;
struct timespec {
  long tv_sec, tv_nsec;
};
enum { O_RDONLY = 0, CLOCK_MONOTONIC = 1 };

int clock_gettime(int clock, struct timespec*);
int close(int);
void _exit(int) __attribute__((noreturn));
int open(const char*, int, ...);
ssize_t read(int, void*, size_t);
int snprintf(char*, size_t, const char*, ...);
char* strchr(const char*, int);
size_t strlen(const char*);
int strncmp(const char*, const char*, size_t);
long strtol(const char*, char**, int);
ssize_t write(int, const void*, size_t);
