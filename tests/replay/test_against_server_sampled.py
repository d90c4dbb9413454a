"""What resident replay draws, beside what a Reverb table hands out of the same episodes."""

from __future__ import annotations

import numpy as np
import pytest
import reverb
import tensorflow as tf
from tf_agents.replay_buffers import reverb_replay_buffer, reverb_utils

from actorlearner.replay.mirror import Mirror
from actorlearner.replay.servers import ReplayServers
from actorlearner.replay.uniform import UniformReplay
from actorlearner.replay.windows import REPLAY_TABLE
from tests.replay.episodes import as_chunk, episode, sample

EPISODES = ((0, 3), (100, 40), (200, 7))  # first observation, environment steps: 50 two-step windows
REPLAY = UniformReplay(rate_limiter="min_size")


@pytest.fixture
def address(serve, spec):
    """A server whose table TF-Agents' own observer has filled."""
    address = f"localhost:{serve(REPLAY.make_tables(spec, sample())).port}"
    observer = reverb_utils.ReverbAddTrajectoryObserver(reverb.Client(address), REPLAY_TABLE, sequence_length=2)
    for first, length in EPISODES:
        for step in episode(first, length):
            observer(step)
    observer.close()
    return address


@pytest.fixture
def mirror(spec):
    mirror = Mirror(spec, num_steps=2, capacity=1_000)
    for first, length in EPISODES:
        mirror.add(mirror.make_block(as_chunk(episode(first, length))))
    return mirror


def test_a_batch_is_what_tf_agents_own_pipeline_gives_for_the_same_windows(address, mirror, spec):
    """An agent that was tuned with the one must learn the same from the other."""
    buffer = reverb_replay_buffer.ReverbReplayBuffer(
        spec, sequence_length=2, table_name=REPLAY_TABLE, server_address=address, dataset_buffer_size=1
    )
    stock, _ = next(iter(buffer.as_dataset(sample_batch_size=256, num_steps=2)))
    windows = [first + number for first, length in EPISODES for number in range(length)]  # in the mirror's order
    indices = [windows.index(observation) for observation in stock.observation.numpy()[:, 0, 0]]
    assert len(set(indices)) > 40
    ours, _ = mirror.gather(tf.constant(indices, tf.int64))
    tf.nest.assert_same_structure(ours, stock)
    tf.nest.map_structure(np.testing.assert_array_equal, ours, stock)


def test_windows_are_drawn_as_evenly_as_the_server_samples_them(address, mirror, spec):
    """Favouring some would be another algorithm than the one that was configured."""
    tf.random.set_seed(1)
    num_draws = 20_000
    source = REPLAY.make_source(
        ReplayServers([address]), spec, sample(batch_size=num_draws // 20), tf.distribute.get_strategy()
    )
    sampled = np.concatenate([next(source.handle)[0].observation.numpy()[:, 0, 0] for _ in range(20)])
    drawn = mirror.draw(num_draws)[0].observation.numpy()[:, 0, 0]
    windows = np.unique(sampled)
    assert len(windows) == mirror.num_windows == 50
    counts = np.array([[np.count_nonzero(starts == window) for window in windows] for starts in (sampled, drawn)])
    assert counts.sum() == 2 * num_draws, "both draw the same windows"
    expected = counts.mean(axis=0)
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < 112  # 49 degrees of freedom, one in a million: Reverb's sampler cannot be seeded
