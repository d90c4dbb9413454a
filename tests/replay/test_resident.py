"""The learner's own replay: which windows it holds, how it draws them, and how it keeps samples per insert."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest
import reverb
import tensorflow as tf
from tf_agents.agents.dqn import dqn_agent
from tf_agents.networks import sequential
from tf_agents.replay_buffers import reverb_replay_buffer, reverb_utils
from tf_agents.specs import array_spec, tensor_spec
from tf_agents.trajectories import StepType, time_step, trajectory

from actorlearner.replay import resident
from actorlearner.replay.base import Sampling
from actorlearner.replay.resident import EXPERIENCE_TABLE, STREAM_TABLE, Mirror, ResidentReplay
from actorlearner.replay.servers import ReplayServers
from actorlearner.runtime.lifecycle import RoleError

RANDOM = -1


@pytest.fixture(scope="module")
def spec():
    """The collect data spec of a DQN agent with one observation: the number of the step."""
    observation = array_spec.BoundedArraySpec((1,), np.float32, -1e9, 1e9)
    action = tensor_spec.from_spec(array_spec.BoundedArraySpec((), np.int64, 0, 1))
    network = sequential.Sequential([tf.keras.layers.Dense(2)])
    agent = dqn_agent.DqnAgent(
        tensor_spec.from_spec(time_step.time_step_spec(observation)),
        action,
        network,
        tf.keras.optimizers.Adam(1e-3),
        train_step_counter=tf.Variable(0, dtype=tf.int64),
    )
    return agent.collect_data_spec


def episode(first: int, num_environment_steps: int) -> list[trajectory.Trajectory]:
    """Returns an episode's steps and its boundary; observations are `first`, `first + 1`, ..."""
    steps = []
    for number in range(num_environment_steps + 1):
        is_boundary = number == num_environment_steps
        step_type = StepType.FIRST if number == 0 else StepType.LAST if is_boundary else StepType.MID
        next_type = (
            StepType.FIRST if is_boundary else StepType.LAST if number == num_environment_steps - 1 else StepType.MID
        )
        steps.append(
            trajectory.Trajectory(
                step_type=np.int32(step_type),
                observation=np.array([first + number], np.float32),
                action=np.int64(number % 2),
                policy_info=(),
                next_step_type=np.int32(next_type),
                reward=np.float32(1.0),
                discount=np.float32(0.0 if next_type == StepType.LAST else 1.0),
            )
        )
    return steps


def columns(*steps):
    """Returns one step of each environment as columns."""
    return tf.nest.map_structure(lambda *leaves: np.stack(leaves), *steps)


def write(sink, *lanes, acted_at=RANDOM, crashes=()):
    """Writes runs of steps of equal length, one for each environment; `crashes` are (row, environment)."""
    for row, steps in enumerate(zip(*lanes)):
        crashed = np.array([(row, index) in crashes for index in range(len(lanes))])
        sink.append(columns(*steps), acted_at, crashed)
        assert not sink.is_blocked()


def flush(sink):
    """Sends what is pending, as at the end of a run."""
    sink.close(timeout_secs=5)


def as_chunk(*lanes, acted_at=RANDOM):
    """Returns what a sink sends of these runs of steps, one for each environment."""
    stacked = columns(*(columns(*steps) for steps in lanes))
    return {
        "acted_at": np.full(len(lanes[0]), acted_at),
        "ends_run": stacked.step_type == StepType.LAST,
        "length": np.int64(len(lanes[0])),
        "step": stacked,
    }


def add(mirror, *lanes, acted_at=RANDOM):
    mirror.add(mirror.make_block(as_chunk(*lanes, acted_at=acted_at)))


def held_windows(mirror: Mirror, num_draws: int = 4_000) -> set[tuple[float, ...]]:
    drawn, _ = mirror.draw(num_draws)
    return {tuple(window) for window in drawn.observation.numpy()[..., 0]}


def sample(**changes):
    """Returns a plan of two-step windows, one update for each window after the tenth."""
    plan = {
        "num_steps": 2,
        "batch_size": 4,
        "num_updates_per_call": 5,
        "num_environments": 1,
        "initial_collect_steps": 10,
        "samples_per_insert": 4.0,
    }
    return Sampling(**{**plan, **changes})


@pytest.fixture
def replay():
    return ResidentReplay(replay_buffer_capacity=1_000, chunk_length=8, stream_length=4)


@pytest.fixture
def address(serve, replay, spec):
    return f"localhost:{serve(replay.make_tables(spec, sample())).port}"


