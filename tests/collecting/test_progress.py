"""The collect actor's reports."""

from __future__ import annotations

from tf_agents.specs import tensor_spec

from actorlearner import reports, variable_container
from actorlearner.cluster import Cluster
from actorlearner.collecting.collector import Collector
from actorlearner.collecting.progress import Progress
from actorlearner.experiment import load_experiment
from actorlearner.replay.servers import ReplayServers
from actorlearner.reports import NewestReport
from actorlearner.runtime.lifecycle import Stop
from actorlearner.runtime.telemetry import Events
from actorlearner.variable_container import Subscriber

BINDINGS = ["train.num_environments = 1", "resident_replay.chunk_length = 8", "resident_replay.stream_length = 1"]


def test_an_actor_reports_how_much_of_its_time_it_waited_for_a_learner_that_takes_nothing(serve, tmp_path):
    """Unreported waiting hides that a core is idle."""
    experiment = load_experiment("dqn_cartpole", BINDINGS)
    policies = experiment.policies()
    agent, policy = policies.agent, policies.collect
    sampling = experiment.sampling(agent)
    tables = experiment.replay.make_tables(tensor_spec.from_spec(agent.collect_data_spec), sampling)
    server = serve([*tables, *variable_container.make_tables(policy.variables()), *reports.make_tables()])
    address = f"localhost:{server.port}"
    weights = Subscriber(address, policy.variables(), refresh_interval_secs=1.0)
    names = tuple(table.name for table in tables)
    collector = Collector(experiment, Cluster(address, address), ReplayServers([address]), names, sampling, life=0)
    acting = policies.make_random(1, seed=1)
    reporter = NewestReport(address)
    progress = Progress(Cluster(address, address), reporter, Events(tmp_path))

    def report():
        progress.report(collector, 0, events_interval_secs=60.0)
        assert reporter.await_sent(30)
        return reports.take_collect_reports(address)[-1]

    first = report()
    stop = Stop()
    stop.set()  # it is waited for one look only
    while collector.blocked_secs < 0.4:  # the queue has room for one chunk
        collector.step(acting, -1)
        collector.await_server(weights, stop)
    last = report()
    assert 0.4 <= last.blocked_secs - first.blocked_secs <= last.wall_secs - first.wall_secs
    weights.close()
    collector.close()
