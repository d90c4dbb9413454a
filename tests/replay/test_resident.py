"""The learner's own replay: which windows it holds, and how it draws them."""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import pickle

import numpy as np
import pytest
import reverb
import tensorflow as tf
from tf_agents.replay_buffers import reverb_replay_buffer, reverb_utils
from tf_agents.specs import tensor_spec

from actorlearner.replay import resident
from actorlearner.replay.chunks import EXPERIENCE_TABLE, STREAM_TABLE
from actorlearner.replay.durable_table import read_chunks
from actorlearner.replay.mirror import Mirror
from actorlearner.replay.resident import ResidentReplay
from actorlearner.replay.servers import ReplayServers
from actorlearner.runtime.lifecycle import RoleError, Stopped
from tests.e2e.processes import START_SECS, Processes
from tests.replay.episodes import episode, flush, held_windows, make_source, sample, write


@pytest.mark.parametrize("num_steps", [2, 4])
def test_the_mirror_holds_the_windows_that_a_stock_table_holds_as_items(
    serve, replay, address, spec, eventually, num_steps
):
    """A window lost or doubled at a chunk's edge, or over an episode's end, would train on data never seen."""
    # Two environments: a long episode beside short ones.
    lanes = [episode(100, 3), episode(200, 25), episode(300, 1), episode(400, 8)], [episode(500, 40)]
    plan = {"num_steps": num_steps, "num_environments": 2, "initial_collect_steps": 1, "num_updates_per_call": 1_000}
    sink = replay.make_sink(ReplayServers([address]), sample(**plan))
    source = make_source(replay, address, spec, **plan)
    source.restore({})
    table = reverb.Table(
        "stock",
        sampler=reverb.selectors.Fifo(),
        remover=reverb.selectors.Fifo(),
        max_size=1_000,
        max_times_sampled=1,
        rate_limiter=reverb.rate_limiters.MinSize(1),
        signature=tensor_spec.add_outer_dim(spec),
    )
    stock_address = f"localhost:{serve([table]).port}"
    observer = reverb_utils.ReverbAddTrajectoryObserver(
        reverb.Client(stock_address), "stock", sequence_length=num_steps
    )
    for steps in [steps for lane in lanes for steps in lane]:
        for step in steps:
            observer(step)
        observer.reset()
    observer.close()
    write(sink, *([step for steps in lane for step in steps] for lane in lanes))
    flush(sink)

    num_items = reverb.Client(stock_address).server_info(timeout=5)["stock"].current_size
    buffer = reverb_replay_buffer.ReverbReplayBuffer(spec, "stock", num_steps, server_address=stock_address)
    items = iter(buffer.as_dataset(num_steps=num_steps, single_deterministic_pass=True))
    expected = {tuple(next(items)[0].observation.numpy()[:, 0]) for _ in range(num_items)}
    assert len(expected) == num_items
    eventually(lambda: source.is_ready() and source.account()["held"] == num_items)
    assert held_windows(source._mirrors[0]) == expected
    source.close()


def test_a_chunk_that_no_mirror_can_hold_ends_training_with_a_word(replay, address, spec, eventually):
    """It is found by a thread; a thread's error alone would leave the learner waiting for data."""
    too_long = dataclasses.replace(replay, chunk_length=2_000, chunk_secs=1_000.0)
    sink = too_long.make_sink(ReplayServers([address]), sample(num_environments=1))
    source = make_source(too_long, address, spec)
    source.restore({})
    write(sink, episode(0, 1_900))
    flush(sink)

    def says_so():
        try:
            source.is_ready()
        except ValueError as error:
            return "replay_buffer_capacity" in str(error)
        return False

    eventually(says_so)
    source.close()


