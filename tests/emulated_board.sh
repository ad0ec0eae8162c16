#!/bin/sh
# Unpacks a board for tests/test_emulated_board.py: Debian 12 for arm64 with sshd and Python (200 MB), and QEMU 10 from
# Debian 13, since Debian 12's crashes ONNX Runtime. On Debian or with mmdebstrap, as root. Nothing is installed.
#
#   tests/emulated_board.sh [FOLDER]    by default $GEMMA_EDGE_BOARD_ROOT or /var/cache/gemma-edge/board
set -eu

folder=${1:-${GEMMA_EDGE_BOARD_ROOT:-/var/cache/gemma-edge/board}}
mirror=http://deb.debian.org/debian
command -v mmdebstrap >/dev/null || { echo 'mmdebstrap is not installed (tests/install.sh)' >&2; exit 1; }
mkdir -p "$folder"

# Complete or absent.
if [ ! -e "$folder/qemu" ]; then
  rm -rf "$folder/qemu.new"
  mmdebstrap --quiet --variant=extract --include=qemu-user trixie "$folder/qemu.new" "$mirror"
  mv "$folder/qemu.new/usr/bin/qemu-aarch64" "$folder/qemu"
  rm -rf "$folder/qemu.new"
fi
if [ ! -e "$folder/root" ]; then
  rm -rf "$folder/root.new"
  programs=dash,coreutils,findutils,grep,sed,util-linux,hostname,base-files,libc-bin,openssh-server,python3,libstdc++6
  mmdebstrap --quiet --variant=extract --arch=arm64 --include="$programs" bookworm "$folder/root.new" "$mirror"
  printf 'root:x:0:0:root:/root:/bin/sh\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n' >"$folder/root.new/etc/passwd"
  printf 'root:x:0:\nnogroup:x:65534:\n' >"$folder/root.new/etc/group"
  mv "$folder/root.new" "$folder/root"
fi
