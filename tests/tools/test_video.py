"""Videos last as long as the task did and show it."""

import functools
import resource

import numpy as np
import pytest

from actorlearner.tools import video
from actorlearner.tools.recording import episodes, policies

imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")


def _cart_pole(max_episode_steps=300):
    from tf_agents.environments import suite_gym

    environment = suite_gym.load("CartPole-v1", max_episode_steps=max_episode_steps)
    environment.seed(1)
    return environment


def _minitaur(max_episode_steps=9):
    from tf_agents.environments import suite_pybullet

    environment = suite_pybullet.load("MinitaurBulletEnv-v0", max_episode_steps=max_episode_steps)
    environment.seed(1)
    return environment


def _balance(time_step):
    position, velocity, angle, angular_velocity = time_step.observation
    return np.int64(10 * angle + 2 * angular_velocity + 0.3 * position + 0.5 * velocity > 0)


def _read(path):
    """Returns a video's metadata and its frames, decoded, [N, H, W, 3]."""
    reader = imageio_ffmpeg.read_frames(str(path))
    metadata = next(reader)
    width, height = metadata["size"]
    return metadata, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


class _Wrapped:
    """A real environment with another picture."""

    def __init__(self, environment, change):
        self._environment = environment
        self._change = change

    def __getattr__(self, name):
        return getattr(self._environment, name)

    def render(self):
        return self._change(self._environment.render())


def _save_policy(directory, policy):
    from tf_agents.policies import policy_saver

    policy_saver.PolicySaver(policy, batch_size=None).save(str(directory))


def _specs(environment):
    from tf_agents.specs import tensor_spec

    return tensor_spec.from_spec(environment.time_step_spec()), tensor_spec.from_spec(environment.action_spec())


def test_cart_pole_plays_at_the_speed_of_the_task(tmp_path):
    """The tutorials' 30 frames/s show CartPole's 50 steps/s in slow motion: 40 seconds held would last 67 seconds."""
    path = tmp_path / "videos" / "cart_pole.mp4"
    info = episodes.record_episodes(_cart_pole(), _balance, path, num_episodes=1, steps_per_second=50)
    assert info == episodes.VideoInfo(path, 151, 25.0, 151 / 25, (300.0,), (300,))
    metadata, frames = _read(path)
    assert metadata["fps"] == 25
    assert metadata["duration"] == pytest.approx(300 / 50, abs=1 / 25 + 0.01)
    assert metadata["codec"] == "h264"
    assert metadata["pix_fmt"].startswith("yuv420p")
    assert frames.shape == (151, 400, 600, 3)
    assert abs(frames[0].astype(int) - frames[-1]).max() > 100, "the cart never moved"
    head = path.read_bytes()
    assert head.index(b"moov") < head.index(b"mdat"), "a browser would have to fetch the whole file before it starts"
    assert list(path.parent.iterdir()) == [path]


def test_episodes_follow_one_another_each_from_its_reset(tmp_path):
    """Lengths off the frame grid must neither drop an episode's first frame nor stretch the video."""
    shown = []

    def note(frame):
        shown.append(frame)
        return frame

    environment = _Wrapped(_cart_pole(max_episode_steps=7), note)
    info = episodes.record_episodes(environment, _balance, tmp_path / "x.mp4", num_episodes=3, steps_per_second=50)
    assert info.lengths == (7, 7, 7)
    assert info.returns == (7.0, 7.0, 7.0)
    metadata, frames = _read(info.path)
    assert len(frames) == info.num_frames == len(shown) == 3 * 4  # the reset and steps 2, 4, 6
    for frame, given in zip(frames, shown):
        assert abs(frame.astype(int) - given).mean() < 2
    assert metadata["duration"] == pytest.approx(info.seconds, abs=0.02)


@pytest.mark.parametrize(
    ("steps_per_second", "max_frames_per_second", "steps_per_frame"),
    [
        (50, 30, 2),
        (100, 30, 4),
        (30, 30, 1),
        (10, 30, 1),
        (60, 30, 2),
        (61, 30, 3),
        (1 / (1 / 30), 30, 1),
        (240, 60, 4),
    ],
)
def test_frame_rate_is_the_highest_within_bounds(steps_per_second, max_frames_per_second, steps_per_frame):
    assert episodes.count_steps_per_frame(steps_per_second, max_frames_per_second) == steps_per_frame


