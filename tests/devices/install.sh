#!/bin/sh
# Installs what the tests of devices connect to, on Debian 12 or newer, as root: OpenSSH's server, adb, other
# shells, clang for the Android runner, and a small Debian 13 with AOSP's adbd (140 MB, once). None of them is started here.
#
#   tests/devices/install.sh [FOLDER]    the folder for adbd's Debian, by default $GEMMA_EDGE_ADBD_ROOT or
#                                        /var/cache/gemma-edge/adbd-root, where the tests look for it
set -eu

root=${1:-${GEMMA_EDGE_ADBD_ROOT:-/var/cache/gemma-edge/adbd-root}}

missing=
for pair in ssh:openssh-client /usr/sbin/sshd:openssh-server adb:adb mmdebstrap:mmdebstrap cc:gcc \
  clang:clang-16 ld.lld:lld-16 readelf:binutils busybox:busybox-static mksh:mksh; do
  program=${pair%%:*} package=${pair#*:}
  # Debian 12 has clang and lld under their versions' names.
  command -v "$program" >/dev/null || command -v "$program-16" >/dev/null || missing="$missing $package"
done
if [ -n "$missing" ]; then
  # A server that is installed is otherwise started too.
  policy=/usr/sbin/policy-rc.d
  [ -e "$policy" ] || { printf '#!/bin/sh\nexit 101\n' >"$policy"; chmod +x "$policy"; trap 'rm -f "$policy"' EXIT; }
  apt-get update -qq
  # shellcheck disable=SC2086
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
fi

if [ ! -e "$root/usr/sbin/adbd" ]; then
  # Complete or absent: an interrupted one is made again.
  rm -rf "$root.new"
  mkdir -p "$(dirname "$root")"
  mmdebstrap --variant=minbase --include=adbd,procps --quiet trixie "$root.new" http://deb.debian.org/debian
  mkdir -p "$root.new/data"
  mv "$root.new" "$root"
fi
