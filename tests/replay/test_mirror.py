"""The ring beside the learner's compute: which windows it holds, and how it draws them."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from tf_agents.specs import array_spec, tensor_spec
from tf_agents.trajectories import trajectory

from actorlearner.replay.mirror import Mirror
from tests.memory import bytes_in_use
from tests.replay.episodes import RANDOM, as_chunk, episode, held_windows


def add(mirror, *lanes, acted_at=RANDOM):
    mirror.add(mirror.make_block(as_chunk(*lanes, acted_at=acted_at)))


def test_a_drawn_batch_is_what_the_stock_pipeline_gives_for_the_same_windows(spec):
    """A column gathered from the wrong row, or cast on the way, would silently train the agent on noise."""
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


def test_a_full_mirror_has_room_for_several_chunks_in_each_call_where_more_follow(spec):
    """With room for one in each call, actors of short episodes wait for a learner that could take more."""
    mirror = Mirror(spec, num_steps=2, capacity=20_000)
    block = mirror.make_block(as_chunk(*[episode(0, 1)] * 20))  # two rows for each window: rows run out first
    while mirror.has_room(block, more_follow=True):
        mirror.write(block)
    mirror.reveal()
    num_held, num_chunks = mirror.num_chunks, 0
    while mirror.has_room(block, more_follow=True):
        mirror.write(block)
        num_chunks += 1
    assert num_chunks >= 5
    mirror.reveal()
    assert mirror.num_windows > 0.98 * 20 * num_held


@dataclasses.dataclass
class Traffic:
    """What happened while one thread wrote chunks and another made compiled calls, each of many draws."""

    num_broken: int = 0  # windows drawn that were none
    written_at: list[float] = dataclasses.field(default_factory=list)  # when each chunk was
    calls: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # when each began and ended


def draw_while_chunks_are_written(spec, *, jit_compile) -> Traffic:
    mirror = Mirror(spec, num_steps=2, capacity=40)
    add(mirror, episode(0, 30))
    traffic = Traffic()
    is_over = threading.Event()

    def write_chunks():
        while not is_over.is_set():
            block = mirror.make_block(as_chunk(episode(1_000 * (len(traffic.written_at) % 1_000 + 1), 30)))
            while not mirror.has_room(block) and not is_over.wait(0.001):
                pass
            if not is_over.is_set():
                mirror.write(block)
                traffic.written_at.append(time.monotonic())

    @tf.function(jit_compile=jit_compile or None)
    def count_broken(num_draws):
        broken = tf.constant(0, tf.int64)
        for _ in tf.range(num_draws):
            windows = mirror.draw(64)[0].observation[..., 0]
            broken += tf.math.count_nonzero(windows[:, 1] - windows[:, 0] != 1.0)
        return broken

    count_broken(tf.constant(5_000))  # compiles
    thread = threading.Thread(target=write_chunks)
    thread.start()
    try:
        while len(traffic.written_at) < 200 and not traffic.num_broken:
            began_at = time.monotonic()
            traffic.num_broken += int(count_broken(tf.constant(5_000)))
            traffic.calls.append((began_at, time.monotonic()))
            mirror.reveal()
    finally:
        is_over.set()
        thread.join(10)
    return traffic


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_compiled_call_draws_whole_windows_while_chunks_are_written(spec, jit_compile):
    """Half an old window and half a new one would be a transition that never was."""
    assert draw_while_chunks_are_written(spec, jit_compile=jit_compile).num_broken == 0


def test_chunks_are_written_while_a_compiled_call_is_under_way(spec):
    """A writer that waited for the end of each call would take in what came meanwhile only between two of them.

    Not so where XLA makes one program of the call: it holds the locks of the variables it reads to its end.
    """
    traffic = draw_while_chunks_are_written(spec, jit_compile=False)
    most = 0
    for began_at, ended_at in traffic.calls:
        half_time = (began_at + ended_at) / 2  # what waited would come after it
        most = max(most, sum(began_at < moment < half_time for moment in traffic.written_at))
    assert most >= 8  # of the 33 there is room for


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


def test_what_was_written_over_leaves_nothing_behind(spec):
    """TensorFlow keeps a tensor of each of Python's numbers that it converts: a learner grew by 140 MB an hour."""
    mirror = Mirror(spec, num_steps=2, capacity=100_000)
    block = mirror.make_block(as_chunk(episode(0, 22)))  # an odd number of rows: each lap has other positions

    def write(num_chunks):
        for _ in range(num_chunks):
            mirror.add(block)

    write(100)
    before = bytes_in_use()
    write(2_000)
    assert bytes_in_use() - before < 500_000  # with Python's numbers it was 2 MB


def windows_that_may_end_early(steps, num_steps, ends_run=None):
    """Returns the first numbers of the windows that a mirror holds of these steps of one environment, in order."""
    spec = tf.nest.map_structure(lambda leaf: tf.TensorSpec(np.shape(leaf), np.asarray(leaf).dtype), steps[0])
    mirror = Mirror(spec, num_steps, 100, windows_may_end_early=True)
    chunk = as_chunk(steps)
    if ends_run is not None:
        chunk["ends_run"] |= ends_run
    mirror.add(mirror.make_block(chunk))
    return [int(window[0]) for window in sorted(held_windows(mirror))]


def test_each_step_that_was_acted_on_opens_a_window_where_windows_may_end_early():
    """Of the last steps before a fall none would be trained on, and falling never be learned."""
    steps = [*episode(0, 7), *episode(100, 9)]
    assert windows_that_may_end_early(steps, 4) == [*range(7), *range(100, 107)]  # the next chunk begins with 107


def test_a_window_that_meets_a_crash_is_none_though_windows_may_end_early():
    """What comes after a crash is another episode, and no step says that this one has ended."""
    steps = [*episode(0, 12)]
    ends_run = np.zeros((1, 13), bool)
    ends_run[0, 5:7] = True  # as the sink marks it: the row that is none, and the one before
    starts = windows_that_may_end_early(steps, 4, ends_run)
    assert starts == [0, 1, 2, 7, 8, 9]
