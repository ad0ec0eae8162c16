#!/bin/sh
# Runs tests with the kernels that engines choose on other CPUs.
#
#   tests/on_other_cpus.sh [CPU...] [-- PYTEST ARGUMENT...]
#
#   avx2 avx512 avx512vnni   this x86-64 CPU with newer instruction sets hidden (tests/cpuid_mask.c), at full speed:
#                            the whole suite. Needs cc, and `cpuid_fault` in /proc/cpuinfo.
#   haswell nehalem          x86-64 without AVX-512, without AVX, emulated by QEMU: tests of the engines
#   cortex-a72 cortex-a76    aarch64 of a Raspberry Pi 4 and 5, emulated by QEMU: tests of the engines
#   all                      each of them; without a CPU: avx2 avx512 avx512vnni
#
# `python` is that of the environment that CONTRIBUTING.md sets up. Nothing is installed: QEMU 10 (Debian 12 has 7.2,
# which crashes ONNX Runtime) and an aarch64 Python are unpacked from Debian 13's packages, and wheels of
# constraints.txt beside them, into $GEMMA_EDGE_CPU_ROOTS, by default ~/.cache/gemma-edge/cpus. Needs mmdebstrap.
#
# A CPU that cannot be had here is skipped, with the reason. Exit code 1: tests failed on a CPU.
set -eu

cd "$(dirname "$0")/.."
roots=${GEMMA_EDGE_CPU_ROOTS:-${XDG_CACHE_HOME:-$HOME/.cache}/gemma-edge/cpus}
onnx_tests='tests/test_margins.py tests/test_sampling.py tests/test_kv_cache.py tests/test_onnx_decoder.py'
engine_tests="$onnx_tests tests/test_tflite_text.py tests/test_litert_decoder.py"
packages='numpy onnxruntime sentencepiece jinja2 ai-edge-litert onnx safetensors ml_dtypes tqdm protobuf flatbuffers
  litert-lm-builder litert-lm-api pillow soundfile soxr pytest hypothesis'
mkdir -p "$roots"
roots=$(cd "$roots" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
export PYTHONDONTWRITEBYTECODE=1
export GEMMA_EDGE_CACHE="$work/cache"  # weights packed for one CPU are not for another

skip() {
  echo "$cpu: skipped: $1"
  return 2
}

# Unpacked whole or not at all.
unpack() { # NAME ARCHITECTURE PACKAGES
  [ -e "$roots/$1" ] && return
  command -v mmdebstrap >/dev/null || skip 'mmdebstrap is not installed (tests/install.sh)' || return
  rm -rf "$roots/$1.new"
  mmdebstrap --quiet --variant=extract --arch="$2" --include="$3" trixie "$roots/$1.new" \
    http://deb.debian.org/debian >"$work/mmdebstrap" 2>&1 \
    || skip "mmdebstrap: $(tail -n 1 "$work/mmdebstrap")" || return
  [ -e "$roots/$1.new/lib" ] || ln -s usr/lib "$roots/$1.new/lib"
  mv "$roots/$1.new" "$roots/$1"
}

# A `python` that starts itself, so that the processes of tests are emulated too.
emulated() { # COMMAND PYTHON, the latter of the emulated machine
  mkdir -p "$work/$cpu/bin"
  printf '#!/bin/sh\nexec %s -0 "$0" %s "$@"\n' "$1" "$2" >"$work/$cpu/bin/python"
  printf '#!/bin/sh\nexec "${0%%/*}/python" -m gemma_edge.cli.main "$@"\n' >"$work/$cpu/bin/gemma-edge"
  chmod +x "$work/$cpu/bin/"*
  python="$work/$cpu/bin/python"
}

qemu_x86() { # CPU
  [ "$(uname -m)" = x86_64 ] || skip 'the environment is not of x86-64' || return
  unpack qemu "$(dpkg --print-architecture)" qemu-user || return
  real=$(python -c 'import os, sys; print(os.path.realpath(sys.executable))')
  emulated "$roots/qemu/usr/bin/qemu-x86_64 -cpu $1" "$real"
  site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  export PYTHONPATH="$PWD/src:$site"
  arguments=$engine_tests
}

qemu_aarch64() { # CPU
  unpack qemu "$(dpkg --print-architecture)" qemu-user || return
  unpack arm64 arm64 python3,libstdc++6 || return
  if [ ! -e "$roots/arm64-packages" ]; then
    platforms=$(for glibc in 17 24 27 28 31 34 35 36; do echo "--platform manylinux_2_${glibc}_aarch64"; done)
    # shellcheck disable=SC2086
    python -m pip install --quiet --target "$roots/arm64-packages.new" --platform manylinux2014_aarch64 $platforms \
      --python-version 3.13 --only-binary=:all: -c constraints.txt $packages 2>"$work/pip" \
      || skip "pip: $(tail -n 1 "$work/pip")" || return
    mv "$roots/arm64-packages.new" "$roots/arm64-packages"
  fi
  emulated "$roots/qemu/usr/bin/qemu-aarch64 -cpu $1 -L $roots/arm64" "$roots/arm64/usr/bin/python3"
  export PYTHONPATH="$PWD/src:$roots/arm64-packages"
  arguments=$onnx_tests
}

masked() {
  [ "$(uname -m)" = x86_64 ] || skip 'this is no x86-64' || return
  command -v cc >/dev/null || skip 'no C compiler (tests/install.sh)' || return
  [ -e "$work/cpuid_mask.so" ] || cc -O1 -shared -fPIC -o "$work/cpuid_mask.so" tests/cpuid_mask.c
  python=python arguments=tests
  env CPUID_MASK="$cpu" LD_PRELOAD="$work/cpuid_mask.so" env >/dev/null 2>&1 \
    || skip 'the kernel or the CPU traps no CPUID' || return
  export CPUID_MASK="$cpu" LD_PRELOAD="$work/cpuid_mask.so"
}

on_cpu() ( # in a shell of its own: what it exports stays in it
  case $cpu in
    avx2 | avx512 | avx512vnni) masked ;;
    haswell) qemu_x86 Haswell-noTSX ;;
    nehalem) qemu_x86 Nehalem ;;
    cortex-a72 | cortex-a76) qemu_aarch64 "$cpu" ;;
    *) echo "tests/on_other_cpus.sh: no CPU $cpu" >&2; exit 1 ;;
  esac || exit
  # LiteRT 2.3 ends with an illegal instruction there.
  [ "$cpu" != nehalem ] || arguments=$onnx_tests
  [ $# -eq 0 ] || arguments=
  began=$(date +%s) code=0
  # shellcheck disable=SC2086
  "$python" -m pytest -q -p no:cacheprovider $arguments "$@" || code=1
  echo "$cpu: $(($(date +%s) - began)) s"
  exit $code
)

cpus=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  cpus="$cpus $1"
  shift
done
[ $# -eq 0 ] || shift
case ${cpus:= avx2 avx512 avx512vnni} in
  *' all'*) cpus='avx2 avx512 avx512vnni haswell nehalem cortex-a72 cortex-a76' ;;
esac
failed=0
for cpu in $cpus; do
  code=0
  on_cpu "$@" || code=$?
  case $code in 0 | 2) ;; *) failed=1 ;; esac
done
exit $failed
