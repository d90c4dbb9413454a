"""The benchmarks behind the README's figures: ours and a reference, in turns, in one run on one machine.

    ./launch/bench.sh                       makes .venv, and .venv-bench for `learner`, then: actorlearner bench
    .venv/bin/actorlearner bench --only learner collect-cartpole

    measuring.py     measures two programs in turns
    results.py       rows: medians, ratios, bars; tables of them
    machine.py       describes the machine
    roles.py         our side: the real roles as processes; a stand-in for the learner if it is not measured
    tutorial.py      the reference: the TF-Agents tutorial's pieces, unchanged

and one file for each subject, listed in run.py.
"""