def make_source(replay, address, spec, **changes):
    return replay.make_source(ReplayServers([address]), spec, sample(**changes), tf.distribute.get_strategy())


@pytest.mark.parametrize("num_steps", [2, 4])
def test_the_mirror_holds_the_windows_that_a_stock_table_holds_as_items(
    serve, replay, address, spec, eventually, num_steps
):
    """A window lost or doubled at a chunk's edge, or over an episode's end, would train on what nobody saw."""
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


def test_a_drawn_batch_is_what_the_stock_pipeline_gives_for_the_same_windows(spec):
    """A column gathered from the wrong row, or cast on the way, would train the agent on noise without a word."""
    steps = episode(0, 20)
    mirror = Mirror(spec, num_steps=3, capacity=100)
    add(mirror, steps[:12], acted_at=5)
    add(mirror, steps[10:], acted_at=7)
    batch, acted_at = mirror.gather(tf.constant([0, 9, 10, 18], tf.int64))
    expected = [steps[start : start + 3] for start in (0, 9, 10, 18)]
    for row, window in enumerate(expected):
        stacked = tf.nest.map_structure(lambda *leaves: np.stack(leaves), *window)
        tf.nest.map_structure(lambda a, b, row=row: np.testing.assert_array_equal(a[row], b), batch, stacked)
    assert acted_at.numpy().tolist() == [5, 5, 7, 7]


def test_windows_are_drawn_uniformly(spec):
    """Favouring short or long chunks would weigh episodes by their length."""
    tf.random.set_seed(1)
    mirror = Mirror(spec, num_steps=2, capacity=1_000)
    for first, length in ((0, 3), (100, 40), (200, 7)):
        add(mirror, episode(first, length))
    num_draws = 200_000
    drawn, _ = mirror.draw(num_draws)
    starts, counts = np.unique(drawn.observation.numpy()[:, 0, 0], return_counts=True)
    assert len(starts) == mirror.num_windows == 50
    expected = num_draws / 50
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < 85.4  # 49 degrees of freedom, one in a thousand


def test_the_oldest_chunks_leave_and_their_windows_are_never_drawn_again(spec):
    """A ring that is overwritten under windows still in the list would mix two episodes in one window."""
    mirror = Mirror(spec, num_steps=2, capacity=60)
    for first in range(0, 200_000, 1_000):
        add(mirror, episode(first, 9))
        assert mirror.num_windows <= 60
        windows = held_windows(mirror, 500)
        assert all(second == start + 1 for start, second in windows)
        assert min(start for start, _ in windows) >= first - 6_000


def test_what_is_written_is_drawn_only_once_it_is_revealed(spec):
    """The next call may only see what the samples-per-insert account has counted."""
    mirror = Mirror(spec, num_steps=2, capacity=60)
    add(mirror, episode(0, 9))
    mirror.write(mirror.make_block(as_chunk(episode(1_000, 9))))
    assert max(start for start, _ in held_windows(mirror)) < 1_000
    assert mirror.reveal() == (1, 9)
    assert max(start for start, _ in held_windows(mirror)) >= 1_000


def test_a_full_mirror_has_room_again_once_the_oldest_have_left(spec):
    """The thread that writes must neither overwrite what is drawn nor wait for ever."""
    mirror = Mirror(spec, num_steps=2, capacity=60)
    add(mirror, episode(0, 9))
    before = held_windows(mirror)
    for first in range(1_000, 1_000_000, 1_000):
        block = mirror.make_block(as_chunk(episode(first, 9)))
        if not mirror.has_room(block):
            break
        mirror.write(block)
    assert held_windows(mirror) == before
    mirror.reveal()
    assert mirror.num_windows <= 60
    assert mirror.has_room(block)


def test_a_compiled_call_draws_whole_windows_while_chunks_are_written(spec):
    """Half an old window and half a new one would be a transition that never was."""
    mirror = Mirror(spec, num_steps=2, capacity=40)
    add(mirror, episode(0, 30))
    num_written = 0
    is_over = threading.Event()

    def write_chunks():
        nonlocal num_written
        while not is_over.is_set():
            block = mirror.make_block(as_chunk(episode(1_000 * (num_written % 1_000 + 1), 30)))
            while not mirror.has_room(block) and not is_over.wait(0.001):
                pass
            if not is_over.is_set():
                mirror.write(block)
                num_written += 1

    @tf.function
    def count_broken(num_draws):
        broken = tf.constant(0, tf.int64)
        for _ in tf.range(num_draws):
            windows = mirror.draw(64)[0].observation[..., 0]
            broken += tf.math.count_nonzero(windows[:, 1] - windows[:, 0] != 1.0)
        return broken

    thread = threading.Thread(target=write_chunks)
    thread.start()
    try:
        num_broken = 0
        while num_written < 200 and not num_broken:
            num_broken += int(count_broken(tf.constant(5_000)))
            mirror.reveal()
    finally:
        is_over.set()
        thread.join(10)
    assert num_broken == 0


