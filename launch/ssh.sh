#!/usr/bin/env bash
# Trains an experiment on several hosts with nothing but ssh: replay server and learner on one, actors on the others.
#
#   export LEARNER_HOST=gpu1 ACTOR_HOSTS="cpu1 cpu2" EXPERIMENT=dqn_cartpole
#   launch/ssh.sh start         starts what does not run yet; again after adding a host, or after `stop` to go on
#   launch/ssh.sh status        every role on every host; exit code 0 if each runs or has ended well
#   launch/ssh.sh logs [NAME]   last lines of every log, or one whole, such as learner or collect-actor-3
#   launch/ssh.sh stop          actors, learner (which saves), replay server (which saves)
#
# Every host needs ssh without a password, this repository at the same path, and its environment (`make setup`, same
# version). No file is shared: each host keeps its own logs; results and checkpoints are on LEARNER_HOST. ACTOR_HOSTS must
# reach PORT on LEARNER_HOST; nobody else should: Reverb has no authentication.
set -euo pipefail

# --- Settings; each can also be given in the environment ---------------------------------------------------------------

: "${EXPERIMENT:=sac_minitaur}"           # a name in gin/, or the path of a gin file on every host
: "${LEARNER_HOST:=}"                     # as ssh knows it: host or user@host
: "${ACTOR_HOSTS:=}"                      # the same, divided by spaces; LEARNER_HOST may be among them
: "${ACTORS_PER_HOST:=2}"                 # collect actors
: "${EVAL_HOST:=${ACTOR_HOSTS%% *}}"      # where the eval actor runs
: "${PORT:=8008}"                         # of the replay server; two runs on one LEARNER_HOST need two
: "${REPLAY_ADDRESS:=${LEARNER_HOST#*@}:$PORT}" # by which actors reach it
: "${TLS_DIR:=}"                          # of `actorlearner certs`, at this path on every host: mutual TLS; empty: in the clear
: "${GIN_BINDINGS:=}"                     # overrides, divided by ; or by new lines
: "${SEED:=0}"                            # every role's seeds derive from it
: "${LEARNER_FLAGS:=}"                    # further flags of the learner, such as --strategy=mirrored
: "${CHECKOUT:=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}" # of this repository, on every host
: "${RUN_DIR:=$CHECKOUT/runs/ssh-$(basename "$EXPERIMENT" .gin)}" # on every host; on LEARNER_HOST the run directory
: "${ACTORLEARNER:=$CHECKOUT/.venv/bin/actorlearner}" # the command that starts a role
: "${STOP_SECS:=120}"                     # from SIGTERM to SIGKILL; saving takes seconds, a large replay half a minute
: "${SSH:=ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3}"

# --- What runs on a host -----------------------------------------------------------------------------------------------

# The script that each host's bash runs; its arguments are a verb, the settings, then names of roles.
on_host() {
  cat <<'ON_HOST'
set -uo pipefail
verb=$1 CHECKOUT=$2 RUN_DIR=$3 ACTORLEARNER=$4 EXPERIMENT=$5 GIN_BINDINGS=$6 SEED=$7 PORT=$8 REPLAY_ADDRESS=$9
LEARNER_FLAGS=${10} STOP_SECS=${11}
shift 11
read -ra actorlearner <<<"$ACTORLEARNER"
logs=$RUN_DIR/logs

# Prints the process id of a role's keeper; fails if there is none. Process ids are reused, so the command line is compared.
keeper() { # NAME
  local id
  id=$(cat "$logs/$1.pid" 2>/dev/null) || return
  { tr '\0' '\n' <"/proc/$id/cmdline" | grep -qxF -- "--root_dir=$RUN_DIR" && echo "$id"; } 2>/dev/null
}

start() { # NAME
  local role=${1%-[0-9]*} task=0 flags
  if keeper "$1" >/dev/null; then echo "runs already"; return; fi
  flags=("$EXPERIMENT" "--gin_bindings=$GIN_BINDINGS" "--seed=$SEED" "--root_dir=$RUN_DIR")
  case $role in
    replay-server) flags+=("--port=$PORT") ;;
    learner) read -ra more <<<"$LEARNER_FLAGS"; flags+=("--replay_address=localhost:$PORT" "${more[@]}") ;;
    *) flags+=("--replay_address=$REPLAY_ADDRESS" "--task=${1##*-}") ;;
  esac
  [ "$role" = learner ] || export CUDA_VISIBLE_DEVICES=-1
  printf -- '--- %(%F %T)T %s: start of %s\n' -1 "$HOSTNAME" "$EXPERIMENT" >>"$logs/$1.log"
  setsid "${actorlearner[@]}" keep-running "$1" -- actorlearner "$role" "${flags[@]}" \
    </dev/null >>"$logs/$1.log" 2>&1 &
  echo $! >"$logs/$1.pid"
  echo "started"
}

