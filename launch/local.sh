#!/usr/bin/env bash
# Trains an experiment with every role on this machine, after making .venv if it is missing or stale.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

case ${1:-} in
  -h | --help)
    cat <<'HELP'
Usage: launch/local.sh [EXPERIMENT] [FLAG...]

Trains EXPERIMENT with a replay server, collect actors, an eval actor and a learner on this machine, and leaves the results
in a run directory below runs/ in the current directory.

  EXPERIMENT   a shipped experiment by its name in gin/ (sac_minitaur, dqn_cartpole, ...) or the path of a gin file;
               sac_minitaur if left out
  FLAG         passed on to `actorlearner train`: --root_dir=DIR, --num_collect_actors=N, --gin_bindings='...', ...
               All of them: .venv/bin/actorlearner train --help

The first start makes .venv from requirements.lock: with uv if it is on PATH, else with pip. PYTHON=/path/to/python chooses
the interpreter, if it is a CPython 3.9-3.11.
HELP
    exit ;;
  "" | --*)
    [ $# -gt 0 ] && [ -z "$1" ] && shift # an empty name, as from an unset variable, means the default too
    set -- sac_minitaur "$@" ;;
esac

set_up_environment run
exec "$venv/bin/actorlearner" train "$@"