def test_a_chunk_that_no_mirror_can_hold_ends_training_with_a_word(replay, address, spec, eventually):
    """It is found by a thread; a thread's error alone would leave the learner waiting for data."""
    sampling = sample(num_environments=1)
    sink = dataclasses.replace(replay, replay_buffer_capacity=2_000, chunk_length=2_000).make_sink(
        ReplayServers([address]), sampling
    )
    source = make_source(replay, address, spec)
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


def test_the_learner_waits_for_actors_when_it_is_ahead(replay, address, spec, eventually):
    """With too many updates per step a replay is overfitted; ml-agents and sheeprl both had the ratio wrong."""
    sink = replay.make_sink(ReplayServers([address]), sample())
    source = make_source(replay, address, spec)
    source.restore({})
    assert source.allow(50) == 0
    write(sink, episode(0, 20))
    flush(sink)
    eventually(lambda: source.is_ready() and source.account()["held"] == 20)
    assert source.allow(50) == 15  # 20 - 10 windows, and one call of five
    source.note_updates(15)
    assert source.allow(50) == 0
    write(sink, episode(100, 5))
    flush(sink)
    eventually(lambda: source.allow(50) == 5)
    source.close()


def test_actors_wait_for_the_learner_when_they_are_ahead(replay, address, spec, eventually):
    """Without back-pressure actors flood the server, and samples per insert means nothing."""
    sink = replay.make_sink(ReplayServers([address]), sample())
    source = make_source(replay, address, spec)
    source.restore({})
    num_steps = None
    for number, step in enumerate(episode(0, 400)):
        sink.append(columns(step), RANDOM, np.array([False]))
        if sink.is_blocked():
            num_steps = number
            break
        source.is_ready()
    # Ten of warm-up and one call's five are taken in; then the queue's four chunks of eight, and a few on their way.
    assert num_steps is not None and num_steps < 100
    source.note_updates(100)
    eventually(lambda: source.is_ready() and not sink.is_blocked())
    source.close()


def test_whoever_is_faster_the_ratio_is_kept_to_within_one_call(replay, address, spec):
    """A ratio that is only aimed at drifts with the machine's load, and a run cannot be compared with another."""
    sink = replay.make_sink(ReplayServers([address]), sample())
    source = make_source(replay, address, spec)
    source.restore({})
    steps = (step for number in range(200) for step in episode(1_000 * number, 9))
    worst = 0.0
    for turn in range(160):
        for _ in range(2 if turn % 80 < 30 else 1):  # now the actor is the faster, now the learner
            if not sink.is_blocked():
                sink.append(columns(next(steps)), RANDOM, np.array([False]))
        allowed = source.allow(1 if turn % 80 < 30 else 5)
        source.note_updates(allowed)
        counts = source.counts()
        if counts["samples"]:
            worst = max(worst, abs((counts["inserts"] - 10) * 4.0 - counts["samples"]))
    assert counts["samples"] > 200
    assert worst <= 5 * 4 + 8 * 4  # one call, and a chunk that cannot be taken by halves
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


def test_what_came_after_the_checkpoint_is_an_insert_too(replay, address, spec, eventually):
    """Counted by the checkpoint alone, each restart would let the learner sample less for ever (ml-agents PR#4038)."""
    plan = {"samples_per_insert": 1.0, "num_updates_per_call": 100}
    sink = replay.make_sink(ReplayServers([address]), sample())
    first = make_source(replay, address, spec, **plan)
    first.restore({})
    write(sink, episode(0, 12))
    flush(sink)
    eventually(lambda: first.is_ready() and first.account()["held"] == 12)
    saved = first.counts()
    write(sink, episode(100, 12))  # taken in, but in no checkpoint
    flush(sink)
    eventually(lambda: first.is_ready() and first.account()["held"] == 24)
    first.close()
    sink_of_another = replay.make_sink(ReplayServers([address]), sample())
    write(sink_of_another, episode(200, 12))  # in the queue, taken in by nobody
    flush(sink_of_another)

    second = make_source(replay, address, spec, **plan)
    second.restore(saved)
    assert second.counts()["inserts"] == 36
    eventually(lambda: reverb.Client(address).server_info(timeout=5)[STREAM_TABLE].current_size == 0)
    assert second.is_ready()
    assert (second.counts()["inserts"], len(held_windows(second._mirrors[0]))) == (36, 36), "counted twice"
    second.close()


