"""What the README's figures were made with: ours and a reference, in turns, in one run on one machine.

    ./launch/bench.sh                       makes .venv, and .venv-bench for `learner`, then: actorlearner bench
    .venv/bin/actorlearner bench --only learner collect-cartpole

    measuring.py     two programs measured in turns
    results.py       rows: medians, ratios, bars; tables of them
    machine.py       what it was measured on
    roles.py         our side: the real roles as processes; a stand-in for the learner where it is not the subject
    tutorial.py      their side: the TF-Agents tutorial's pieces as it writes them

and one file for each subject, listed in run.py.
"""