status() { # NAME
  local id ended
  if id=$(keeper "$1"); then
    echo "runs (process $id)" \
      "$([ "$1" != learner ] || sed -n 's/^  "train_step": \([0-9]*\),/at train step \1/p' "$RUN_DIR/status.json" 2>/dev/null)"
    return
  fi
  # Only what came after the last start counts.
  ended=$(awk '/^--- .*: start of /{ended = ""} match($0, /ended with exit code [0-9]+/){ended = substr($0, RSTART, RLENGTH)}
    END{print ended}' "$logs/$1.log" 2>/dev/null)
  echo "${ended:-does not run}"
  [ "$ended" = "ended with exit code 0" ]
}

stop() { # NAME
  local id deadline=$((SECONDS + STOP_SECS))
  id=$(keeper "$1") || { echo "does not run"; return; }
  kill -TERM "$id"
  while keeper "$1" >/dev/null; do
    if [ "$SECONDS" -ge "$deadline" ]; then
      kill -KILL -- "-$id"
      echo "killed: it did not exit within STOP_SECS = $STOP_SECS s of SIGTERM"
      return 1
    fi
    sleep 0.2
  done
  echo "stopped"
}

check() {
  cd "$CHECKOUT" || { echo "CHECKOUT=$CHECKOUT is not on this host"; return 1; }
  mkdir -p "$logs" || { echo "RUN_DIR=$RUN_DIR cannot be made on this host"; return 1; }
  "${actorlearner[@]}" --version 2>&1 </dev/null || { echo "ACTORLEARNER=$ACTORLEARNER does not run on this host; make setup?"; return 1; }
}

if [ "$verb" = check ]; then check; exit; fi
code=0
cd "$CHECKOUT" || exit
if [ "$verb" = stop ]; then # all at once: each may take seconds
  for name in "$@"; do { said=$(stop "$name"); stopped=$?; printf '%-18s %s\n' "$name" "$said"; exit $stopped; } & done
  for name in "$@"; do wait -n || code=1; done
  exit $code
fi
for name in "$@"; do
  case $verb in
    log) cat "$logs/$name.log" || code=1 ;;
    logs) tail -v -n 5 "$logs/$name.log" || code=1 ;;
    *) said=$("$verb" "$name") || code=1; printf '%-18s %s\n' "$name" "$said" ;; # start or status
  esac
done
exit $code
ON_HOST
}

# --- From here -----------------------------------------------------------------------------------------------------------

fail() {
  printf 'error: %s\n' "$@" >&2
  exit 1
}

# Runs a verb for some roles on a host; prefixes its output with the host's name.
ask() { # HOST VERB NAME...
  local host=$1 verb=$2 code=0
  shift 2
  {
    printf 'export ACTORLEARNER_TLS_DIR=%q ACTORLEARNER_HANG_SECS=%q\n' "$TLS_DIR" "${ACTORLEARNER_HANG_SECS:-}"
    printf 'set --'
    printf ' %q' "$verb" "$CHECKOUT" "$RUN_DIR" "$ACTORLEARNER" "$EXPERIMENT" "$GIN_BINDINGS" "$SEED" "$PORT" "$REPLAY_ADDRESS" \
      "$LEARNER_FLAGS" "$STOP_SECS" "$@"
    printf '\n'
    on_host
  } | $SSH "$host" bash -s 2>&1 | sed "s|^|$host: |" || code=$?
  [ "$code" -ne 255 ] || echo "$host: out of reach"
  return $code
}

# Prints the names of the roles of a host. Collect actors are numbered through, in the order of ACTOR_HOSTS.
roles_of() { # HOST
  local host number task=0
  [ "$1" != "$LEARNER_HOST" ] || printf '%s\n' replay-server learner
  [ "$1" != "$EVAL_HOST" ] || echo eval-actor-0
  for host in $ACTOR_HOSTS; do
    for ((number = 0; number < ACTORS_PER_HOST; number++)); do
      [ "$host" != "$1" ] || echo "collect-actor-$task"
      task=$((task + 1))
    done
  done
}

# Runs a verb for the matching roles of every host, one host after the other.
ask_all() { # VERB PATTERN
  local host names code=0
  for host in $hosts; do
    names=$(roles_of "$host" | grep -E -e "$2") || continue
    # shellcheck disable=SC2086  # names hold no spaces
    ask "$host" "$1" $names || code=1
  done
  return $code
}

start_all() {
  local host said version="" other
  for host in $hosts; do
    said=$(ask "$host" check) || fail "$said" "nothing was started."
    other=${said#"$host: "}
    [ -z "$version" ] || [ "$other" = "$version" ] ||
      fail "$LEARNER_HOST has $version, $host has $other: expected the same everywhere. Update the checkouts; nothing was started."
    version=$other
  done
  { ask_all start '^(replay-server|learner)$' && ask_all start -actor-; } ||
    fail "not everything was started, for the reason above. Fix it and start again, or: launch/ssh.sh stop"
}

stop_all() {
  local code=0
  ask_all stop -actor- || code=1
  ask_all stop '^learner$' || code=1
  ask_all stop '^replay-server$' || code=1
  [ "$code" -eq 0 ] || fail "not everything was stopped, for the reason above. When the host is back, again: launch/ssh.sh stop"
}

verb=${1:-}
case $verb in start | status | logs | stop) ;; *) sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 64 ;; esac
[ -n "$LEARNER_HOST" ] || fail "LEARNER_HOST is not set: expected the host of replay server and learner, such as gpu1"
[ -n "$ACTOR_HOSTS" ] || fail "ACTOR_HOSTS is not set: expected the hosts of the actors, such as \"cpu1 cpu2\""
[ $# -eq 1 ] || [ "$verb" = logs ] ||
  fail "$verb takes no argument: what runs is a setting, as in EXPERIMENT=${2:-} launch/ssh.sh $verb"
# shellcheck disable=SC2086  # hosts are divided at spaces
hosts=$(printf '%s\n' $LEARNER_HOST $ACTOR_HOSTS $EVAL_HOST | awk '!seen[$0]++')
case $verb in
  start) start_all ;;
  status) ask_all status . ;;
  logs) if [ -n "${2:-}" ]; then ask_all log "^$2\$"; else ask_all logs .; fi ;;
  stop) stop_all ;;
esac
