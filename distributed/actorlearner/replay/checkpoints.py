"""Checkpoints of a replay server's tables, in a folder of its own.

Reverb saves every table, keeps one checkpoint and deletes everything else in its folder. So it writes into a folder of
its own, from which each finished checkpoint is moved, without the rows that only living processes need.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import json
import logging
import math
import re
import shutil
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Optional

import reverb
import tensorflow as tf
from reverb.cc import schema_pb2
from reverb.cc.checkpointing import checkpoint_pb2

from actorlearner.runtime import durable_files, messages
from actorlearner.runtime.lifecycle import ExitCode, RoleError

MAX_TO_KEEP = 2
"""Number of newest checkpoints that are kept; `find_superfluous` keeps up to two more while these are young."""

_NAME = re.compile(r"(\d+)-(\d+)$")
_ABOUT = "about.json"  # written last


def describe_settings(tables: Sequence[reverb.Table]) -> dict[str, dict[str, Any]]:
    """Returns what restoring a checkpoint would silently change: sizes, selectors, limiters, signatures."""
    described = {}
    for table in tables:
        info = table.info
        limiter = info.rate_limiter_info
        described[table.name] = {
            "max_size": info.max_size,
            "max_times_sampled": info.max_times_sampled,
            "sampler": " ".join(str(info.sampler_options).split()),
            "remover": " ".join(str(info.remover_options).split()),
            "samples_per_insert": limiter.samples_per_insert,
            "min_diff": _finite(limiter.min_diff),
            "max_diff": _finite(limiter.max_diff),
            "min_size_to_sample": limiter.min_size_to_sample,
            **{f"signature {path}": leaf for path, leaf in messages.describe_leaves(info.signature).items()},
        }
    return described


def _finite(bound: float) -> Optional[float]:
    return bound if math.isfinite(bound) and abs(bound) < 1e300 else None


class TableCheckpoints:
    """The checkpoints of one replay server's tables, in one folder that it holds until the process ends."""

    def __init__(self, folder: Path, tables: Sequence[reverb.Table]):
        """Args:
        folder: Holds the checkpoints; made if missing.
        tables: The tables to save; the server may have more.

        Raises:
          RoleError: The folder cannot be written (CANNOT_CREATE), or another replay server holds it (OCCUPIED).
        """
        self.folder = folder
        self._described = describe_settings(tables)
        self._writing = folder / "writing"
        self._lock: Optional[IO[str]] = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / ".lock", "w")  # noqa: SIM115  (held until the process ends)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RoleError(
                f"another replay server keeps its checkpoints in '{folder}'. Stop it, or give another --root_dir or "
                "--task.",
                ExitCode.OCCUPIED,
            ) from error
        except OSError as error:
            raise RoleError(
                f"--root_dir: '{folder}' cannot be written: {error.strerror}. Give a directory that this user may "
                "write to.",
                ExitCode.CANNOT_CREATE,
            ) from error
        # Left by a process that was killed while writing.
        for leftover in [self._writing, *folder.glob("*.new"), *folder.glob("*.old")]:
            shutil.rmtree(leftover, ignore_errors=True)

    def make_checkpointer(self) -> reverb.checkpointers.DefaultCheckpointer:
        """Returns the checkpointer for the server, with which it restores the newest whole checkpoint.

        Raises:
          RoleError: That checkpoint's tables have other settings (DATA); each difference is listed.
        """
        newest = self._find_newest()
        self._writing.mkdir(exist_ok=True)
        return reverb.checkpointers.DefaultCheckpointer(
            path=str(self._writing), fallback_checkpoint_path=str(newest) if newest else None
        )

    def _find_newest(self) -> Optional[Path]:
        for path in self._all():
            damage = _find_damage(path)
            if damage is not None:
                logging.warning("skipping the replay's checkpoint %s, which is damaged: %s", path, damage)
                continue
            about = json.loads((path / _ABOUT).read_text())
            self._compare(path, about["tables"])
            logging.info(
                "restoring the replay's checkpoint %s: train step %d, %s items, %.1f MB",
                path,
                about["train_step"],
                f"{about['num_items']:,}",
                about["num_bytes"] / 1e6,
            )
            return path
        return None

    def _compare(self, path: Path, held: Mapping[str, Mapping[str, Any]]) -> None:
        wanted = json.loads(json.dumps(self._described))
        differences = []
        for table in sorted({*held, *wanted}):
            has, wants = held.get(table, {}), wanted.get(table, {})
            if not has or not wants:
                differences.append(f"table '{table}': only {'this experiment' if wants else 'the checkpoint'} has it")
                continue
            differences += [
                f"table '{table}', {name}: the checkpoint has {has.get(name)!r}, this experiment {wants.get(name)!r}"
                for name in sorted({*has, *wants})
                if has.get(name) != wants.get(name)
            ]
        if differences:
            raise RoleError(
                f"the replay's checkpoint {path} has other settings than this experiment, and Reverb would restore "
                "them:\n  "
                + "\n  ".join(differences)
                + f"\nStart with the settings it was made with; or remove {self.folder} to go on with an empty replay.",
                ExitCode.DATA,
            )

    def save(self, client: reverb.Client, train_step: int) -> Path:
        """Writes a checkpoint, syncs it to disk, and returns its folder.

        Inserts and samples are blocked while Reverb writes: about 0.1 s for 100,000 small transitions. The rest
        (removing the other tables' rows, checksums) blocks nothing.

        Raises:
          RoleError: It could not be written (CANNOT_CREATE); earlier ones are kept.
        """
        started_at = time.monotonic()
        name = f"{train_step}-{1 + max([0, *(_number(path)[1] for path in self._all())])}"
        new = self.folder / f"{name}.new"
        try:
            self._writing.mkdir(exist_ok=True)
            written = Path(client.checkpoint())
            blocked_secs = time.monotonic() - started_at
            shutil.rmtree(new, ignore_errors=True)
            written.rename(new)
            items = _leave_out_others(new, set(self._described))
            (new / _ABOUT).write_text(self._describe(new, train_step, items))
            durable_files.put_in_place(new, self.folder / name)  # Reverb itself syncs nothing
        except (OSError, RuntimeError, reverb.errors.ReverbError, tf.errors.OpError) as error:
            for leftover in (new, *self._writing.glob("*")):
                shutil.rmtree(leftover, ignore_errors=True)
            raise RoleError(
                f"--root_dir: the replay could not be saved in '{self.folder}': {str(error).splitlines()[0]}. The "
                "checkpoints before it are kept; free some space, or give a directory that can be written.",
                ExitCode.CANNOT_CREATE,
            ) from error
        written_at = [(path, path.stat().st_mtime) for path in self._all()]
        for path in durable_files.find_superfluous(written_at, MAX_TO_KEEP):
            # Rename first: half a folder must not look like a whole one.
            with contextlib.suppress(OSError):
                shutil.rmtree(path.rename(path.with_name(path.name + ".old")))
        num_bytes = sum(file.stat().st_size for path in self._all() for file in path.iterdir())
        logging.info(
            "saved the replay under train step %d: %s items in %.1f s, of which %.1f s without inserts; %d checkpoints "
            "take %.1f MB",
            train_step,
            f"{sum(items.values()):,}",
            time.monotonic() - started_at,
            blocked_secs,
            len(self._all()),
            num_bytes / 1e6,
        )
        return self.folder / name

    def _describe(self, path: Path, train_step: int, items: Mapping[str, int]) -> str:
        files = {file.name: [file.stat().st_size, _checksum(file)] for file in sorted(path.iterdir())}
        about = {
            "train_step": train_step,
            "time": time.time(),
            "num_items": sum(items.values()),
            "items": dict(items),
            "num_bytes": sum(size for size, _ in files.values()),
            "tables": self._described,
            "files": files,
        }
        return json.dumps(about, indent=1) + "\n"

    def _all(self) -> list[Path]:
        """Returns the existing checkpoints, newest first."""
        return sorted((path for path in self.folder.iterdir() if _NAME.match(path.name)), key=_written, reverse=True)


