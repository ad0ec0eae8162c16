# What a device tells of itself: "### NAME" lines, and below each what the system says. POSIX sh; what is
# missing stays empty. Read by facts.py.

section() { echo "### $1"; }
# Files as NAME:CONTENT, the name without its folder's first N letters.
each() { for file in "$@"; do [ -r "$file" ] && echo "$file:$(cat "$file" 2>/dev/null)"; done; }

section uname; uname -s; uname -r; uname -m; uname -n
section os-release; cat /etc/os-release
section getprop; getprop
section cpuinfo; cat /proc/cpuinfo
section meminfo; cat /proc/meminfo
section frequency; each /sys/devices/system/cpu/cpu[0-9]*/cpufreq/cpuinfo_max_freq
section capacity; each /sys/devices/system/cpu/cpu[0-9]*/cpu_capacity
section governor; each /sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor
section thermal; each /sys/class/thermal/thermal_zone*/type /sys/class/thermal/thermal_zone*/temp
section power; each /sys/class/power_supply/*/type /sys/class/power_supply/*/capacity \
  /sys/class/power_supply/*/online /sys/class/power_supply/*/temp
section model; cat /proc/device-tree/model
section df; df -Pk .
# The first that is new enough, or all: Ubuntu 22.04 has 3.10, and 3.11 beside it.
section python
for python in python3 python3.14 python3.13 python3.12 python3.11; do
  command -v "$python" >/dev/null || continue
  "$python" -SE -c 'import struct, sys
print("%d.%d.%d" % sys.version_info[:3], sys.argv[1], 8 * struct.calcsize("P"))
sys.exit(sys.version_info < (3, 11))' "$python" && break
done
section libc; getconf GNU_LIBC_VERSION || ldd --version 2>&1
section thermalservice; ! command -v dumpsys >/dev/null || dumpsys thermalservice
section battery; ! command -v dumpsys >/dev/null || dumpsys battery
section bits; getconf LONG_BIT
section page; getconf PAGESIZE
section swaps; cat /proc/swaps
section cgroups; cat /proc/cgroups
section controllers; cat /sys/fs/cgroup/cgroup.controllers
section boot; ls /boot/firmware/cmdline.txt /boot/cmdline.txt /boot/extlinux/extlinux.conf
section throttled; cat /sys/devices/platform/soc/soc:firmware/get_throttled || vcgencmd get_throttled
section engines; ls -d python-*/lib/python3*/site-packages/*.dist-info
