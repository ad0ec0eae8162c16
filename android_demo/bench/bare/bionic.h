// What the runner needs of bionic (Android's libc, LP64), where there is no NDK to take its headers from.
#pragma once

#include <stddef.h>

typedef long ssize_t;
typedef int sig_atomic_t;
struct timespec {
  long tv_sec, tv_nsec;
};
enum { O_RDONLY = 0, CLOCK_MONOTONIC = 1, SIGINT = 2 };

int clock_gettime(int clock, struct timespec*);
int close(int);
void _exit(int) __attribute__((noreturn));
void* memchr(const void*, int, size_t);
void* memcpy(void*, const void*, size_t);
int nanosleep(const struct timespec*, struct timespec*);
int open(const char*, int, ...);
ssize_t read(int, void*, size_t);
void* realloc(void*, size_t);
void (*signal(int, void (*)(int)))(int);
int snprintf(char*, size_t, const char*, ...);
char* strchr(const char*, int);
int strcmp(const char*, const char*);
size_t strlen(const char*);
int strncmp(const char*, const char*, size_t);
char* strstr(const char*, const char*);
double strtod(const char*, char**);
long strtol(const char*, char**, int);
ssize_t write(int, const void*, size_t);
