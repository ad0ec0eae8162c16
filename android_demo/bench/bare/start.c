// The NDK's crtbegin_dynamic.o, as far as a C program without static constructors needs it: hands the kernel's
// arguments to bionic, which calls main and exits with its result.
int main(int, char**, char**);
void __libc_init(void* arguments, void (*unused)(void), int (*)(int, char**, char**), const void* structors);

// bionic's structors_array_t: three arrays, and since Android 14 their counts. None here.
static const void* const no_structors[6];

__attribute__((used)) static void start(void* arguments) { __libc_init(arguments, 0, main, no_structors); }

__asm__(".globl _start\n_start:\n  mov x29, #0\n  mov x30, #0\n  mov x0, sp\n  b start\n");