def test_a_restarted_learner_gets_its_replay_back_from_the_server(replay, address, spec, eventually):
    """Others lose their replay on resume (tensorflow/agents#475, open since 2020)."""
    sink = replay.make_sink(ReplayServers([address]), sample())
    first = make_source(replay, address, spec, samples_per_insert=1.0, num_updates_per_call=100)
    first.restore({})
    for number in range(20):
        write(sink, episode(100 * number, 12))
        first.is_ready()
    flush(sink)
    eventually(lambda: first.is_ready() and first.account()["held"] == 240)
    first.note_updates(10)
    first.close()

    second = make_source(replay, address, spec, samples_per_insert=1.0, num_updates_per_call=100)
    second.restore(first.counts())
    assert second.is_ready()
    assert held_windows(second._mirrors[0], 20_000) == held_windows(first._mirrors[0], 20_000)
    assert second.account() == first.account()
    assert (second.account()["inserts"], second.account()["samples"]) == (240, 40)
    oldest = second._mirrors[0].gather(tf.constant([0], tf.int64))[0]
    assert oldest.observation.numpy()[0, 0, 0] == 0, "what is oldest must be the first to leave, also from now on"
    second.close()


def test_of_a_durable_table_that_overflows_exactly_the_newest_come_back(serve, spec, eventually):
    """Were any to leave but the oldest, a restarted learner would train on another replay than before."""
    replay = ResidentReplay(replay_buffer_capacity=28, chunk_length=8, stream_length=4)  # 8 chunks of 7 on a server
    address = f"localhost:{serve(replay.make_tables(spec, sample())).port}"
    plan = {"samples_per_insert": 1.0, "num_updates_per_call": 1_000}
    first = make_source(replay, address, spec, **plan)
    first.restore({})
    write(replay.make_sink(ReplayServers([address]), sample()), episode(0, 4 * 56))
    eventually(lambda: first.is_ready() and first.account()["inserts"] == 224)
    saved = first.counts()
    first.close()

    chunks = read_chunks(address, silent_secs=10).values()
    assert sorted(int(chunk["step"].observation[0, 0, 0]) for chunk in chunks) == list(range(168, 224, 7))
    second = make_source(replay, address, spec, **plan)
    second.restore(saved)
    assert held_windows(second._mirrors[0]) == {(number, number + 1) for number in range(196, 224)}
    second.close()


def test_a_learner_that_is_stopped_while_it_is_filled_stops(replay, address, spec):
    """Millions of transitions take a minute to read, and a launcher kills what has not ended after some seconds."""
    sink = replay.make_sink(ReplayServers([address]), sample())
    write(sink, episode(0, 12))
    flush(sink)

    def stop():
        raise Stopped("now")

    source = make_source(replay, address, spec)
    with pytest.raises(Stopped):
        source.restore({}, stop)
    source.close()


def test_a_queue_that_runs_dry_is_read_again_at_once(replay, address, spec):
    """tf.data's thread that tunes an iterator held up its end for half a minute: an actor's death stopped training."""
    source = make_source(replay, address, spec)
    assert source._read_queue(address).options().autotune.enabled is False


def test_several_replicas_each_hold_a_share(replay, address, spec, eventually):
    """Two whole copies would halve what fits; a share that stays empty would train on nothing."""
    sink = replay.make_sink(ReplayServers([address]), sample())
    source = make_source(replay, address, spec, num_updates_per_call=100)
    source._mirrors = [Mirror(spec, 2, 500) for _ in range(2)]
    source.restore({})
    write(sink, episode(0, 30))
    flush(sink)
    eventually(lambda: source.is_ready() and source.account()["held"] == 30)
    shares = [held_windows(mirror) for mirror in source._mirrors]
    assert min(map(len, shares)) >= 8
    assert not shares[0] & shares[1]
    assert len(shares[0] | shares[1]) == 30
    source.close()


