#!/usr/bin/env bash
# Trains in containers as the calling user, exits with the learner's own code, and leaves nothing running.
set -euo pipefail

case ${1:-} in
  -h | --help)
    cat <<'HELP'
Usage: [EXPERIMENT=NAME] [SETTING=VALUE...] docker/up.sh [--gpu] [FLAG...]

Runs `docker compose -f docker/compose.yaml up FLAG...` so that the caller owns what it writes, and exits with the learner's
exit code, for scripts: `docker compose up` by itself only has 0 and 1. Ctrl-C and SIGTERM save and stop (130, 143). Stops
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
# If root starts this, the roles run as the image's user: they run as root only with RUN_UID=0.
if [ "$(id -u)" != 0 ]; then
  export RUN_UID=${RUN_UID:-$(id -u)} RUN_GID=${RUN_GID:-$(id -g)}
fi

# A terminal's Ctrl-C also reaches compose, which stops the containers, so that the learner saves. A service manager's SIGTERM
# reaches only this script, and docker does not always pass it on to compose. Either way, wait until compose has ended.
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
[ "$asked" != 143 ] || kill -TERM "$up" 2>/dev/null || true # the signal came before compose had a process id
wait "$up" || status=$?
while [ -n "$asked" ] && kill -0 "$up" 2>/dev/null; do wait "$up" || true; done
if [ -n "$asked" ]; then
  "${compose[@]}" stop >/dev/null 2>&1 || true
  exit "$asked"
fi
# Of the services that must succeed, the first failed one has the exit code; a service that never started has 0.
code=0
for service in run-directory check learner; do
  container=$("${compose[@]}" ps --all --quiet "$service" | head -1)
  [ "$code" != 0 ] || [ -z "$container" ] || code=$(docker inspect --format '{{.State.ExitCode}}' "$container")
done
[ "$code" != 0 ] || "${compose[@]}" run --rm --no-deps outcome || code=$?
[ "$code" = 0 ] || status=$code
"${compose[@]}" stop >/dev/null 2>&1 || true
exit "$status"
