"""Videos of a policy at work: H.264 files that play at the speed of the task itself, made without a display."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional, Protocol, Union, final

import numpy as np

from actorlearner.runtime.health import beat

# SDL reads these when pygame starts, and gym imports pygame when it makes its first environment: set them before both.
# With the dummy drivers pygame draws into memory, opens no window and does not complain about missing sound cards.
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

# Takes a TF-Agents TimeStep without a batch dimension, returns an action without one.
Act = Callable[[Any], Any]
PathLike = Union[str, "os.PathLike[str]"]


class Environment(Protocol):
    """What is used of a TF-Agents `PyEnvironment`; named here so that this module imports without TensorFlow."""

    @property
    def batched(self) -> bool: ...

    def reset(self) -> Any: ...

    def step(self, action: Any) -> Any: ...

    def render(self) -> Any: ...

    def seed(self, seed: Any) -> Any: ...

    def close(self) -> None: ...

    def time_step_spec(self) -> Any: ...

    def action_spec(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What was recorded.

    Attributes:
      path: The finished mp4.
      num_frames: Frames in it, all episodes together.
      fps: Frames per second of its playback.
      seconds: `num_frames / fps`; within a frame per episode of the time the task would have taken.
      returns: Undiscounted return of each episode, in order.
      lengths: Environment steps of each episode, in order.
    """

    path: pathlib.Path
    num_frames: int
    fps: float
    seconds: float
    returns: tuple[float, ...]
    lengths: tuple[int, ...]


def record_episodes(
    environment: Environment,
    act: Act,
    path: PathLike,
    *,
    num_episodes: int,
    steps_per_second: float,
    max_frames_per_second: float = 30,
    max_steps: int | None = None,
    max_render_width: int = 480,
) -> VideoInfo:
    """Returns what it recorded, once `num_episodes` episodes lie one after the other in a finished mp4 at `path`.

    Played back, a second of video is a second of the task. Each episode's frames are its reset and every k-th step
    after it, with the least k that keeps within `max_frames_per_second`: CartPole (50 steps/s) and Minitaur (100)
    both come out at 25 frames/s. A last step off that grid is not shown, because it would stretch the video.

    Blocks until the episodes have ended, which an environment without a time limit need not do: give such a one
    `max_steps`. Frames go to the encoder one by one. The file appears under its name only when complete, replacing
    one that is there; a recording that fails leaves nothing.

    Args:
      environment: Unbatched; it is reset at the start of each episode, not closed. Rendered frames are uint8 [H, W, 3].
      act: Called once per step with the latest time step.
      path: Where the mp4 goes; its directory is made if missing.
      num_episodes: At least 1.
      steps_per_second: Control rate of the task.
      max_frames_per_second: Upper bound on the playback rate.
      max_steps: Cut each episode after this many environment steps. None: let it end by itself.
      max_render_width: PyBullet environments that would render wider are made to render at this width, in pixels, at
        the same proportions; its software renderer takes 0.2 to 0.4 us a pixel. Others (gym's own) render as they do.

    Raises:
      ValueError: A setting is out of range, the environment is batched, or it renders something other than an image.
      OSError: The encoder failed, or the directory cannot be written.
    """
    if num_episodes < 1:
        raise ValueError(f"num_episodes is {num_episodes}; a video needs at least 1.")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}; it must be at least 1, or None to let episodes end by themselves.")
    if max_render_width < 16:
        raise ValueError(f"max_render_width is {max_render_width}; it must be at least 16 pixels.")
    if environment.batched:
        raise ValueError("The environment is batched; a video shows one environment, so pass the one inside it.")
    steps_per_frame = _steps_per_frame(steps_per_second, max_frames_per_second)
    returns: list[float] = []
    lengths: list[int] = []
    with _render_at_most(environment, max_render_width), _Mp4Writer(path, steps_per_second / steps_per_frame) as mp4:
        for _ in range(num_episodes):
            time_step = environment.reset()
            mp4.append(environment.render())
            episode_return, length = 0.0, 0
            while not time_step.is_last() and length != max_steps:
                time_step = environment.step(act(time_step))
                beat()  # the learner's videos may take minutes
                length += 1
                episode_return += float(time_step.reward)
                if length % steps_per_frame == 0:
                    mp4.append(environment.render())
            returns.append(episode_return)
            lengths.append(length)
    return VideoInfo(mp4.path, mp4.num_frames, mp4.fps, mp4.num_frames / mp4.fps, tuple(returns), tuple(lengths))


