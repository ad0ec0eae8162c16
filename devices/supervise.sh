# Runs one program on a device and lets nothing of it stay. POSIX sh with /proc and setsid, as every Linux and
# Android has them; sent there as it is.
#
#   sh supervise.sh run TOKEN LIMIT SILENCE INTERVAL PROGRAM ARGV...
#   sh supervise.sh stop TOKEN
#   sh supervise.sh signal TOKEN NAME
#
# LIMIT, SILENCE: hundredths of a second; INTERVAL: seconds. PROGRAM is looked up before ARGV is started.
# stdin is the connection's pulse: a line now and then. Its end, or SILENCE without a line, ends the program.
# stdout and stderr are the program's. After its end, on stderr:
#   TOKEN over                                                      (what a shell may say of it comes later)
#   TOKEN sample UPTIME RSS_ANON RSS_FILE RSS_SHMEM HIGH_WATER      (seconds, kB)
#   TOKEN end REASON EXIT_CODE STARTED ENDED                        (hundredths of a second of uptime)
# REASON: exit, limit, lost, missing. Without the last line the device, or the way to it, broke.

verb=$1 token=$2
samples=./run-$token

# Sets `now` to the uptime in hundredths of a second: a clock that nobody sets.
tick() {
  read -r now _ </proc/uptime
  now=${now%.*}${now#*.}
}

# Kills whatever carries the token in its environment, in whichever group or session it is by now.
stop() {
  # By its number too: a moment after its start it has neither the group nor the token yet.
  [ -z "$pid" ] || kill -KILL "-$pid" "$pid" 2>/dev/null
  for _ in 1 2 3 4 5; do
    found=$(grep -lszF "GEMMA_EDGE_RUN=$token" /proc/[0-9]*/environ 2>/dev/null)
    [ -n "$found" ] || return 0
    for file in $found; do
      file=${file#/proc/}
      kill -KILL "${file%/environ}" 2>/dev/null
    done
  done
}

sample() {
  anon='' file=0 shmem=0 high=0
  while read -r key value _; do
    case $key in
      RssAnon:) anon=$value ;;
      RssFile:) file=$value ;;
      RssShmem:) shmem=$value ;;
      VmHWM:) high=$value ;;
    esac
  done <"/proc/$pid/status"
  # A process that has ended but was not waited for has no memory to tell.
  [ -z "$anon" ] || echo "$token sample $up $anon $file $shmem $high" >>"$samples"
}

# Watching, and listening below, tell the shell that waits for the program why. They act themselves: it may be dead.
# Not by HUP: where that was ignored from the start, as under nohup, no shell can trap it.
watch() {
  heard=$started pulsed=''
  trap 'pulsed=1' USR1 # no more than that: it may come in the midst of `tick`
  while kill -0 "$pid"; do
    read -r up _ </proc/uptime
    sample
    tick
    [ -z "$pulsed" ] || pulsed='' heard=$now
    [ $((now - started)) -lt "$limit" ] || { kill -s USR2 $$; stop; return; }
    [ $((now - heard)) -lt "$silence" ] || { kill -s TERM $$; stop; return; }
    sleep "$interval"
  done
}

pulse() {
  while read -r _; do kill -s USR1 "$watcher"; done
  kill -s TERM $$; stop
}

pid=''
if [ "$verb" = stop ]; then
  stop
  rm -f "$samples"
  exit
fi

if [ "$verb" = signal ]; then
  for file in $(grep -lszF "GEMMA_EDGE_RUN=$token" /proc/[0-9]*/environ 2>/dev/null); do
    file=${file#/proc/}
    kill -s "$3" "${file%/environ}" 2>/dev/null
  done
  exit 0
fi

limit=$3 silence=$4 interval=$5 program=$6
shift 6
if ! command -v "$program" >/dev/null; then
  echo "$token end missing 127 0 0" >&2
  exit
fi

reason='exit'
trap 'reason=limit; stop' USR2
trap 'reason=lost; stop' HUP INT TERM PIPE
tick
started=$now
exec 3<&0 </dev/null
GEMMA_EDGE_RUN=$token setsid "$@" 3<&- &
pid=$!
# Not before the program, which would inherit it: the first pulse must not kill a watcher that has no trap yet.
trap '' USR1
watch >/dev/null 2>&1 3<&- &
watcher=$!
pulse <&3 >/dev/null 2>&1 &
reader=$!
exec 3<&-

# A signal ends `wait` early, and the program with it: wait again for how it ended.
wait "$pid" 2>/dev/null
code=$?
while kill -0 "$pid" 2>/dev/null; do
  wait "$pid" 2>/dev/null
  code=$?
done
tick
printf '\n%s over\n' "$token" >&2
trap '' HUP INT TERM PIPE USR2
kill -KILL "$watcher" "$reader" 2>/dev/null
stop
cat "$samples" >&2 2>/dev/null
rm -f "$samples"
echo "$token end $reason $code $started $now" >&2