def test_minitaur_is_shown_smaller_and_left_as_it_was(tmp_path):
    """Its own 960x720 takes a quarter of a second a frame; the size is a module constant that others share."""
    from pybullet_envs.bullet import minitaur_gym_env

    environment = _minitaur()
    act = policies.random_act(environment, seed=1)
    info = episodes.record_episodes(
        environment, act, tmp_path / "x.mp4", num_episodes=1, steps_per_second=100, max_render_width=160
    )
    metadata, frames = _read(info.path)
    assert metadata["fps"] == info.fps == 25
    assert info.lengths == (9,)
    assert frames.shape == (3, 120, 160, 3)  # the reset and steps 4, 8
    assert frames.std(axis=(1, 2)).min() > 10, "a blank picture"
    assert (minitaur_gym_env.RENDER_WIDTH, minitaur_gym_env.RENDER_HEIGHT) == (960, 720)


def test_odd_sizes_and_alpha_are_made_to_fit(tmp_path):
    """H.264 with yuv420p takes no odd sides."""
    environment = _Wrapped(
        _cart_pole(max_episode_steps=4), lambda frame: np.dstack([frame[:301, :401], frame[:301, :401, 0]])
    )
    info = episodes.record_episodes(environment, _balance, tmp_path / "x.mp4", num_episodes=1, steps_per_second=50)
    _, frames = _read(info.path)
    assert frames.shape == (3, 302, 402, 3)


def test_max_steps_cuts_each_episode(tmp_path):
    info = episodes.record_episodes(
        _cart_pole(), _balance, tmp_path / "x.mp4", num_episodes=2, steps_per_second=20, max_steps=5
    )
    assert (info.lengths, info.num_frames, info.fps) == ((5, 5), 12, 20)