def _number(path: Path) -> tuple[int, int]:
    match = _NAME.match(path.name)
    assert match is not None
    return int(match[1]), int(match[2])


def _written(path: Path) -> int:
    return _number(path)[1]


def _find_damage(path: Path) -> Optional[str]:
    try:
        files = json.loads((path / _ABOUT).read_text())["files"]
        for name, (size, checksum) in files.items():
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size:,} bytes, expected {size:,}"
            if _checksum(path / name) != checksum:
                return f"{name} has another checksum than when it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return repr(error)
    return None


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _leave_out_others(path: Path, tables: set[str]) -> dict[str, int]:
    """Removes tables that are not in `tables` from one of Reverb's checkpoints; returns the items of each table in it.

    Boards and request queues matter only to living processes: restored, they would tell actors that training is over,
    or that old weights are the newest.
    """
    _keep_records(path / "tables.tfrecord", _table_of, tables)
    items = _keep_records(path / "items.tfrecord", _table_of_item, tables)
    return {table: items[table] for table in sorted(tables)}


def _table_of(record: bytes) -> str:
    return checkpoint_pb2.PriorityTableCheckpoint.FromString(record).table_name


def _table_of_item(record: bytes) -> str:
    return schema_pb2.PrioritizedItem.FromString(record).table


def _keep_records(path: Path, table_of: Callable[[bytes], str], tables: set[str]) -> collections.Counter[str]:
    """Removes other tables' records from a compressed record file; returns the number of records of each kept table."""
    kept = path.with_name(path.name + ".kept")
    num_kept: collections.Counter[str] = collections.Counter()
    with tf.io.TFRecordWriter(str(kept), tf.io.TFRecordOptions(compression_type="ZLIB")) as writer:
        for batch in tf.data.TFRecordDataset(str(path), compression_type="ZLIB").batch(1_000).as_numpy_iterator():
            for record in batch:
                table = table_of(record)
                if table in tables:
                    writer.write(record)
                    num_kept[table] += 1
    kept.replace(path)
    return num_kept