@pytest.mark.parametrize("max_known", [resident.MAX_KNOWN_CHUNKS, 8])  # 8: as of a replay of millions
def test_what_a_server_that_had_died_brings_back_is_counted_once(serve, spec, eventually, monkeypatch, max_known):
    """Chunks from before the many it lost look new to a restarted learner, which then trains without actors."""
    monkeypatch.setattr(resident, "MAX_KNOWN_CHUNKS", max_known)
    replay = ResidentReplay(replay_buffer_capacity=28, chunk_length=8, stream_length=4)  # 8 chunks on a server
    addresses = [f"localhost:{serve(replay.make_tables(spec, sample())).port}" for _ in range(2)]
    plan = {"samples_per_insert": 1.0, "num_updates_per_call": 1_000}
    sink = replay.make_sink(ReplayServers([addresses[0]]), sample())
    first = make_source(replay, addresses[0], spec, **plan)
    first.restore({})
    write(sink, episode(0, 28))
    eventually(lambda: first.is_ready() and first.account()["inserts"] >= 21)
    saved_by_the_server = first._read_experience(addresses[0])
    write(sink, episode(100, 100))  # which died with the server
    flush(sink)
    eventually(lambda: first.is_ready() and first.account()["inserts"] == 128)
    first.close()

    client = reverb.Client(addresses[1])
    for chunk in saved_by_the_server.values():
        with client.trajectory_writer(num_keep_alive_refs=1) as writer:
            writer.append(chunk)
            item = tf.nest.map_structure(lambda column: column[-1], writer.history)
            writer.create_item(EXPERIENCE_TABLE, priority=1.0, trajectory=item)
            writer.flush()
    second = make_source(replay, addresses[1], spec, **plan)
    second.restore(first.counts())
    assert second.is_ready()
    assert second.account()["held"] > 20
    assert second.account()["inserts"] == 128
    assert second.counts()["counted_before"] == first.counts()["counted_before"] > 0
    second.close()


def test_a_server_that_lost_chunks_is_given_back_what_the_learner_got(serve, spec, eventually, monkeypatch):
    """A learner that dies after its server would come back with what that had saved, at worst with next to nothing."""
    monkeypatch.setattr(resident, "LOOK_FOR_LOSSES_SECS", 0.0)
    replay = ResidentReplay(replay_buffer_capacity=64, chunk_length=16, stream_length=4)
    plan = {"num_steps": 3, "num_environments": 2, "samples_per_insert": 1.0, "num_updates_per_call": 1_000}
    address = f"localhost:{serve(replay.make_tables(spec, sample(**plan))).port}"
    first = make_source(replay, address, spec, **plan)
    first.restore({})
    sink = replay.make_sink(ReplayServers([address]), sample(**plan))
    for number in range(4):
        write(sink, episode(200 * number, 24), episode(200 * number + 100, 24), acted_at=number, crashes=[(11, 1)])
    flush(sink)
    eventually(lambda: first.is_ready() and first.num_chunks == sink.num_chunks)
    sent = first._read_experience(address)

    reverb.Client(address).reset(EXPERIENCE_TABLE)  # as a server does that begins anew from no checkpoint
    eventually(lambda: len(first._read_experience(address)) == len(first._mirrors[0]._chunks))
    given_back = first._read_experience(address)
    for number, chunk in given_back.items():
        valid = int(chunk["length"])
        assert valid == sent[number]["length"]
        for ours, theirs in zip(tf.nest.flatten(chunk["step"]), tf.nest.flatten(sent[number]["step"])):
            np.testing.assert_array_equal(ours[:, :valid], theirs[:, :valid])
        np.testing.assert_array_equal(chunk["acted_at"][:valid], sent[number]["acted_at"][:valid])
        np.testing.assert_array_equal(chunk["ends_run"], sent[number]["ends_run"])
    saved = first.counts()
    first.close()

    second = make_source(replay, address, spec, **plan)
    second.restore(saved)
    assert second.is_ready()
    assert held_windows(second._mirrors[0]) == held_windows(first._mirrors[0])
    assert second.account()["inserts"] == first.account()["inserts"]
    second.close()


