#!/usr/bin/env bash
# Runs the checks and the tests, after making .venv with the test tools if it is missing or stale.
#
#   tests/run.sh                               ruff, mypy, then every test, a file on each core: the fast ones on four cores at most,
#                                              those in tests/e2e, each of which starts several processes, on two
#   tests/run.sh deploy                        on real engines and clusters (docs/operations.md); as root, half an hour
#   tests/run.sh tests/test_x.py -k foo        pytest alone, with these arguments; paths are below the checkout
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
set_up_environment test
cd "$checkout"
if [ $# -eq 0 ]; then
  tests/lint.sh
  status=0
  "$venv/bin/python" -m pytest --ignore=tests/e2e --numprocesses=auto --maxprocesses=4 --dist=loadfile || status=$?
  # In their order: reordered, the files of one long test come last, and the other core is idle meanwhile.
  "$venv/bin/python" -m pytest tests/e2e --numprocesses=auto --maxprocesses=2 --dist=loadfile --no-loadscope-reorder || status=$?
  exit $status
fi
if [ "${1:-}" = deploy ]; then
  shift
  docker info >/dev/null 2>&1 || say "skipping what needs a Docker engine: \`docker info\` fails here"
  [ -n "${SLURM_CLUSTER:-}" ] && [ -n "${LAB_HOSTS:-}" ] || say "skipping Slurm: SLURM_CLUSTER and LAB_HOSTS are not both set (README, Test)"
  [ -n "${LAB_HOSTS:-}" ] || say "skipping ssh: LAB_HOSTS is not set (README, Test)"
  set -- -m deploy tests/deploy "$@"
fi
exec "$venv/bin/python" -m pytest "$@"