def record_run(
    root_dir: PathLike,
    make_environment: Callable[[], Environment],
    steps_per_second: float,
    *,
    num_episodes: int = 3,
    seed: int = 0,
    max_steps: int | None = None,
    names: Sequence[str] = ("trained_policy", "random_policy"),
) -> dict[str, VideoInfo]:
    """Returns what it recorded of a run's greedy policy and of the random policy beside it, by name.

    Writes `videos/trained_policy.mp4` and `videos/random_policy.mp4` into the run directory. Both environments get the
    same seed, so both policies start from the same states.

    Records one after the other in this process, since TensorFlow does not survive a fork and neither gin's bindings nor
    `make_environment` need survive a spawn. Rendering keeps one core busy; a caller with two can start two processes,
    each with one of the `names`.

    Args:
      root_dir: The run directory; the trained policy is its `policies/greedy_policy`, and as long as training has not
        ended, or goes on past its end, that with the weights of the newest of `policies/checkpoints`.
      make_environment: Called once per video; what it returns is closed here.
      steps_per_second: Control rate of the task.
      num_episodes: Episodes in each video.
      seed: For the environments and the random policy.
      max_steps: As for `record_episodes`.
      names: Which of the two to record.

    Raises:
      ValueError: The run directory has no policy that can be loaded; a name is unknown; and as `record_episodes`.
      OSError: As `record_episodes`.
    """
    root_dir = pathlib.Path(root_dir)
    make_act: dict[str, Callable[[Environment], Act]] = {
        "trained_policy": lambda environment: saved_model_act(
            root_dir / "policies" / "greedy_policy", find_newer_weights(root_dir)
        ),
        "random_policy": lambda environment: random_act(environment, seed=seed),
    }
    unknown = sorted(set(names) - set(make_act))
    if unknown:
        raise ValueError(f"There is no video named {unknown[0]!r}; names may hold {', '.join(make_act)}.")
    recorded = {}
    for name in names:
        environment = make_environment()
        try:
            with contextlib.suppress(NotImplementedError):  # TF-Agents' answer of an environment that takes no seed
                environment.seed(seed)
            recorded[name] = record_episodes(
                environment,
                make_act[name](environment),
                root_dir / "videos" / f"{name}.mp4",
                num_episodes=num_episodes,
                steps_per_second=steps_per_second,
                max_steps=max_steps,
            )
        finally:
            environment.close()
    return recorded


def random_act(environment: Environment, seed: int | None = None) -> Act:
    """Returns an act function that draws actions uniformly from the environment's action spec.

    Source: tf_agents.policies.random_py_policy, as both tutorials use it.
    """
    from tf_agents.policies import random_py_policy

    policy = random_py_policy.RandomPyPolicy(environment.time_step_spec(), environment.action_spec(), seed=seed)

    def act(time_step: Any) -> Any:
        return policy.action(time_step).action

    return act


def find_newer_weights(root_dir: PathLike) -> Optional[pathlib.Path]:
    """Returns the newest whole policy checkpoint of a run under way; None once its SavedModels hold what it delivered.

    Raises:
      ValueError: It is under way and has no checkpoint yet: its SavedModels hold the weights that it began with.
    """
    root_dir = pathlib.Path(root_dir)
    found = root_dir.glob("policies/checkpoints/policy_checkpoint_*/variables/variables.index")
    newest = max(found, default=None)  # the names' numbers have as many digits
    try:
        ended_at = json.loads((root_dir / "summary.json").read_text(encoding="utf-8"))["train_steps"]
    except (OSError, ValueError, KeyError):
        ended_at = None
    if newest is None:
        if ended_at is None and (root_dir / "policies" / "greedy_policy").is_dir():
            raise ValueError(
                f"No trained policy in {root_dir} yet: the first comes after train.policy_save_interval train steps."
            )
        return None
    step = int(newest.parents[1].name.rpartition("_")[2])
    return newest.with_suffix("") if ended_at is None or step > ended_at else None


