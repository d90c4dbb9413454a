#!/usr/bin/env bash
# Keeps a role alive as `actorlearner train` does. Run it, or source it and call the function in the background:
#
#   launch/keep_running.sh NAME COMMAND [ARGUMENT...]
#   keep_running           NAME COMMAND [ARGUMENT...] &
#
# SIGTERM ends the role, which saves first. Only the first is handed on: a role that hears a second one stops at once, and
# Slurm tells every process of a job as well as its script.
#
# COMMAND is started again, with back-off, when it dies. `keep_running` returns the exit code of its last life: 0 when its
# work is done; 64, 65, 73 or 75 when to start it again cannot help (docs/operations.md); 143 after SIGTERM; and that of
# the fifth short life in a row. A function as COMMAND must `exec` the role, or the role will not hear of SIGTERM.

short_life_secs=30 num_short_lives=5 longest_pause_secs=30

# No command substitution here or below: bash 5.2 fails to parse one when a trapped signal comes just then.
log() { printf -- '--- %(%F %T)T %s: %s\n' -1 "$HOSTNAME" "$*" >&2; }

# Returns the exit code of a child, also when a trapped signal cuts the waiting short.
await() { # PID
  local code
  wait "$1"
  while kill -0 "$1" 2>/dev/null; do wait "$1"; done
  wait "$1" # the shell remembers the code
  code=$?
  return $code
}

keep_running() { # NAME COMMAND [ARGUMENT...]
  local name=$1 child=0 stopping="" code=0 pause=1 short_lives=0 began
  shift
  trap '[ -n "$stopping" ] || [ "$child" -eq 0 ] || kill -TERM "$child" 2>/dev/null; stopping=yes' TERM
  while [ -z "$stopping" ]; do
    began=$SECONDS
    "$@" &
    child=$!
    [ -z "$stopping" ] || kill -TERM "$child" 2>/dev/null # it came before the child had a number
    log "$name is process $child"
    await "$child" && code=0 || code=$?
    log "$name ended with exit code $code after $((SECONDS - began)) s"
    [ -z "$stopping" ] || return "$code"
    case $code in 0 | 64 | 65 | 73 | 75) return "$code" ;; esac
    if [ $((SECONDS - began)) -lt "$short_life_secs" ]; then
      short_lives=$((short_lives + 1))
    else
      short_lives=0 pause=1
    fi
    if [ "$short_lives" -ge "$num_short_lives" ]; then
      log "error: $name died $num_short_lives times within $short_life_secs s of its start, for the reason above."
      return "$code"
    fi
    log "starting $name again in $pause s"
    sleep "$pause" &
    child=$!
    await "$child" || true
    pause=$((pause * 2 < longest_pause_secs ? pause * 2 : longest_pause_secs))
  done
  return 143
}

[ "${BASH_SOURCE[0]}" != "$0" ] || keep_running "$@"
