/* Hides instruction sets from a process: `LD_PRELOAD=cpuid_mask.so CPUID_MASK=avx2 python ...` computes with the
 * kernels that engines choose on an older CPU, at full speed. tests/on_other_cpus.sh builds and uses it.
 *
 * arch_prctl(ARCH_SET_CPUID, 0) makes every CPUID instruction a SIGSEGV (/proc/cpuinfo: cpuid_fault); the handler
 * executes the instruction and clears bits of the answer. Threads and forks inherit the trap, exec removes it and the
 * preloaded constructor sets it again. CPUID_MASK names the newest set that stays: avx512vnni (hides AMX and AVX-VNNI),
 * avx512 (VNNI too), avx2 (AVX-512 too) or sse4 (AVX, FMA, F16C and BMI too). Exit code 125: the trap is refused.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { SET_CPUID = 0x1012 };
enum { SSE4, AVX2, AVX512, AVX512VNNI };
static const char *const names[] = {"sse4", "avx2", "avx512", "avx512vnni"};
static int newest;

static void hide(unsigned leaf, unsigned subleaf, unsigned r[4]) {
  enum { EAX, EBX, ECX, EDX };
  if (leaf == 1 && newest < AVX2) r[ECX] &= ~(1u << 12 | 1u << 28 | 1u << 29); /* FMA, AVX, F16C */
  if (leaf != 7) return;
  if (subleaf == 0) {
    r[EDX] &= ~(15u << 22); /* AMX, AVX512-FP16 */
    if (newest < AVX512VNNI) r[ECX] &= ~(1u << 11);
    if (newest < AVX512) {
      r[EBX] &= ~(1u << 16 | 1u << 17 | 1u << 21 | 3u << 26 | 1u << 28 | 3u << 30);
      r[ECX] &= ~(1u << 1 | 1u << 6 | 1u << 8 | 1u << 9 | 1u << 10 | 1u << 12 | 1u << 14); /* GFNI, VAES, ... too */
      r[EDX] &= ~(3u << 2 | 1u << 8);
    }
    if (newest < AVX2) r[EBX] &= ~(1u << 3 | 1u << 5 | 1u << 8); /* BMI, AVX2, BMI2 */
  } else if (subleaf == 1) {
    r[EAX] &= ~(1u << 4 | 1u << 21 | 1u << 23); /* AVX-VNNI, AMX-FP16, AVX-IFMA */
    r[EDX] &= ~(1u << 4 | 1u << 5 | 1u << 8 | 1u << 10 | 1u << 19);
    if (newest < AVX512VNNI) r[EAX] &= ~(1u << 5); /* AVX512-BF16 */
  }
}

typedef int Sigaction(int, const struct sigaction *, struct sigaction *);
static Sigaction *real;

static void on_fault(int number, siginfo_t *info, void *context) {
  greg_t *g = ((ucontext_t *)context)->uc_mcontext.gregs;
  (void)info;
  if (memcmp((const void *)g[REG_RIP], "\x0f\xa2", 2)) { /* a fault of its own: die of it */
    struct sigaction action = {.sa_handler = SIG_DFL};
    real(number, &action, NULL);
    return;
  }
  unsigned leaf = g[REG_RAX], subleaf = g[REG_RCX], r[4];
  syscall(SYS_arch_prctl, SET_CPUID, 1);
  __cpuid_count(leaf, subleaf, r[0], r[1], r[2], r[3]);
  syscall(SYS_arch_prctl, SET_CPUID, 0);
  hide(leaf, subleaf, r);
  g[REG_RAX] = r[0], g[REG_RBX] = r[1], g[REG_RCX] = r[2], g[REG_RDX] = r[3];
  g[REG_RIP] += 2;
}

/* Handlers of others (Python's faulthandler, GCC's signal) would lose the trap. */
int sigaction(int number, const struct sigaction *action, struct sigaction *old) {
  if (!real) real = (Sigaction *)dlsym(RTLD_NEXT, "sigaction");
  return real(number, number == SIGSEGV ? NULL : action, old);
}

void (*signal(int number, void (*handler)(int)))(int) {
  struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART}, old;
  return sigaction(number, &action, &old) ? SIG_ERR : old.sa_handler;
}

__attribute__((constructor)) static void begin(void) {
  const char *wanted = getenv("CPUID_MASK");
  struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
  if (!wanted) return;
  for (newest = SSE4; newest < AVX512VNNI && strcmp(wanted, names[newest]); newest++) continue;
  real = (Sigaction *)dlsym(RTLD_NEXT, "sigaction");
  if (strcmp(wanted, names[newest]) || real(SIGSEGV, &action, NULL) || syscall(SYS_arch_prctl, SET_CPUID, 0)) {
    fprintf(stderr, "cpuid_mask: CPUID_MASK=%s: no such set, or this kernel or CPU traps no CPUID\n", wanted);
    _exit(125);
  }
}
