"""Records episodes as videos that play at the task's real speed, without a display."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol, Union

from actorlearner.runtime.health import beat
from actorlearner.tools.recording.mp4 import Mp4Writer

# SDL reads these when pygame starts, and gym imports pygame with its first environment, so set them before both. With
# the dummy drivers pygame draws into memory, opens no window and does not complain about missing sound cards.
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

# Takes a TF-Agents TimeStep without a batch dimension, returns an action without one.
Act = Callable[[Any], Any]
PathLike = Union[str, "os.PathLike[str]"]


class Environment(Protocol):
    """The part of TF-Agents' `PyEnvironment` used here; declared so that this module imports without TensorFlow."""

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
    """A recorded video.

    Attributes:
      path: The finished mp4.
      num_frames: Frames in it, all episodes together.
      fps: Frames per second of playback.
      seconds: `num_frames / fps`; within a frame per episode of the time the task would have taken.
      returns: Undiscounted return of each episode, in order.
      lengths: Environment steps of each episode, in order.
      title: The file's title, as players show it.
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
    """Records `num_episodes` episodes, one after the other, into an mp4 at `path`.

    A second of video is a second of the task. Each episode's frames are its reset and every k-th step after it, with
    the smallest k that keeps within `max_frames_per_second`: CartPole (50 steps/s) and Minitaur (100) both have 25
    frames/s. A last step off that grid is not shown, because it would stretch the video.

    Blocks until the episodes have ended; give an environment without a time limit `max_steps`. Frames are streamed to
    the encoder. The file appears under its name only when complete, replacing an existing one; a failed recording
    leaves nothing.

    Args:
      environment: Unbatched; reset at the start of each episode, and not closed. Rendered frames are uint8 [H, W, 3].
      act: Called once per step with the latest time step.
      path: Path of the mp4; its directory is made if missing.
      num_episodes: At least 1.
      steps_per_second: Control rate of the task.
      max_frames_per_second: Upper bound on the playback rate.
      max_steps: Cut each episode after this many environment steps. None: let it end by itself.
      max_render_width: PyBullet environments that would render wider than this are rendered at this width, in pixels,
        with the same proportions; its software renderer takes 0.2 to 0.4 us a pixel. Others (gym's own) are not
        changed.
      title: Title stored in the file, where players show it.

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
    steps_per_frame = count_steps_per_frame(steps_per_second, max_frames_per_second)
    returns: list[float] = []
    lengths: list[int] = []
    fps = steps_per_second / steps_per_frame
    with _render_at_most(environment, max_render_width), Mp4Writer(path, fps, title) as mp4:
        for _ in range(num_episodes):
            time_step = environment.reset()
            mp4.append(environment.render())
            episode_return, length = 0.0, 0
            while not time_step.is_last() and length != max_steps:
                time_step = environment.step(act(time_step))
                beat()  # recording may take minutes
                length += 1
                episode_return += float(time_step.reward)
                if length % steps_per_frame == 0:
                    mp4.append(environment.render())
            returns.append(episode_return)
            lengths.append(length)
    seconds = mp4.num_frames / mp4.fps
    return VideoInfo(mp4.path, mp4.num_frames, mp4.fps, seconds, tuple(returns), tuple(lengths), title)


def count_steps_per_frame(steps_per_second: float, max_frames_per_second: float) -> int:
    """Returns the smallest k with `steps_per_second / k <= max_frames_per_second`."""
    for name, value in (("steps_per_second", steps_per_second), ("max_frames_per_second", max_frames_per_second)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}; it must be a number above 0, such as 50 for CartPole.")
    # The tolerance allows rates such as 1 / (1 / 30), slightly above the bound.
    return max(1, math.ceil(steps_per_second / max_frames_per_second - 1e-6))


@contextlib.contextmanager
def _render_at_most(environment: Environment, width: int) -> Iterator[None]:
    """Makes PyBullet environments render at most `width` pixels wide within the context.

    PyBullet's environments take no size argument. They read the size from attributes (`_render_width`) or, as Minitaur
    does at 960x720, from constants of the module that defines `render`; these are changed and restored.
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
