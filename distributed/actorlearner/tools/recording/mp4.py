"""Writes H.264 files, which appear under their name only when complete."""

from __future__ import annotations

import os
import pathlib
from typing import Any, Union, final

import numpy as np

from actorlearner.runtime import durable_files

PathLike = Union[str, "os.PathLike[str]"]


@final
class Mp4Writer:
    """Streams frames into an H.264 file, which appears under its name when the `with` block ends without an error."""

    def __init__(self, path: PathLike, fps: float, title: str = "") -> None:
        self.path = pathlib.Path(path)
        self._title = title
        self.fps = fps
        self.num_frames = 0
        # ffmpeg chooses the container by the file extension, so the temporary name keeps it.
        self._partial = self.path.with_name(f".{self.path.stem}.{os.getpid()}.partial.mp4")
        self._encoder: Any = None
        self._shape: tuple[int, ...] = ()

    def append(self, frame: Any) -> None:
        """Sends one frame, uint8 [H, W, 3], to the encoder; blocks while the encoder's pipe is full."""
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
                f"The encoder failed on {self.path} at frame {self.num_frames}; is the disk full?"
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
                "-preset", "veryfast",  # as fast as ultrafast on such images, at a third of the size
                "-crf", "20",
                "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2",  # yuv420p needs even sides
                "-movflags", "+faststart",  # a browser can start playing before it has the whole file
                *(["-metadata", f"title={self._title}"] if self._title else []),
            ],
        )  # fmt: skip
        encoder.send(None)
        return encoder

    def __enter__(self) -> Mp4Writer:
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
        """Raises OSError if the encoder has written fewer frames than it was given, which it does not report."""
        import imageio_ffmpeg

        expected = self.num_frames / self.fps
        try:
            frames = imageio_ffmpeg.read_frames(str(self._partial))
            seconds = next(frames)["duration"]
            frames.close()
        except Exception as error:
            raise OSError(f"The encoder left no readable video for {self.path}; is the disk full?") from error
        if abs(seconds - expected) > 1 / self.fps + 0.01:  # ffmpeg prints hundredths of a second
            raise OSError(f"{self.path} came out {seconds} s long instead of {expected:.2f} s; is the disk full?")
