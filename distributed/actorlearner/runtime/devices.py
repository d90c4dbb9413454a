"""Chooses the devices on which a process computes."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal, Optional, get_args

import tensorflow as tf
from tf_agents.train.utils import strategy_utils

from actorlearner.runtime.lifecycle import ExitCode, RoleError

StrategyName = Literal["default", "mirrored", "tpu"]


def hold_to_one_thread() -> None:
    """Restricts TensorFlow to one thread and no GPU: acting is small, and the learner needs the rest.

    Call it before anything is computed.
    """
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.set_visible_devices([], "GPU")


def leave_one_core() -> None:
    """Restricts each TensorFlow operation to all cores but one; `TF_NUM_INTRAOP_THREADS` overrides it.

    Small matrices that are split over every core wait for the core that is busy with other work: on two cores, SAC's
    updates were a fifth faster with one core left out. Call it before anything is computed.
    """
    if "TF_NUM_INTRAOP_THREADS" not in os.environ:
        tf.config.threading.set_intra_op_parallelism_threads(max(1, len(os.sched_getaffinity(0)) - 1))


def make_strategy(
    name: StrategyName, *, tpu: Optional[str] = None, num_logical_cpus: int = 1
) -> tf.distribute.Strategy:
    """Returns the distribution strategy for the learner's variables.

    Args:
      name: "default" computes on one device, the first GPU or the CPU; "mirrored" on every visible GPU, or on every
        logical CPU where there is no GPU; "tpu" on a TPU.
      tpu: The TPU's name or address; "local" on a TPU VM.
      num_logical_cpus: Splits the CPU into this many devices, to try several replicas without GPUs.

    Raises:
      RoleError: The flags contradict each other, or the device does not exist (USAGE).
    """
    if name not in get_args(StrategyName):
        raise RoleError(f"--strategy = '{name}': expected one of {', '.join(get_args(StrategyName))}", ExitCode.USAGE)
    if num_logical_cpus > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * num_logical_cpus)
    if name == "tpu":
        return _make_tpu_strategy(tpu or os.environ.get("TPU_NAME"))
    if name == "mirrored" and num_logical_cpus > 1 and not tf.config.list_physical_devices("GPU"):
        # TF-Agents' strategy_utils offers MirroredStrategy over GPUs only.
        strategy = tf.distribute.MirroredStrategy([f"/cpu:{index}" for index in range(num_logical_cpus)])
    else:
        strategy = strategy_utils.get_strategy(tpu=False, use_gpu=name == "mirrored")
    logging.info("strategy %s: %d replica(s)", name, strategy.num_replicas_in_sync)
    return strategy


def _make_tpu_strategy(tpu: Optional[str]) -> tf.distribute.Strategy:
    if not tpu:
        raise RoleError(
            "--strategy = 'tpu' needs --tpu: the TPU's name or address, or 'local' on a TPU VM.", ExitCode.USAGE
        )
    try:
        return strategy_utils.get_strategy(tpu=tpu, use_gpu=False)
    except (ValueError, RuntimeError, tf.errors.OpError) as error:
        raise RoleError(
            f"--tpu = '{tpu}': no TPU answers there ({str(error).splitlines()[0]}). Correct the name, or use "
            "--strategy=default on this machine.",
            ExitCode.USAGE,
        ) from error


def compute_devices(strategy: tf.distribute.Strategy) -> tuple[str, ...]:
    """Returns each replica's device; for a TPU, its host."""
    if strategy.num_replicas_in_sync > 1 and isinstance(strategy, tf.distribute.MirroredStrategy):
        return tuple(strategy.extended.worker_devices)
    has_gpu = not isinstance(strategy, tf.distribute.TPUStrategy) and tf.config.list_logical_devices("GPU")
    return ("/gpu:0",) if has_gpu else ("/cpu:0",)


def has_one_gpu(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether everything is computed on one GPU, where compiling a whole loop with XLA pays.

    Several replicas cannot be fused (TensorFlow cannot merge gradients inside a compiled loop), and on a CPU a plain
    graph loop is faster.
    """
    return strategy.num_replicas_in_sync == 1 and "gpu" in compute_devices(strategy)[0].lower()


def free_host_bytes() -> int:
    """Returns the memory that this process may still allocate, in bytes: the machine's or the container's limit."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free  # no container limit
    return free if limit == "max" else min(free, int(limit) - int(used))