def test_a_server_that_began_anew_is_noticed_though_it_counts_more_inserts(serve, replay, spec, eventually):
    """With a checkpoint of just before its death and quick actors it is soon ahead of what the learner saw last."""
    server = serve(replay.make_tables(spec, sample()))
    address = f"localhost:{server.port}"
    losses = resident._Losses(address)
    assert not losses.may_be()
    time.sleep(2.1)  # its life; a real one cannot be shorter
    server.stop()
    serve(replay.make_tables(spec, sample()), port=server.port)
    sink = replay.make_sink(ReplayServers([address]), sample())
    write(sink, episode(0, 28))
    flush(sink)
    eventually(losses.may_be, secs=10)
    losses.forget()
    assert not losses.may_be()


def test_an_actor_whose_clock_is_behind_is_counted_by_a_restarted_learner(replay, address, spec, eventually):
    """Its steps would not count, and the learner wait for steps that are there, for as long as the clocks differ."""
    plan = {"samples_per_insert": 1.0, "num_updates_per_call": 1_000}
    source = make_source(replay, address, spec, **plan)
    source.restore({"inserts": 100, "samples": 0, "counted_before": time.time_ns() + 3_600 * 10**9})
    sink = replay.make_sink(ReplayServers([address]), sample())
    write(sink, episode(0, 12))
    flush(sink)
    eventually(lambda: source.is_ready() and source.account()["held"] == 12)
    assert source.account()["inserts"] == 112
    source.close()


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


def test_images_come_back_bit_by_bit():
    """Eight bits a pixel are a quarter of the memory; a cast on the way would change them."""
    observation = array_spec.BoundedArraySpec((4, 4, 3), np.uint8, 0, 255)
    image_spec = trajectory.Trajectory(
        *(tf.TensorSpec((), tf.int32), tensor_spec.from_spec(observation), tf.TensorSpec((), tf.int64), ()),
        *(tf.TensorSpec((), tf.int32), tf.TensorSpec((), tf.float32), tf.TensorSpec((), tf.float32)),
    )
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), np.uint8)
    steps = [step._replace(observation=image) for step, image in zip(episode(0, 19), images)]
    mirror = Mirror(image_spec, 2, 100)
    add(mirror, steps)
    drawn, _ = mirror.gather(tf.range(19, dtype=tf.int64))
    np.testing.assert_array_equal(drawn.observation.numpy()[:, 0], images[:19])
    assert drawn.observation.dtype == tf.uint8
    assert drawn.step_type.dtype == tf.int32


def test_a_replay_larger_than_the_memory_is_refused_with_the_numbers(address, spec):
    """The operating system would end the learner an hour later, without a word."""
    replay = ResidentReplay(replay_buffer_capacity=10**12)
    with pytest.raises(RoleError, match=r"replay_buffer_capacity = 1,000,000,000,000 takes [\d.]+ GB .*GB\. Lower it"):
        make_source(replay, address, spec)


def test_both_tables_hold_each_chunk(replay, address, spec):
    """What reached the learner alone could not come back from the server."""
    sink = replay.make_sink(ReplayServers([address]), sample())
    write(sink, episode(0, 20))
    flush(sink)
    info = reverb.Client(address).server_info(timeout=5)
    assert info[EXPERIENCE_TABLE].current_size == info[STREAM_TABLE].current_size == 3


def test_a_crashed_episode_gives_no_window_over_the_crash(replay, address, spec, eventually):
    """A step from before the crash followed by one of the fresh environment is a transition that never was."""
    plan = {"num_environments": 2, "initial_collect_steps": 1, "num_updates_per_call": 100}
    sink = replay.make_sink(ReplayServers([address]), sample(**plan))
    source = make_source(replay, address, spec, **plan)
    source.restore({})
    junk = episode(-1, 0)
    crashing = [*episode(0, 30)[:11], *junk, *episode(500, 4)]
    write(sink, crashing, episode(1_000, 16), crashes={(11, 0)})
    flush(sink)
    eventually(lambda: source.is_ready() and source.account()["held"] == 10 + 4 + 16)
    windows = held_windows(source._mirrors[0])
    assert len(windows) == 30
    assert all(second == start + 1 for start, second in windows)
    assert not [start for start, _ in windows if start < 0]
    source.close()


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