def test_images_reach_the_batch_as_they_were_seen(serve, replay, spec, eventually):
    """A cast on the way would quadruple what is sent and held, or train on other images than the policy acted on."""
    image_spec = spec._replace(observation=tf.TensorSpec((84, 84, 4), tf.uint8))
    images = np.random.default_rng(0).integers(0, 256, (41, 84, 84, 4), np.uint8)
    steps = [step._replace(observation=image) for step, image in zip(episode(0, 40), images)]
    plan = {"batch_size": 1_000, "num_updates_per_call": 100}
    address = f"localhost:{serve(replay.make_tables(image_spec, sample(**plan))).port}"
    source = make_source(replay, address, image_spec, **plan)
    source.restore({})
    sink = replay.make_sink(ReplayServers([address]), sample(**plan))
    write(sink, steps)
    flush(sink)
    eventually(lambda: source.is_ready() and source.account()["held"] == 40)
    batch = source.unpack(*source.draw(source.handle)).experience
    assert batch.observation.dtype == tf.uint8
    assert batch.observation.shape == (1_000, 2, 84, 84, 4)
    number_of = {image.tobytes(): number for number, image in enumerate(images)}
    drawn = {tuple(number_of.get(image.tobytes()) for image in window) for window in batch.observation.numpy()}
    assert drawn == {(number, number + 1) for number in range(40)}
    source.close()


# Devices are split before TensorFlow computes anything, so this needs a process of its own.
DRAW_BY_TWO_REPLICAS = """
import base64, json, pickle, sys
import tensorflow as tf
from actorlearner.replay.resident import ResidentReplay
from actorlearner.replay.servers import ReplayServers
from actorlearner.runtime.devices import make_strategy
address, spec, sampling = pickle.loads(base64.b64decode(sys.argv[1]))
strategy = make_strategy("mirrored", num_logical_cpus=2)
source = ResidentReplay(replay_buffer_capacity=1_000).make_source(ReplayServers([address]), spec, sampling, strategy)
source.restore({})
assert source.is_ready()

def draw():
    batch = source.unpack()
    return batch.experience, batch.acted_at

@tf.function
def train(num_updates):  # as the learner's loop draws
    parts = strategy.run(draw)
    for _ in tf.range(num_updates - 1):
        parts = strategy.run(draw)
    return parts

batches, _ = train(tf.constant(2))
batches = strategy.experimental_local_results(batches.observation)
print("RESULT", json.dumps([batch[..., 0].numpy().tolist() for batch in batches]))
source.close()
"""


def test_each_of_two_replicas_draws_its_part_of_the_batch_from_a_share_of_its_own(replay, address, spec, tmp_path):
    """Were all to draw from the first share, half of what was collected would silently never be trained on."""
    sink = replay.make_sink(ReplayServers([address]), sample())
    write(sink, episode(0, 28))
    flush(sink)
    task = base64.b64encode(pickle.dumps((address, spec, sample(batch_size=1_000)))).decode()
    program = tmp_path / "draw.py"  # a file: the loop is compiled from its source
    program.write_text(DRAW_BY_TWO_REPLICAS)
    with Processes(tmp_path) as processes:
        script = processes.start_python(program, task)
        batches = json.loads(script.await_line("^RESULT (.*)").group(1))
        assert script.wait(START_SECS) == 0, script.output
    assert [len(batch) for batch in batches] == [500, 500]
    one, other = ({tuple(window) for window in batch} for batch in batches)
    assert not one & other
    assert len(one) == len(other) == 14
    assert one | other == {(number, number + 1) for number in range(28)}


def test_a_replica_that_does_not_know_which_it_is_draws_nothing(replay, address, spec):
    """Were it to draw from the first share, the others would be held, paid for and never trained on."""
    source = make_source(replay, address, spec)
    source._mirrors = [Mirror(spec, 2, 500) for _ in range(2)]

    @tf.function(autograph=False)
    def draw(replica):  # known only when it runs, as on a TPU
        with tf.distribute.ReplicaContext(tf.distribute.get_strategy(), replica):
            return source.unpack()

    with pytest.raises(AssertionError, match="one of the 2 mirrors"):
        draw(tf.constant(0))


def test_a_replay_larger_than_the_memory_is_refused_with_the_numbers(address, spec):
    """The operating system would silently kill the learner an hour later."""
    replay = ResidentReplay(replay_buffer_capacity=10**12)
    with pytest.raises(RoleError, match=r"replay_buffer_capacity = 1,000,000,000,000 takes [\d.]+ GB .*GB\. Lower it"):
        make_source(replay, address, spec)


