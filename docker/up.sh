#!/usr/bin/env bash
# Trains in containers as the caller, and exits with the learner's own code; nothing is left running.
set -euo pipefail

case ${1:-} in
  -h | --help)
    cat <<'HELP'
Usage: [EXPERIMENT=NAME] [SETTING=VALUE...] docker/up.sh [--gpu] [FLAG...]

Runs `docker compose -f docker/compose.yaml up FLAG...` with what it writes owned by the caller, and exits with the learner's
exit code, for scripts: `docker compose up` by itself knows only 0 and 1. Ctrl-C and SIGTERM save and stop (130, 143). Stops
all containers at the end; run directory and images stay.

  --gpu     the learner on GPUs: docker/compose.gpu.yaml too
  FLAG      passed on, e.g. --build, --scale collect-actor=8

With TLS_DIR, a directory of `actorlearner certs`, the roles speak mutual TLS: docker/compose.tls.yaml too.

The settings (EXPERIMENT, RUN_DIR, COLLECT_ACTORS, GIN_BINDINGS, ...) are in docs/operations.md, section Docker.
HELP
    exit ;;
esac

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
compose=(docker compose -f "$here/compose.yaml")
if [ "${1:-}" = --gpu ]; then
  compose+=(-f "$here/compose.gpu.yaml")
  shift
fi
if [ -n "${TLS_DIR:-}" ]; then
  TLS_DIR=$(realpath "$TLS_DIR") # compose would look for it below docker/
  export TLS_DIR
  compose+=(-f "$here/compose.tls.yaml")
fi
# root's own runs go to the image's user: the roles never run as root unless RUN_UID=0 asks for it.
if [ "$(id -u)" != 0 ]; then
  export RUN_UID=${RUN_UID:-$(id -u)} RUN_GID=${RUN_GID:-$(id -g)}
fi

# A terminal's Ctrl-C reaches compose as well, which stops the containers, so that the learner saves; a service manager's
# SIGTERM reaches this script alone, and docker does not pass it on to compose in every case. Both are waited for.
asked="" up=""
terminate() {
  asked=143
  "${compose[@]}" stop >/dev/null 2>&1 &
  [ -z "$up" ] || kill -TERM "$up" 2>/dev/null || true
}
trap 'asked=130' INT
trap terminate TERM
status=0
COMPOSE_MENU=false "${compose[@]}" up "$@" & # its menu would keep Ctrl-C to itself
up=$!
[ "$asked" != 143 ] || kill -TERM "$up" 2>/dev/null || true # it came before compose had a number
wait "$up" || status=$?
while [ -n "$asked" ] && kill -0 "$up" 2>/dev/null; do wait "$up" || true; done
if [ -n "$asked" ]; then
  "${compose[@]}" stop >/dev/null 2>&1 || true
  exit "$asked"
fi
# Of those that must succeed, the first that did not tells why; one that was never started says 0 and tells nothing.
code=0
for service in run-directory check learner; do
  container=$("${compose[@]}" ps --all --quiet "$service" | head -1)
  [ "$code" != 0 ] || [ -z "$container" ] || code=$(docker inspect --format '{{.State.ExitCode}}' "$container")
done
[ "$code" != 0 ] || "${compose[@]}" run --rm --no-deps outcome || code=$?
[ "$code" = 0 ] || status=$code
"${compose[@]}" stop >/dev/null 2>&1 || true
exit "$status"
