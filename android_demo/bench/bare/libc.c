// The names that the runner takes from bionic's libc.so, to link against; on the device the real one is loaded.
#define STUB(name) \
  void name(void) {}
STUB(__libc_init)
STUB(_exit)
STUB(clock_gettime)
STUB(close)
STUB(memcpy)
STUB(memset)
STUB(open)
STUB(read)
STUB(snprintf)
STUB(strchr)
STUB(strlen)
STUB(strncmp)
STUB(strtol)
STUB(write)
