"""Server-sampled replay: an actor's side of it, and what the learner's makes of strangers' items."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import reverb
import tensorflow as tf
import tree

from actorlearner.replay.servers import ReplayServers
from actorlearner.replay.uniform import UniformReplay
from actorlearner.replay.windows import REPLAY_TABLE
from tests.replay.episodes import RANDOM, columns, episode, flush, sample

NUM_ENVIRONMENTS = 3


def test_an_actor_ends_though_its_server_takes_nothing_more(serve, spec):
    """Training is over and no process samples: it would wait for the rate limiter for ever."""
    replay = UniformReplay(error_buffer=8.0)
    address = f"localhost:{serve(replay.make_tables(spec, sample())).port}"
    sink = replay.make_sink(ReplayServers([address]), sample(num_environments=NUM_ENVIRONMENTS))
    for step in episode(0, 60):
        sink.append(columns(*[step] * NUM_ENVIRONMENTS), RANDOM, np.zeros(NUM_ENVIRONMENTS, bool))
    assert sink.is_blocked()
    closing = threading.Thread(target=sink.close, args=(0.5,), daemon=True)
    closing.start()
    closing.join(timeout=30.0)
    assert not closing.is_alive()


STEP = episode(0, 3)[1]
STRAYS = {  # a step, and how many of them make an item
    "other leaves": ({"nothing": np.zeros(3, np.float32)}, 2),
    "another shape": (STEP._replace(observation=np.zeros(2, np.float32)), 2),
    "another type": (STEP._replace(reward=np.float64(0.0)), 2),
    "another length": (STEP, 3),  # which Reverb lets pass
    "a NaN": (STEP._replace(reward=np.float32(np.nan)), 2),
    "an infinity": (STEP._replace(observation=np.array([-np.inf], np.float32)), 2),
    "a reward that overflows": (STEP._replace(reward=np.float32(1e38)), 2),
    "an action that there is none of": (STEP._replace(action=np.int64(2)), 2),
    "an unknown kind of step": (STEP._replace(step_type=np.int32(7)), 2),
}


def insert_stray(address, step, num_steps, num_items=1):
    """Inserts an item that does not fit, as a client without checks can."""
    with reverb.Client(address).trajectory_writer(num_keep_alive_refs=num_steps, validate_items=False) as writer:
        for _ in range(num_steps):
            writer.append(step)
        for _ in range(num_items):
            item = tree.map_structure(lambda column: column[-num_steps:], writer.history)
            writer.create_item(REPLAY_TABLE, 1.0, item)
        writer.flush(timeout_ms=10_000)


@pytest.fixture
def collected(serve, spec):
    """A replay, and the address of its server, which holds the windows of one episode."""
    replay = UniformReplay(rate_limiter="min_size")
    address = f"localhost:{serve(replay.make_tables(spec, sample())).port}"
    sink = replay.make_sink(ReplayServers([address]), sample())
    for step in episode(0, 60):
        sink.append(columns(step), RANDOM, np.zeros(1, bool))
    flush(sink)
    return replay, address


@pytest.fixture
def make_source(collected, spec):
    """`make_source(**changes)` returns a source of that replay; it ends before the server does."""
    replay, address = collected
    sources = []

    def make(**changes):
        plan = sample(**changes)
        sources.append(replay.make_source(ReplayServers([address]), spec, plan, tf.distribute.get_strategy()))
        return sources[-1]

    yield make
    for source in sources:
        source.handle = None  # its threads would ask for ever


@pytest.mark.parametrize("kind", STRAYS)
@pytest.mark.parametrize("batch_size", [1, 32])
def test_strangers_items_are_left_out_with_one_warning_and_batches_keep_coming(
    collected, make_source, caplog, kind, batch_size
):
    """The item stays in the table: each new learner would end at it too, until the launcher gave up."""
    _, address = collected
    insert_stray(address, *STRAYS[kind], num_items=30)  # each batch of 32 would have some
    source = make_source(batch_size=batch_size)

    @tf.function
    def draw(handle):
        return source.draw(handle)[0].observation

    drawn: list[np.ndarray] = []
    while len(drawn) < 40:
        try:
            drawn.append(draw(source.handle).numpy())
        except tf.errors.InvalidArgumentError as error:
            assert source.leave_out(error), error
            source.renew()
    windows = np.concatenate(drawn)[..., 0]
    np.testing.assert_array_equal(windows[:, 1], windows[:, 0] + 1)
    assert windows.shape == (40 * batch_size, 2)
    (warning,) = caplog.messages
    assert warning.startswith(f"an item in the table '{REPLAY_TABLE}' at {address} is not this experiment's: ")
    assert warning.endswith("keep the port on a network you trust.")
    assert "Table signature" not in warning, "one line that says why"


def test_an_update_that_fails_is_not_taken_for_a_strangers_item(make_source):
    """The check for a NaN is an error of the same kind; passed over, training would go on with broken weights."""
    source = make_source()

    @tf.function
    def train(handle):
        return tf.debugging.check_numerics(source.draw(handle)[0].reward / 0.0, "the loss")

    with pytest.raises(tf.errors.InvalidArgumentError, match="the loss : Tensor had Inf values") as raised:
        train(source.handle)
    assert not source.leave_out(raised.value)


def test_each_step_that_was_acted_on_opens_an_item_where_windows_may_end_early(serve, spec):
    """As in the resident replay: of the last steps before a fall none would be trained on."""
    plan = sample(num_steps=4, windows_may_end_early=True, initial_collect_steps=5)
    replay = UniformReplay(rate_limiter="min_size")
    address = f"localhost:{serve(replay.make_tables(spec, plan)).port}"
    sink = replay.make_sink(ReplayServers([address]), plan)
    for first, length in ((0, 7), (100, 2)):
        for step in episode(first, length):
            sink.append(columns(step), RANDOM, np.zeros(1, bool))
            while sink.is_blocked():
                pass
    flush(sink)
    client = reverb.Client(address)
    items = {}
    for drawn in client.sample(REPLAY_TABLE, num_samples=300, emit_timesteps=False):
        observations = drawn.data[1][:, 0].tolist()
        items[observations[0]] = observations
    assert sorted(items) == [*range(7), 100, 101]
    assert items[3] == [3, 4, 5, 6]
    assert items[5] == [5, 6, 7, 7]
    assert items[101] == [101, 102, 102, 102]


def test_observations_are_counted_when_an_item_is_drawn_for_the_first_time(serve, spec):
    """Counted at each draw, an observation would weigh as often as chance draws it."""
    replay, plan = UniformReplay(rate_limiter="min_size"), sample(num_steps=2, batch_size=16, initial_collect_steps=50)
    address = f"localhost:{serve(replay.make_tables(spec, plan)).port}"
    servers = ReplayServers([address])
    sink = replay.make_sink(servers, plan)
    for step in episode(0, 60):
        sink.append(columns(step), RANDOM, np.zeros(1, bool))
        while sink.is_blocked():
            pass
    flush(sink)
    source = replay.make_source(servers, spec, plan, tf.distribute.get_strategy())
    source.count_observations()
    source.look_first()
    (first,) = source.take_moments()
    assert 16 < first.count <= 60
    draw = tf.function(lambda handle: source.unpack(*source.draw(handle)))
    for _ in range(60):
        draw(source.handle)
    source.note_updates(60)
    (second,) = source.take_moments()
    assert first.count + second.count == 60
    total = first.mean * first.count + second.mean * second.count
    np.testing.assert_allclose(total, [sum(range(60))])
