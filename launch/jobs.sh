# shellcheck shell=bash
# For scripts that start roles in the background and wait for them; to be sourced.

# No command substitution where signals are trapped: bash 5.2 fails to parse one when a trapped signal comes just then.
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
