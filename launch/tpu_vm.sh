#!/usr/bin/env bash
# Trains an experiment on one TPU VM: the learner on its TPU (TPUStrategy), every other role on its many cores.
#
#   gcloud compute tpus tpu-vm create NAME --zone=ZONE --accelerator-type=v5litepod-8 --version=tpu-vm-tf-2.15.0-pjrt
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE
#   COLLECT_ACTORS=32 launch/tpu_vm.sh sac_minitaur          on the VM, in a checkout; Ctrl-C saves and stops
#
# Never run so far: written from Google's documentation of these images, without a TPU to try it on.
set -euo pipefail

# --- Settings; each can also be given in the environment ---------------------------------------------------------------

: "${COLLECT_ACTORS:=16}"
: "${GIN_BINDINGS:=}"        # overrides, divided by ; or by new lines
: "${SEED:=0}"               # every role's seeds derive from it
: "${RUN_DIR:=}"             # runs/tpu-EXPERIMENT if left out; the same one resumes its run
: "${PORT:=8008}"            # of the replay server
: "${STOP_SECS:=120}"        # from SIGTERM to SIGKILL; saving takes seconds, a large replay half a minute
: "${TPU_WHEEL:=$(echo /usr/share/tpu/tensorflow-2.15*.whl)}" # TensorFlow for TPUs; the image has it
: "${TPU_LIBRARY:=/lib/libtpu.so}"

# --- The environment ---------------------------------------------------------------------------------------------------

experiment=${1:-sac_minitaur}
RUN_DIR=${RUN_DIR:-runs/tpu-$(basename "$experiment" .gin)}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh
. launch/jobs.sh

for needed in "$TPU_WHEEL" "$TPU_LIBRARY"; do
  [ -r "$needed" ] || fail "$needed is not here: expected a TPU VM made with --version=tpu-vm-tf-2.15.0-pjrt." \
    "Make one, or say where they are with TPU_WHEEL and TPU_LIBRARY."
done
PYTHON=${PYTHON:-python3.10} set_up_environment run # the wheel is for Python 3.10
# PyPI's TensorFlow has no TPU support. The copy of the wheel in .venv records that it was replaced; a new .venv has none.
if ! cmp -s "$TPU_WHEEL" "$venv/tpu-wheel"; then
  install pip --no-deps --force-reinstall "$TPU_WHEEL" || fail "could not install TPU_WHEEL = $TPU_WHEEL; the reason is above."
  cp "$TPU_WHEEL" "$venv/tpu-wheel"
fi

# --- The roles ---------------------------------------------------------------------------------------------------------

flags=("$experiment" "--gin_bindings=$GIN_BINDINGS" "--seed=$SEED" "--root_dir=$RUN_DIR")
server=("--replay_address=localhost:$PORT")
actorlearner=$venv/bin/actorlearner

# Only one process can hold the TPU, so only the learner gets it. Each role has its own session, so that Ctrl-C reaches only
# this script.
TPU_LOAD_LIBRARY=0 setsid "$actorlearner" keep-running replay-server -- actorlearner replay-server "${flags[@]}" --port="$PORT" &
replay_server=$!
TPU_NAME=local NEXT_PLUGGABLE_DEVICE_USE_C_API=true TF_PLUGGABLE_DEVICE_LIBRARY_PATH=$TPU_LIBRARY \
  setsid "$actorlearner" keep-running learner -- actorlearner learner "${flags[@]}" "${server[@]}" --strategy=tpu --tpu=local &
learner=$!
TPU_LOAD_LIBRARY=0 setsid "$actorlearner" keep-running eval-actor -- actorlearner eval-actor "${flags[@]}" "${server[@]}" &
actors=($!)
for ((task = 0; task < COLLECT_ACTORS; task++)); do
  TPU_LOAD_LIBRARY=0 setsid "$actorlearner" keep-running "collect-actor-$task" -- actorlearner collect-actor "${flags[@]}" \
    "${server[@]}" --task="$task" &
  actors+=($!)
done

stop() { # PROCESS ID...: sends SIGTERM, and SIGKILL to those still running at the deadline
  local deadline=$((SECONDS + STOP_SECS)) id
  kill -TERM "$@" 2>/dev/null || true
  for id in "$@"; do
    while kill -0 "$id" 2>/dev/null && [ "$SECONDS" -lt "$deadline" ]; do sleep 0.2; done
    if kill -KILL -- "-$id" 2>/dev/null; then log "killed process $id: it did not exit within STOP_SECS = $STOP_SECS s"; fi
  done
}
trap 'kill -TERM "$learner" 2>/dev/null || true' INT TERM

await "$learner" && code=0 || code=$?
stop "${actors[@]}" # those that have not ended by themselves
stop "$replay_server"
log "the learner ended with exit code $code; the run is in $RUN_DIR"
exit "$code"
