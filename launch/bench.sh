#!/usr/bin/env bash
# Measures speed against references. Makes .venv first, and .venv-bench for the references that need it, if missing or stale.
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
versions conflict with TensorFlow 2.15's; if it cannot, their rows say "not measured", and the next start tries again. Once
both are there it needs no network.
HELP
    exit ;;
esac

needs_peers() { # only the comparison `learner` uses Stable-Baselines3 and SBX
  case " $* " in
    *" --markdown"* | *" --peers_python"* | *" --help "* | *" -h "*) return 1 ;;
    *" --only"*) [[ " $* " =~ [\ =]learner\  ]] ;;
  esac
}

set_up_environment run
if needs_peers "$@"; then
  trap 'exit 130' INT # at Ctrl-C pip exits as if it had failed
  # In a subshell, because a failed set-up exits its shell.
  (trap 'exit 130' INT; set_up_peers) || say 'going on without them: rows against what .venv-bench lacks will say "not measured"'
fi
exec "$venv/bin/actorlearner" bench "$@"