def saved_model_act(policy_dir: PathLike, checkpoint: Optional[PathLike] = None) -> Act:
    """Returns an act function that acts as a policy saved by TF-Agents' `PolicySaver`.

    The function carries the policy's state, where it has one, from step to step and starts afresh at the first step of
    each episode: use it for one environment at a time. It adds and strips the batch dimension. The policy's networks
    are loaded; the code that made them is not needed.

    Args:
      policy_dir: A SavedModel written by `PolicySaver.save`, e.g. `<run>/policies/greedy_policy`.
      checkpoint: Prefix of one written by `PolicySaver.save_checkpoint`, whose weights replace the SavedModel's.

    Raises:
      ValueError: There is no such SavedModel, it is not a policy, or the checkpoint does not fit it.
    """
    policy_dir = pathlib.Path(policy_dir)
    for needed in ("saved_model.pb", "policy_specs.pbtxt"):
        if not (policy_dir / needed).is_file():
            raise ValueError(
                f"No saved policy in {policy_dir}: it has no {needed}. Pass a directory that PolicySaver wrote, such as"
                " policies/greedy_policy of a run that has saved its policies."
            )
    import tensorflow as tf
    from tf_agents.policies import policy_saver
    from tf_agents.specs import tensor_spec

    specs = policy_saver.specs_from_collect_data_spec(
        tensor_spec.from_pbtxt_file(str(policy_dir / "policy_specs.pbtxt"))
    )
    input_specs = (specs["time_step_spec"], specs["policy_state_spec"])
    flat_specs = tf.nest.flatten(input_specs)
    try:
        policy = tf.saved_model.load(str(policy_dir))
        if checkpoint:
            weights = tf.train.Checkpoint(policy=policy).read(str(checkpoint))
            weights.assert_existing_objects_matched().expect_partial()
        initial_state = policy.get_initial_state(batch_size=1) if specs["policy_state_spec"] else ()
    except Exception as error:
        raise ValueError(f"The saved policy in {checkpoint or policy_dir} cannot be loaded: {error}") from error

    # One concrete function on flat tensors, which batches and unbatches inside the graph, takes about half the time of
    # SavedModelPyTFEagerPolicy.action: seconds over the 9,000 steps of a CartPole video.
    @tf.function(input_signature=[tf.TensorSpec(spec.shape, spec.dtype) for spec in flat_specs])
    def policy_step(*flat_inputs: Any) -> Any:
        time_step, state = tf.nest.pack_sequence_as(input_specs, [value[tf.newaxis] for value in flat_inputs])
        step = policy.action(time_step, state)
        return tf.nest.map_structure(lambda value: value[0], (step.action, step.state))

    concrete_policy_step = policy_step.get_concrete_function()
    initial_state = tf.nest.map_structure(lambda value: value[0], initial_state)
    state = initial_state

    def act(time_step: Any) -> Any:
        nonlocal state
        inputs = tf.nest.flatten((time_step, initial_state if time_step.is_first() else state))
        action, state = concrete_policy_step(
            *(tf.constant(value, dtype=spec.dtype) for value, spec in zip(inputs, flat_specs))
        )
        return tf.nest.map_structure(lambda value: value.numpy(), action)

    return act


def _steps_per_frame(steps_per_second: float, max_frames_per_second: float) -> int:
    """Returns the least k with `steps_per_second / k <= max_frames_per_second`."""
    for name, value in (("steps_per_second", steps_per_second), ("max_frames_per_second", max_frames_per_second)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}; it must be a number above 0, such as 50 for CartPole.")
    # The tolerance forgives rates such as 1 / (1 / 30), a hair above the bound.
    return max(1, math.ceil(steps_per_second / max_frames_per_second - 1e-6))


