#!/bin/sh
# Fetches what build.sh needs beyond Debian 12's own packages: dx and the Android 6 framework, 14.6 MB of Debian 11's
# packages, checked by apt and unpacked into a folder. Nothing is installed.
#
#   tools.sh [FOLDER]    by default $ANDROID_TOOLS or /var/cache/gemma-edge/android-tools
set -eu

folder=${1:-${ANDROID_TOOLS:-/var/cache/gemma-edge/android-tools}}
[ ! -e "$folder/usr/share/java/com.android.dx.jar" ] || exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/root"
echo 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bullseye main' \
  >"$work/sources"
cat >"$work/apt.conf" <<END
Dir::Etc::sourcelist "$work/sources";
Dir::Etc::sourceparts "-";
Dir::State::lists "$work/lists";
Dir::State::status "/dev/null";
Dir::Cache "$work/cache";
APT::Sandbox::User "";
Acquire::http::Timeout "30";
Acquire::Retries "2";
END
APT_CONFIG=$work/apt.conf
export APT_CONFIG
apt-get update -qq
(cd "$work" && apt-get download -qq dalvik-exchange libandroid-23-java)
for package in "$work"/*.deb; do dpkg-deb -x "$package" "$work/root"; done
# Complete or absent: an interrupted one is made again.
rm -rf "$folder"
mkdir -p "$(dirname "$folder")"
mv "$work/root" "$folder"
