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
from typing import Any, Protocol, Union, final

import numpy as np

from actorlearner.runtime import durable_files
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
      title: What the file says of itself, as players show it.
    """

    path: pathlib.Path
    num_frames: int
    fps: float
    seconds: float
    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    title: str = ""


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
    title: str = "",
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
      title: Written into the file, where players show it.

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
    fps = steps_per_second / steps_per_frame
    with _render_at_most(environment, max_render_width), _Mp4Writer(path, fps, title) as mp4:
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
    seconds = mp4.num_frames / mp4.fps
    return VideoInfo(mp4.path, mp4.num_frames, mp4.fps, seconds, tuple(returns), tuple(lengths), title)


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

    Writes `videos/trained_policy.mp4` and `videos/random_policy.mp4` into the run directory. The first one's title says
    of which train step the policy is. Both environments get the same seed, so both policies start from the same states.

    Records one after the other in this process, since TensorFlow does not survive a fork and neither gin's bindings nor
    `make_environment` need survive a spawn. Rendering keeps one core busy; a caller with two can start two processes,
    each with one of the `names`.

    Args:
      root_dir: The run directory; the trained policy is its `policies/greedy_policy`: the newest while training goes
        on, the delivered one once it has ended.
      make_environment: Called once per video; what it returns is closed here.
      steps_per_second: Control rate of the task.
      num_episodes: Episodes in each video.
      seed: For the environments and the random policy.
      max_steps: As for `record_episodes`.
      names: Which of the two to record.

    Raises:
      ValueError: The run directory has no policy that can be loaded, or none that was trained; a name is unknown; and
        as `record_episodes`.
      OSError: As `record_episodes`.
    """
    root_dir = pathlib.Path(root_dir)
    make_act: dict[str, Callable[[Environment], tuple[Act, str]]] = {
        "trained_policy": lambda _: _trained_act(root_dir),
        "random_policy": lambda environment: (random_act(environment, seed=seed), "a random policy"),
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
            act, title = make_act[name](environment)
            recorded[name] = record_episodes(
                environment,
                act,
                root_dir / "videos" / f"{name}.mp4",
                num_episodes=num_episodes,
                steps_per_second=steps_per_second,
                max_steps=max_steps,
                title=title,
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


def _trained_act(root_dir: pathlib.Path) -> tuple[Act, str]:
    """Returns what acts as the run's greedy policy, and which policy that is, in words."""
    act, train_step = load_saved_policy(root_dir / "policies" / "greedy_policy")
    try:
        has_ended = bool(json.loads((root_dir / "summary.json").read_text(encoding="utf-8")).get("has_ended", True))
    except (OSError, ValueError, AttributeError):
        has_ended = False
    if not train_step and not has_ended:
        raise ValueError(
            f"No trained policy in {root_dir} yet: that of train step 0 is there. A run puts its newest policy into"
            " policies/ with each checkpoint."
        )
    of = "of a run that has ended" if has_ended else "of a run that has not ended"
    return act, f"the policy of train step {train_step:,} {of}"


def saved_model_act(policy_dir: PathLike) -> Act:
    """Returns the first of what `load_saved_policy` does."""
    return load_saved_policy(policy_dir)[0]


def load_saved_policy(policy_dir: PathLike) -> tuple[Act, int]:
    """Returns a function that acts as a policy saved by TF-Agents' `PolicySaver`, and the train step of its weights.

    The function carries the policy's state, where it has one, from step to step and starts afresh at the first step of
    each episode: use it for one environment at a time. It adds and strips the batch dimension. The policy's networks
    are loaded; the code that made them is not needed.

    Args:
      policy_dir: A SavedModel written by `PolicySaver.save`, e.g. `<run>/policies/greedy_policy`.

    Raises:
      ValueError: There is no such SavedModel, or it is not a policy.
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

    def load() -> tuple[Any, Any]:
        specs = policy_saver.specs_from_collect_data_spec(
            tensor_spec.from_pbtxt_file(str(policy_dir / "policy_specs.pbtxt"))
        )
        return specs, tf.saved_model.load(str(policy_dir))

    try:
        found = policy_dir.stat().st_ino
        try:
            specs, policy = load()
        except Exception:
            if policy_dir.stat().st_ino == found:
                raise
            specs, policy = load()  # a run under way has put a newer one in its place
        train_step = int(policy.get_train_step())
        initial_state = policy.get_initial_state(batch_size=1) if specs["policy_state_spec"] else ()
    except Exception as error:
        raise ValueError(f"The saved policy in {policy_dir} cannot be loaded: {error}") from error
    input_specs = (specs["time_step_spec"], specs["policy_state_spec"])
    flat_specs = tf.nest.flatten(input_specs)

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

    return act, train_step


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

    def __init__(self, path: PathLike, fps: float, title: str = "") -> None:
        self.path = pathlib.Path(path)
        self._title = title
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
                *(["-metadata", f"title={self._title}"] if self._title else []),
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
                durable_files.put_in_place(self._partial, self.path)
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
