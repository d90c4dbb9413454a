"""Checkpoints of TensorFlow objects, together with plain counts of the same train step."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Optional

import tensorflow as tf

from actorlearner.runtime import durable_files
from actorlearner.runtime.lifecycle import ExitCode, RoleError
from actorlearner.runtime.optimizer_state import NamedMoments

_NAME = re.compile(r"ckpt-(\d+)(?:\.(\d+))?$")
_SUFFIX = re.compile(r"\.(index|data-\d+-of-\d+)$")


class Checkpoints:
    """Keeps the newest few checkpoints in one folder, and one older than a minute.

    A process may be killed, or lose power, at any moment, also while it writes. So a checkpoint is never overwritten,
    older ones are deleted only once a newer one is on disk, an unfinished one is skipped, and the next process removes
    its remains. A second checkpoint of one train step is `ckpt-<train step>.1`.
    """

    def __init__(self, folder: Path, train_step: tf.Variable, objects: dict[str, Any], max_to_keep: int = 3):
        """Args:
        folder: Holds the checkpoints.
        train_step: Its value names a checkpoint.
        objects: TensorFlow trackables by name. All of their variables exist at the first save: later ones are left out.
        max_to_keep: Number of newest checkpoints to keep; `durable_files.find_superfluous` may keep more.
        """
        # The counts are JSON in a string variable, so that they are saved and restored together with the weights.
        self._counts = tf.Variable("{}", dtype=tf.string, trainable=False, name="counts")
        self._train_step = train_step
        self._folder = folder
        self._max_to_keep = max_to_keep
        self._restored: Optional[Path] = None
        self._checkpoint = tf.train.Checkpoint(train_step=train_step, counts=self._counts, **objects)
        self._moments = NamedMoments(self._checkpoint)
        self._has_written = False
        # Compiled at its first use: otherwise TensorFlow walks through all objects at every write, which takes longest.
        self._write = tf.function(
            self._checkpoint.write, input_signature=[tf.TensorSpec((), tf.string)], autograph=False
        )

    def restore(self) -> dict[str, Any]:
        """Restores the newest whole checkpoint and returns its counts; an empty dict if there is none.

        Damaged ones are skipped with a warning, and deleted once an older one has been restored.

        Raises:
          RoleError: The newest whole checkpoint does not fit the objects, or all are damaged (DATA); an optimizer's
            state could not be restored with certainty (USAGE), even without a checkpoint.
        """
        self._moments.attach()
        for leftover in self._folder.glob("ckpt-*_temp"):
            shutil.rmtree(leftover, ignore_errors=True)
        damaged: list[Path] = []
        for prefix in self._prefixes():
            if not prefix.with_name(prefix.name + ".index").exists():  # the index is written last
                logging.warning("skipping the checkpoint %s, which was not finished", prefix)
                self._delete(prefix)
                continue
            damage = _find_damage(prefix)
            if damage is None:
                self._restore(prefix)
                for other in damaged:
                    self._delete(other)
                return json.loads(self._counts.numpy())
            logging.warning("skipping the checkpoint %s, which is damaged: %s", prefix, damage)
            damaged.append(prefix)
        if damaged:
            raise RoleError(
                f"every checkpoint in {self._folder} is damaged ({', '.join(prefix.name for prefix in damaged)}). "
                "Restore one from a copy, or start over with another --root_dir (train: or with --fresh).",
                ExitCode.DATA,
            )
        return {}

    def _restore(self, prefix: Path) -> None:
        try:
            self._read(prefix)
        except (AssertionError, ValueError, tf.errors.OpError) as error:
            raise RoleError(
                f"the checkpoint {prefix} does not fit this experiment: {str(error).splitlines()[0]} "
                "Give the settings it was made with, or another --root_dir.",
                ExitCode.DATA,
            ) from error
        self._restored = prefix
        logging.info("restored %s", prefix)

    def visit(self, steps: Sequence[int]) -> Generator[int, None, None]:
        """Restores and yields each of these train steps that has a whole checkpoint; at the end restores the newest.

        Call it only after `restore`, and before training.
        """
        newest, visited = self._restored, False
        try:
            for prefix in self._prefixes():
                if prefix != newest and _number(prefix)[0] in steps and _find_damage(prefix) is None:
                    visited = True
                    self._read(prefix)
                    yield int(self._train_step.numpy())
        finally:
            if visited:
                assert newest is not None
                self._read(newest)

    def _read(self, prefix: Path) -> None:
        with self._moments.as_written(str(prefix)):
            self._checkpoint.read(str(prefix)).assert_existing_objects_matched()

    def variables(self) -> list[tf.Variable]:
        """Returns all variables in a checkpoint, including an optimizer's moments once they exist."""
        self._moments.attach()
        everything = tf.train.TrackableView(self._checkpoint).descendants()
        return [one for one in everything if isinstance(one, tf.Variable) and one is not self._counts]

    def save(self, counts: dict[str, Any]) -> None:
        """Writes a checkpoint under the present train step; blocks until it is on disk.

        Raises:
          tf.errors.OpError, OSError: It could not be written; earlier ones are kept.
        """
        self.keep(self.write(counts))

    def write(self, counts: dict[str, Any]) -> Path:
        """Writes a checkpoint under the present train step and returns it; call `keep` with it to sync it to disk.

        Raises:
          tf.errors.OpError, OSError: It could not be written; earlier ones are kept.
        """
        self._counts.assign(json.dumps(counts))
        if not self._has_written:
            self._moments.attach()
            self._has_written = True
        step = int(self._train_step.numpy())
        taken = [prefix for prefix in self._prefixes() if _number(prefix)[0] == step]
        name = f"ckpt-{step}.{_number(taken[0])[1] + 1}" if taken else f"ckpt-{step}"
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._write(str(self._folder / name))
        except (tf.errors.OpError, OSError):
            self._delete(self._folder / name)
            raise
        return self._folder / name

    def keep(self, prefix: Path) -> None:
        """Syncs what `write` returned to disk, then deletes superfluous checkpoints.

        May be called in another thread than `write`, in the same order.

        Raises:
          OSError: It could not be synced; it is removed, and earlier ones are kept.
        """
        try:
            for path in _files_of(prefix):
                durable_files.sync(path)
            durable_files.sync(self._folder)
        except OSError:
            self._delete(prefix)
            raise
        # Later ones may have been written meanwhile, but they are not on disk yet.
        older = [other for other in self._prefixes() if _number(other) <= _number(prefix)]
        taken = [other for other in older if _number(other)[0] == _number(prefix)[0] and other != prefix]
        written = [(other, _written_at(other)) for other in older if other not in taken]
        for other in [*taken, *durable_files.find_superfluous(written, self._max_to_keep)]:
            self._delete(other)
        kept = [str(other) for other in reversed(self._prefixes()) if _number(other) <= _number(prefix)]
        # For `tf.train.latest_checkpoint`; `restore` reads the files themselves.
        state = tf.compat.v1.train.generate_checkpoint_state_proto(str(self._folder), kept[-1], kept)
        durable_files.write(self._folder / "checkpoint", str(state))

    def _prefixes(self) -> list[Path]:
        """Returns the existing checkpoints, finished or not, newest first."""
        prefixes = {path.with_name(_SUFFIX.sub("", path.name)) for path in self._files()}
        return sorted(prefixes, key=_number, reverse=True)

    def _files(self) -> list[Path]:
        files = self._folder.glob("ckpt-*")
        return [path for path in files if _SUFFIX.search(path.name) and _NAME.match(_SUFFIX.sub("", path.name))]

    def _delete(self, prefix: Path) -> None:
        for path in _files_of(prefix):
            path.unlink(missing_ok=True)
        shutil.rmtree(prefix.with_name(prefix.name + "_temp"), ignore_errors=True)


def _files_of(prefix: Path) -> list[Path]:
    """Returns a checkpoint's files, the index first: without it the checkpoint is not whole."""
    index = prefix.with_name(prefix.name + ".index")
    return [*([index] if index.exists() else []), *prefix.parent.glob(prefix.name + ".data-*")]


def _written_at(prefix: Path) -> float:
    return max((path.stat().st_mtime for path in _files_of(prefix)), default=0.0)


def _number(prefix: Path) -> tuple[int, int]:
    match = _NAME.match(prefix.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)


def _find_damage(prefix: Path) -> Optional[str]:
    """Returns what is wrong with a checkpoint's files, or None; reads them whole, so every checksum is looked at."""
    try:
        reader = tf.train.load_checkpoint(str(prefix))
        for name in reader.get_variable_to_shape_map():
            reader.get_tensor(name)
    # a file that is too short raises IndexError
    except (ValueError, LookupError, RuntimeError, tf.errors.OpError) as error:
        return str(error).splitlines()[0]
    return None
