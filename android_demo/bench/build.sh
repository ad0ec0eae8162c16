#!/bin/sh
# Builds the native runner, with the engine beside it.
#
#   build.sh android [FOLDER]    for Android on arm64: by the NDK in $ANDROID_NDK_HOME, or else by clang and lld
#   build.sh linux [FOLDER]      for this machine
#
# FOLDER then holds gemma-bench, gemma-answer and liblitert-lm.so; by default the one where gemma-edge looks. The engine
# comes from the wheel of litert-lm-api, by pip.
set -eu

version=0.18.1
here=$(cd "$(dirname "$0")" && pwd)
target=${1:-}
case $target in
  android) name=android-aarch64 ;;
  linux) name=linux-$(uname -m) ;;
  *) echo "usage: build.sh android|linux [FOLDER]" >&2; exit 2 ;;
esac
out=${2:-${GEMMA_EDGE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/gemma-edge}/runner/$name}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() { echo "build.sh: error: $1" >&2; exit 1; }
first() { for program in "$@"; do command -v "$program" && return; done; return 1; }

python=${PYTHON:-python3}
if [ "$target" = android ]; then
  set -- --platform android_23_arm64_v8a --python-version 3.13
else
  set --
fi
"$python" -m pip download --quiet --disable-pip-version-check --only-binary=:all: --no-deps "$@" \
  --dest "$work" "litert-lm-api==$version" >&2
"$python" -c 'import sys, zipfile
wheel, folder = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive, open(folder + "/liblitert-lm.so", "wb") as file:
    file.write(archive.read("litert_lm/liblitert-lm.so"))' "$work"/litert_lm_api-*.whl "$work"

flags="-std=c11 -O2 -Wall -Wextra -Werror -fPIE -pie -Wl,-rpath,\$ORIGIN -Wl,-z,max-page-size=16384"
ndk=${ANDROID_NDK_HOME:-${ANDROID_NDK_ROOT:-}}
if [ "$target" = linux ]; then
  cc=$(first "${CC:-cc}" gcc clang) || fail "no C compiler"
  # shellcheck disable=SC2086
  link() { "$cc" $flags -D_GNU_SOURCE -o "$1" "$2" -L"$work" -l:liblitert-lm.so -Wl,--allow-shlib-undefined; }
elif [ -n "$ndk" ]; then
  cc=$(first "$ndk"/toolchains/llvm/prebuilt/*/bin/aarch64-linux-android26-clang) || fail "$ndk: no NDK"
  # shellcheck disable=SC2086
  link() { "$cc" $flags -o "$1" "$2" -L"$work" -l:liblitert-lm.so -Wl,--allow-shlib-undefined; }
else
  cc=$(first clang clang-20 clang-19 clang-18 clang-17 clang-16) || fail "no NDK in \$ANDROID_NDK_HOME, and no clang"
  bare="--target=aarch64-linux-android26 -fuse-ld=lld -nostdlib -nostdlibinc -fno-builtin"
  echo 'LIBC { global: *; };' >"$work/version"
  # shellcheck disable=SC2086
  "$cc" $bare -shared -fPIC -Wno-incompatible-library-redeclaration -o "$work/libc.so" "$here/bare/libc.c" \
    -Wl,-soname,libc.so -Wl,--version-script,"$work/version"
  # shellcheck disable=SC2086
  link() {
    "$cc" $bare $flags -DBARE_BIONIC -o "$1" "$2" "$here/bare/start.c" -Wl,--dynamic-linker=/system/bin/linker64 \
      -L"$work" -l:liblitert-lm.so -l:libc.so -Wl,--allow-shlib-undefined
  }
fi
link "$work/gemma-bench" "$here/gemma_bench.c"
link "$work/gemma-answer" "$here/gemma_answer.c"
mkdir -p "$out"
mv "$work/gemma-bench" "$work/gemma-answer" "$work/liblitert-lm.so" "$out"
echo "$out"
