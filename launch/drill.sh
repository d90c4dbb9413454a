#!/usr/bin/env bash
# Does to a small run what happens to long ones, and says which promises held. Makes .venv first if it is missing or stale.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

case ${1:-} in
  -h | --help)
    cat <<'HELP'
Usage: launch/drill.sh EXPERIMENT [FLAG...]

Starts a small run of the experiment, kills its roles, cuts its network, damages its files, and so on, and prints which of the
system's promises held. All faults take some 15 minutes.

  EXPERIMENT   a shipped experiment, such as dqn_cartpole, or a gin file
  FLAG         passed on to `actorlearner drill`: --fault=kill-learner, --kills=20, --json=FILE, ...
               All of them: .venv/bin/actorlearner drill --help
HELP
    exit ;;
esac

set_up_environment run
exec "$venv/bin/actorlearner" drill "$@"
