#!/usr/bin/env bash
# Measures speed against references, after making .venv and .venv-bench if they are missing or stale.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

case ${1:-} in
  -h | --help)
    cat <<'HELP'
Usage: launch/bench.sh [FLAG...]

Measures actorlearner against TF-Agents' own pieces, Stable-Baselines3, SBX and a raw gym loop, in turns on this machine,
prints a table and writes bench.json. Leave the machine alone meanwhile.

  FLAG         passed on to `actorlearner bench`: --only learner minitaur, --repeats=5, --output=FILE, ...
               All of them: .venv/bin/actorlearner bench --help

The first start makes .venv. The first that measures `learner` also makes .venv-bench, for Stable-Baselines3 and SBX, whose
versions conflict with TensorFlow 2.15's; if it cannot, their rows say "not measured". Once both are there it needs no network.
HELP
    exit ;;
esac

set_up_environment run
# Only the comparison `learner` has them as references. In a subshell, as the set-up ends its shell when it fails.
if [[ " $* " != *" --only"* || " $* " =~ [\ =]learner\  ]]; then
  (set_up_peers) || say 'going on without Stable-Baselines3 and SBX: rows against them will say "not measured"'
fi
exec "$venv/bin/actorlearner" bench "$@"