def test_a_device_that_is_too_small_is_named_with_what_was_asked_of_it(address, spec, monkeypatch):
    """A GPU's memory is known only when it runs out; TensorFlow's own error names a tensor, and no setting."""
    monkeypatch.setattr(resident, "free_host_bytes", lambda: 10**18)  # here the device is the host
    replay = ResidentReplay(replay_buffer_capacity=10**15)  # more than a process can address: none is ever taken
    # Takes ten seconds of TensorFlow's, which tries again meanwhile.
    with pytest.raises(RoleError, match=r"capacity = 1,000,000,000,000,000 takes [\d.]+ GB of .* on /cpu:0\. Lower it"):
        make_source(replay, address, spec)


def test_a_learner_says_at_its_start_how_many_transitions_and_bytes_its_replay_takes(address, spec, caplog):
    """Who chooses a capacity, or a machine for it, needs both; what is said must be what is taken."""
    caplog.set_level(logging.INFO)
    (mirror,) = make_source(ResidentReplay(replay_buffer_capacity=1_000_000), address, spec)._mirrors
    num_bytes = sum(variable.numpy().nbytes for variable in (*mirror._rows, mirror._starts))
    (line,) = (message for message in caplog.messages if "resident replay" in message)
    assert line == (
        "the resident replay holds 1,000,000 transitions (windows of 2 steps): "
        f"{num_bytes / 1e6:.1f} MB on each of /cpu:0"
    )


def test_a_capacity_below_the_warm_up_is_refused():
    """Training would wait for ever."""
    with pytest.raises(ValueError, match=r"replay_buffer_capacity = 10 .*initial_collect_steps = 20"):
        ResidentReplay(replay_buffer_capacity=10).check(initial_collect_steps=20)


def test_a_strangers_item_is_left_out_and_harms_nobody(replay, address, spec, eventually):
    """Reverb's server takes any item; sampled from the durable table, one would end every restarted learner."""
    plan = {"samples_per_insert": 1.0, "num_updates_per_call": 100}
    sink = replay.make_sink(ReplayServers([address]), sample())
    source = make_source(replay, address, spec, **plan)
    source.restore({})
    write(sink, episode(0, 12))
    flush(sink)
    with reverb.Client(address).trajectory_writer(num_keep_alive_refs=1, validate_items=False) as stranger:
        stranger.append({"nothing": np.zeros(3, np.float32)})
        for table in (EXPERIENCE_TABLE, STREAM_TABLE):
            stranger.create_item(table, 1.0, {"nothing": stranger.history["nothing"][-1:]})
        stranger.flush(timeout_ms=5_000)
    write(sink, episode(100, 12))
    flush(sink)
    again = make_source(replay, address, spec, **plan)
    eventually(lambda: reverb.Client(address).server_info(timeout=5)[STREAM_TABLE].current_size == 0)
    source.close()
    again.restore({})
    assert again.counts()["inserts"] == 24
    again.close()


def test_each_observation_is_counted_once_though_a_checkpoint_comes_in_between(replay, address, spec, eventually):
    """A run that was stopped in its warm-up would normalise by the few observations after it, or by some twice."""
    plan = {"num_environments": 1, "num_steps": 3, "windows_may_end_early": True, "initial_collect_steps": 1_000}
    sink = replay.make_sink(ReplayServers([address]), sample(**plan))
    source = make_source(replay, address, spec, **plan)
    source.count_observations()
    source.restore({})
    write(sink, episode(0, 30))
    eventually(lambda: source.account()["inserts"] > 0)
    with source.standing_still():
        counts, before = source.counts(), source.take_moments()
    source.close()

    flush(sink)
    resumed = make_source(replay, address, spec, **plan)
    resumed.count_observations()
    resumed.restore(counts)
    write(sink, episode(100, 20))
    flush(sink)
    eventually(lambda: resumed.account()["inserts"] == 49)  # the last one comes with the next chunk
    moments = [*before, *resumed.take_moments()]
    assert sum(one.count for one in moments) == 49
    total = sum(one.count * one.mean for one in moments)
    np.testing.assert_allclose(total, [sum(range(30)) + sum(range(100, 119))])
    resumed.close()
