#!/bin/sh
# Builds the app from Debian's packages and the wheel of litert-lm-api: no Gradle, no SDK, no NDK.
#
#   build.sh apk [FILE]       the signed APK; by default where `gemma-edge android install` looks for it
#   build.sh desk FOLDER      the classes and the JNI layer for the Java of this machine, as the tests run them
#
# Needs aapt, apksigner, zipalign, a JDK, clang and lld (Debian 12), and what tools.sh has fetched.
# KEYSTORE=FILE signs with that key (KEYSTORE_PASS, KEY_ALIAS); otherwise with a debug key, which is made once.
# The same sources and key give the same bytes.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
app=$here/app
cache=${GEMMA_EDGE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/gemma-edge}
tools=${ANDROID_TOOLS:-/var/cache/gemma-edge/android-tools}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() { echo "build.sh: error: $1" >&2; exit 1; }
need() { for program in "$@"; do command -v "$program" >/dev/null || fail "no $program (tests/install.sh)"; done; }
first() { for program in "$@"; do command -v "$program" && return; done; return 1; }
property() { sed -n "s/^$1=//p" "$app/version.properties"; }

java_home() {
  home=${JAVA_HOME:-$(dirname "$(dirname "$(readlink -f "$(command -v javac)")")")}
  [ -e "$home/include/jni.h" ] || fail "$home has no include/jni.h"
  echo "$home"
}

# compile OUT OPTIONS... -- FILES...: Java 8, which dx reads.
compile() {
  out=$1
  shift
  mkdir -p "$out"
  javac -encoding UTF-8 -Xlint:all,-options,-deprecation -Werror -source 8 -target 8 -d "$out" "$@" 2>"$work/javac" ||
    { cat "$work/javac" >&2; fail "javac"; }
}

desk() {
  need javac
  cc=$(first "${CC:-cc}" gcc clang) || fail "no C compiler"
  home=$(java_home)
  mkdir -p "$1"
  "$here/bench/build.sh" linux "$1" >/dev/null
  # shellcheck disable=SC2046
  compile "$1/classes" $(find "$app/java/dev/gemmaedge/plain" "$app/java/dev/gemmaedge/engine" "$app/test" -name '*.java' | sort)
  "$cc" -std=c11 -O2 -Wall -Wextra -Werror -shared -fPIC -I"$home/include" -I"$home/include/linux" \
    -o "$1/libgemma_edge.so" "$app/jni/gemma_edge_jni.c" -L"$1" -l:liblitert-lm.so -Wl,-rpath,"\$ORIGIN" \
    -Wl,--allow-shlib-undefined
  echo "$1"
}

# The JNI layer for arm64: it takes nothing of bionic, so neither headers nor a libc to link against are needed.
native() {
  cc=$(first clang clang-20 clang-19 clang-18 clang-17 clang-16) || fail "no clang (tests/install.sh)"
  home=$(java_home)
  mkdir "$work/shim"
  : >"$work/shim/stdio.h"  # which the JDK's jni.h names, and does not use
  "$cc" --target=aarch64-linux-android"$(property minSdk)" -fuse-ld=lld -nostdlib -nostdlibinc -ffreestanding -fPIC \
    -std=c11 -O2 -Wall -Wextra -Werror -shared -ffile-prefix-map="$app"=. -I"$work/shim" -I"$home/include" \
    -I"$home/include/linux" -o "$work/lib/arm64-v8a/libgemma_edge.so" "$app/jni/gemma_edge_jni.c" \
    -L"$work/lib/arm64-v8a" -l:liblitert-lm.so -Wl,-soname,libgemma_edge.so -Wl,-z,max-page-size=16384 -Wl,-z,defs \
    -Wl,--allow-shlib-undefined
}

sign() {
  keystore=${KEYSTORE:-$cache/android/debug.keystore}
  pass=${KEYSTORE_PASS:-android}
  if [ ! -e "$keystore" ]; then
    [ -z "${KEYSTORE:-}" ] || fail "KEYSTORE: no $keystore"
    mkdir -p "$(dirname "$keystore")"
    keytool -genkeypair -keystore "$keystore" -storetype PKCS12 -storepass "$pass" -alias androiddebugkey \
      -dname "CN=Android Debug" -keyalg RSA -keysize 2048 -validity 10000 2>/dev/null
  fi
  set -- ${KEY_ALIAS:+--ks-key-alias "$KEY_ALIAS"}
  PASS=$pass apksigner sign --ks "$keystore" --ks-pass env:PASS "$@" --min-sdk-version "$(property minSdk)" \
    --v1-signing-enabled false --v4-signing-enabled false --out "$work/signed.apk" "$work/plain.apk"
}

apk() {
  need aapt apksigner zipalign javac keytool
  [ -e "$tools/usr/share/java/com.android.dx.jar" ] || fail "no dx in $tools: run $here/tools.sh"
  framework=$tools/usr/share/java/com.android.android-23.jar
  package=$(property package)
  mkdir -p "$work/gen" "$work/lib/arm64-v8a"
  sed "s/<manifest /&package=\"$package\" android:versionCode=\"$(property versionCode)\" android:versionName=\"$(property versionName)\" /" \
    "$app/AndroidManifest.xml" >"$work/AndroidManifest.xml"
  aapt package -m -M "$work/AndroidManifest.xml" -S "$app/res" -I "$framework" -J "$work/gen" --custom-package "$package.app" \
    --min-sdk-version "$(property minSdk)" --target-sdk-version "$(property targetSdk)" -F "$work/resources.apk"
  # shellcheck disable=SC2046
  compile "$work/classes" -bootclasspath "$framework" $(find "$app/java" "$work/gen" -name '*.java' | sort)
  java -cp "$tools/usr/share/java/com.android.dx.jar" com.android.dx.command.Main --dex \
    --min-sdk-version="$(property minSdk)" --output="$work/classes.dex" "$work/classes"
  "$here/bench/build.sh" android "$work/engine" >/dev/null
  mv "$work/engine/liblitert-lm.so" "$work/lib/arm64-v8a"
  native
  "$python" "$app/pack_apk.py" "$work/plain.apk" "$work/resources.apk" "$work/classes.dex" "$work"/lib/arm64-v8a/*.so
  sign
  zipalign -c -p 4 "$work/signed.apk" >/dev/null || fail "zipalign: not aligned"
  mkdir -p "$(dirname "$1")"
  mv "$work/signed.apk" "$1"
  echo "$1"
}

case ${1:-} in
  apk) apk "${2:-$cache/android/gemma-edge.apk}" ;;
  desk) desk "${2:?usage: build.sh desk FOLDER}" ;;
  *) echo "usage: build.sh apk [FILE] | desk FOLDER" >&2; exit 2 ;;
esac