@contextlib.contextmanager
def _render_at_most(environment: Environment, width: int) -> Iterator[None]:
    """Has PyBullet environments render at most `width` pixels wide while the context lasts.

    PyBullet's environments take no size argument. They read one either from attributes (`_render_width`) or, as
    Minitaur does at 960x720, from constants of the module that defines `render`, so those are changed and put back.
    """
    gym_environment = getattr(getattr(environment, "gym", None), "unwrapped", None)
    render = inspect.unwrap(getattr(type(gym_environment), "render", lambda: None))
    homes: tuple[tuple[dict[str, Any], str, str], ...] = (
        (getattr(gym_environment, "__dict__", {}), "_render_width", "_render_height"),
        (getattr(render, "__globals__", {}), "RENDER_WIDTH", "RENDER_HEIGHT"),
    )
    changed: list[tuple[dict[str, Any], dict[str, int]]] = []
    for home, width_name, height_name in homes:
        if width_name in home and height_name in home and home[width_name] > width:
            before = {name: home[name] for name in (width_name, height_name)}
            changed.append((home, before))
            home[width_name] = width
            home[height_name] = round(before[height_name] * width / before[width_name])
    try:
        yield
    finally:
        for home, before in changed:
            home.update(before)


@final
class _Mp4Writer:
    """Streams frames into an H.264 file, which gets its name when the `with` block ends without an error."""

    def __init__(self, path: PathLike, fps: float) -> None:
        self.path = pathlib.Path(path)
        self.fps = fps
        self.num_frames = 0
        # ffmpeg tells the container from the ending, so the temporary name keeps it.
        self._partial = self.path.with_name(f".{self.path.stem}.{os.getpid()}.partial.mp4")
        self._encoder: Any = None
        self._shape: tuple[int, ...] = ()

    def append(self, frame: Any) -> None:
        """Hands one frame, uint8 [H, W, 3], to the encoder; blocks while the encoder's pipe is full."""
        image = (
            isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] in (3, 4)
        )
        if not image:
            found = f"{frame.dtype} {list(frame.shape)}" if isinstance(frame, np.ndarray) else type(frame).__name__
            raise ValueError(f"environment.render() returned {found}; a video needs uint8 [height, width, 3].")
        if self._encoder is None:
            self._shape = frame.shape
            self._encoder = self._start()
        elif frame.shape != self._shape:
            raise ValueError(f"Frame {self.num_frames} has shape {list(frame.shape)}, the first {list(self._shape)}.")
        try:
            self._encoder.send(np.ascontiguousarray(frame[:, :, :3]))  # an alpha channel is dropped
        except OSError as error:
            raise OSError(
                f"The encoder gave up on {self.path} at frame {self.num_frames}; is the disk full?"
            ) from error
        self.num_frames += 1

    def _start(self) -> Any:
        import imageio_ffmpeg

        encoder = imageio_ffmpeg.write_frames(
            str(self._partial),
            (self._shape[1], self._shape[0]),
            fps=self.fps,
            codec="libx264",
            pix_fmt_in="rgb24",
            pix_fmt_out="yuv420p",
            quality=None,
            macro_block_size=1,
            ffmpeg_log_level="error",
            output_params=[
                "-preset", "veryfast",  # as quick as ultrafast on such pictures, and a third of the size
                "-crf", "20",
                "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2",  # yuv420p wants even sides
                "-movflags", "+faststart",  # a browser can start before it has the whole file
            ],
        )  # fmt: skip
        encoder.send(None)
        return encoder

    def __enter__(self) -> _Mp4Writer:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            if self._encoder is not None:
                self._encoder.close()
            if error_type is None:
                self._check_complete()
                os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)

    def _check_complete(self) -> None:
        """Raises OSError where the encoder has written less than it was given; it does not say so itself."""
        import imageio_ffmpeg

        expected = self.num_frames / self.fps
        try:
            frames = imageio_ffmpeg.read_frames(str(self._partial))
            seconds = next(frames)["duration"]
            frames.close()
        except Exception as error:
            raise OSError(f"The encoder left no readable video for {self.path}; is the disk full?") from error
        if abs(seconds - expected) > 1 / self.fps + 0.01:  # ffmpeg prints hundredths
            raise OSError(f"{self.path} came out {seconds} s long instead of {expected:.2f} s; is the disk full?")
