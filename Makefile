SHELL := bash
.PHONY: setup test lint lock train bench drill

setup:  ## makes .venv with the test tools
	set -euo pipefail; . launch/environment.sh; set_up_environment test

test:  ## ruff, mypy and every test: what CI runs
	.ci/run

lint:  ## ruff and mypy
	tests/lint.sh

lock:  ## writes requirements*.lock from setup.py and benchmarks/requirements.in; ARGS=--upgrade takes the newest versions
	set -euo pipefail; . launch/environment.sh; lock_versions $(ARGS)

bench:  ## measures speed against references; ARGS='--only learner' takes some of them
	launch/bench.sh $(ARGS)

drill:  ## does to a small run of EXPERIMENT (dqn_cartpole if left out) what happens to long ones; ARGS=--kills=20 kills roles
	launch/drill.sh $(or $(EXPERIMENT),dqn_cartpole) $(ARGS)

train:  ## trains EXPERIMENT (sac_minitaur if left out)
	launch/local.sh $(EXPERIMENT) $(ARGS)
