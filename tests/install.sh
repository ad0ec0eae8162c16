#!/bin/sh
# Installs the programs that tests use and pip does not bring, each only where it is missing, on Debian 12 or newer,
# as root. Tests skip without theirs. None is started here.
#
#   tests/install.sh [FOLDER]    FOLDER is for a small Debian 13 with AOSP's adbd (140 MB), by default
#                                $GEMMA_EDGE_ADBD_ROOT or /var/cache/gemma-edge/adbd-root, where the tests look for it
#
# What could not be installed is said, and the exit code is 1 then; the rest is there all the same.
set -eu

root=${1:-${GEMMA_EDGE_ADBD_ROOT:-/var/cache/gemma-edge/adbd-root}}
export DEBIAN_FRONTEND=noninteractive
failed=0

missed() {
  echo "tests/install.sh: not installed: $1" >&2
  failed=1
}

install() {
  apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=120 \
    -o Acquire::http::Timeout=30 -o Acquire::Retries=2 "$@" >/dev/null
}

# A program or file, and the packages that have it: the first that this Debian knows is taken.
missing=$(
  while read -r wanted packages; do
    # Debian 12 has clang and lld under their versions' names.
    command -v "$wanted" >/dev/null || command -v "$wanted-16" >/dev/null || [ -e "$wanted" ] || echo "$packages"
  done <<END
ssh openssh-client
/usr/sbin/sshd openssh-server
strace strace
ip iproute2
adb adb
mmdebstrap mmdebstrap
cc gcc
clang clang-16 clang
ld.lld lld-16 lld
readelf binutils
busybox busybox-static
mksh mksh
chromium chromium
javac default-jdk-headless
aapt aapt
apksigner apksigner
zipalign zipalign
dexdump dexdump
/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf fonts-dejavu-core
END
)
if [ -n "$missing" ]; then
  # A server that is installed is otherwise started too.
  policy=/usr/sbin/policy-rc.d
  [ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' >"$policy"; chmod +x "$policy"; trap 'rm -f "$policy"' EXIT; }
  dpkg --configure -a >/dev/null || :  # where an earlier install was interrupted
  apt-get update -qq -o Acquire::http::Timeout=30 -o Acquire::Retries=2 || missed "newer lists of packages"
  chosen=$(echo "$missing" | while read -r packages; do
    for package in $packages; do
      if apt-cache show "$package" >/dev/null 2>&1; then echo "$package"; break; fi
    done || :
  done)
  # One that cannot be had must not keep the others away.
  # shellcheck disable=SC2086
  install $chosen || for package in $chosen; do install "$package" || missed "$package"; done
fi

sh "$(dirname "$0")/../android_demo/tools.sh" || missed "dx and the Android framework (android_demo/tools.sh)"

if [ ! -e "$root/usr/sbin/adbd" ]; then
  # Complete or absent: an interrupted one is made again.
  rm -rf "$root.new"
  mkdir -p "$(dirname "$root")"
  if mmdebstrap --variant=minbase --include=adbd,procps --quiet trixie "$root.new" http://deb.debian.org/debian; then
    mkdir -p "$root.new/data"
    mv "$root.new" "$root"
  else
    rm -rf "$root.new"
    missed "adbd in $root"
  fi
fi
exit $failed