def test_failed_recording_leaves_the_older_video_alone(tmp_path):
    """A crash half-way must not put an unplayable file where a good one was."""
    path = tmp_path / "x.mp4"
    path.write_bytes(b"older")

    def give_up(time_step):
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        episodes.record_episodes(_cart_pole(), give_up, path, num_episodes=1, steps_per_second=50)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_is_an_error_and_not_a_short_video(tmp_path):
    """The encoder's wrapper does not look at how the encoder ended."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    environment = _Wrapped(_cart_pole(), lambda frame: np.random.randint(0, 256, (480, 640, 3), np.uint8))
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (500_000, limits[1])
    )  # stands in for a full disk; less than a frame's noise
    try:
        with pytest.raises(OSError, match="is the disk full"):
            episodes.record_episodes(
                environment, _balance, tmp_path / "x.mp4", num_episodes=1, steps_per_second=50, max_steps=40
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_episodes": 0}, "num_episodes is 0"),
        ({"steps_per_second": 0}, "steps_per_second is 0"),
        ({"max_frames_per_second": float("nan")}, "max_frames_per_second is nan"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"max_render_width": 0}, "max_render_width is 0"),
    ],
)
def test_bad_setting_is_named(tmp_path, changed, said):
    settings = {"num_episodes": 1, "steps_per_second": 50, **changed}
    with pytest.raises(ValueError, match=said):
        episodes.record_episodes(_cart_pole(), _balance, tmp_path / "x.mp4", **settings)
    assert not list(tmp_path.iterdir())


def test_environment_without_a_picture_is_named(tmp_path):
    environment = _Wrapped(_cart_pole(), lambda frame: None)
    with pytest.raises(ValueError, match="returned NoneType"):
        episodes.record_episodes(environment, _balance, tmp_path / "x.mp4", num_episodes=1, steps_per_second=50)


def test_random_act_repeats_with_its_seed():
    environment = _cart_pole()
    time_step = environment.reset()

    def draw(seed):
        act = policies.random_act(environment, seed=seed)
        return [int(act(time_step)) for _ in range(30)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert set(draw(3)) == {0, 1}


def test_run_is_recorded_with_its_saved_policy_and_with_a_random_one(tmp_path):
    """The saved policy is what acts: it has to choose what the policy it was saved from chooses."""
    import tensorflow as tf
    from tf_agents.networks import q_network
    from tf_agents.policies import greedy_policy, q_policy
    from tf_agents.trajectories import time_step as ts

    environment = _cart_pole(max_episode_steps=20)
    time_step_spec, action_spec = _specs(environment)
    tf.random.set_seed(1)
    network = q_network.QNetwork(time_step_spec.observation, action_spec, fc_layer_params=(8,))
    policy = greedy_policy.GreedyPolicy(q_policy.QPolicy(time_step_spec, action_spec, network))
    _save_policy(tmp_path / "policies" / "greedy_policy", policy)

    act = policies.saved_model_act(tmp_path / "policies" / "greedy_policy")
    observations = np.random.RandomState(1).uniform(-1, 1, (40, 4)).astype(np.float32)
    wanted = policy.action(ts.restart(tf.constant(observations), batch_size=40)).action.numpy()
    actions = [act(ts.restart(observation)) for observation in observations]
    assert {0, 1} == set(wanted), "the test's policy does not choose"
    np.testing.assert_array_equal(actions, wanted)
    assert actions[0].shape == ()
    assert actions[0].dtype == environment.action_spec().dtype

    (tmp_path / "summary.json").write_text('{"train_steps": 100}')
    recorded = video.record_run(
        tmp_path, functools.partial(_cart_pole, max_episode_steps=20), 50, num_episodes=2, seed=5
    )
    assert list(recorded) == ["trained_policy", "random_policy"]
    trained, random = recorded.values()
    assert trained.path == tmp_path / "videos" / "trained_policy.mp4"
    assert random.path == tmp_path / "videos" / "random_policy.mp4"
    for info in (trained, random):
        assert len(info.lengths) == 2
        _, frames = _read(info.path)
        assert len(frames) == info.num_frames
    first_frames = [_read(info.path)[1][0].astype(int) for info in (trained, random)]
    assert abs(first_frames[0] - first_frames[1]).mean() < 1, "both should start from the same state"


@pytest.mark.parametrize(
    ("train_step", "summary", "title"),
    [
        (9_000, None, "the policy of train step 9,000 of a run that has not ended"),
        (9_000, '{"has_ended": false}', "the policy of train step 9,000 of a run that has not ended"),
        (9_000, '{"has_ended": true}', "the policy of train step 9,000 of a run that has ended"),
        (0, '{"has_ended": true}', "the policy of train step 0 of a run that has ended"),  # it delivers its best
        (0, None, None),
    ],
)
def test_a_video_says_which_train_step_it_shows_and_shows_no_untrained_policy_as_the_runs(
    tmp_path, train_step, summary, title
):
    """That of a run which had not ended showed the policy of train step 0 and was called trained."""
    import tensorflow as tf
    from tf_agents.policies import policy_saver, random_tf_policy
    from tf_agents.trajectories import time_step as ts

    specs = _specs(_cart_pole())
    policy = random_tf_policy.RandomTFPolicy(ts.time_step_spec(specs[0].observation), specs[1])
    saver = policy_saver.PolicySaver(policy, batch_size=None, train_step=tf.Variable(train_step, dtype=tf.int64))
    saver.save(str(tmp_path / "policies" / "greedy_policy"))
    if summary:
        (tmp_path / "summary.json").write_text(summary)

    def record():
        make_environment = functools.partial(_cart_pole, max_episode_steps=4)
        return video.record_run(tmp_path, make_environment, 50, num_episodes=1, names=["trained_policy"])

    if title is None:
        with pytest.raises(ValueError, match="No trained policy in .* yet: it has that of train step 0"):
            record()
        return
    info = record()["trained_policy"]
    assert info.title == title
    assert title.encode() in info.path.read_bytes(), "players show it"


def test_saved_policy_keeps_its_state_within_an_episode_only(tmp_path):
    """A recurrent policy whose state is lost at every step, or kept across episodes, acts as another policy."""
    import tensorflow as tf
    from tf_agents.policies import tf_policy
    from tf_agents.trajectories import policy_step

    class Alternate(tf_policy.TFPolicy):
        """Pushes left, right, left, right, ... from the start of each episode."""

        def _variables(self):
            return []

        def _action(self, time_step, policy_state, seed):
            return policy_step.PolicyStep(tf.cast(policy_state % 2, tf.int64), policy_state + 1, ())

    environment = _cart_pole()
    time_step_spec, action_spec = _specs(environment)
    policy = Alternate(
        time_step_spec,
        action_spec,
        policy_state_spec=tf.TensorSpec((), tf.int32),
        automatic_state_reset=False,  # else TF-Agents would reset it and this would show nothing
    )
    _save_policy(tmp_path, policy)
    act = policies.saved_model_act(tmp_path)
    for _ in range(2):
        time_step = environment.reset()
        actions = []
        for _ in range(5):
            actions.append(int(act(time_step)))
            time_step = environment.step(np.int64(actions[-1]))
        assert actions == [0, 1, 0, 1, 0]


def test_missing_policy_is_named(tmp_path):
    """TensorFlow's own message speaks of a file 'saved_model.pbtxt|saved_model.pb' and no remedy."""
    with pytest.raises(ValueError, match="No saved policy in .*greedy_policy"):
        video.record_run(tmp_path, _cart_pole, 50)
    with pytest.raises(ValueError, match="no video named 'trained'"):
        video.record_run(tmp_path, _cart_pole, 50, names=["trained"])
