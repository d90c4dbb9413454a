"""The interface of a replay: tables for the server, sinks for collect actors, batches for the learner.

collect actor --steps--> [TrajectorySink] --tables--> [BatchSource] --Batch--> agent.train
                                                           ^-- after_update --'

A new replay is a file with a subclass of `Replay` and, where their defaults do not suffice, of `TrajectorySink` and
`BatchSource`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import numpy as np
import reverb
import tensorflow as tf

from actorlearner.replay.moments import Moments
from actorlearner.replay.pace import Free, Pace

if TYPE_CHECKING:
    from actorlearner.replay.servers import ReplayServers

RANDOM_POLICY = -1
"""Stands for the random policy where the train step of the acting weights is expected."""


class Window(NamedTuple):
    """What an agent trains on: consecutive steps.

    Attributes:
      num_steps: Steps in a window; 2 is a transition.
      may_end_early: Whether an episode may end before the last step of a window. The window's steps after the end are
        meaningless.
    """

    num_steps: int
    may_end_early: bool = False


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the learner samples a replay, and how samples are tied to inserts.

    Attributes:
      num_steps, windows_may_end_early: See `Window`.
      batch_size: Windows in one update, over all replicas together.
      num_updates_per_call: Updates in one compiled call; samples per insert is kept to within one call.
      num_environments: Environments that one collect actor steps as a batch.
      initial_collect_steps: Windows inserted before training starts.
      samples_per_insert: Windows sampled for each window inserted after that.
      pace: The pace of actors and learner.
    """

    num_steps: int
    batch_size: int
    num_updates_per_call: int
    num_environments: int
    initial_collect_steps: int
    samples_per_insert: float
    windows_may_end_early: bool = False
    pace: Pace = dataclasses.field(default_factory=Free)


class Batch(NamedTuple):
    """The batch of one replica in one update; B = windows, T = steps in a window.

    Attributes:
      experience: A `Trajectory` with leaves [B, T, ...].
      acted_at: [B] int64: train step at which the weights that acted were published, or `RANDOM_POLICY`.
      weights: [B] float32, factors on the losses; None: the agent gets none.
      keys: [B], identify the windows for the source in `after_update`; None if it does not need them.
    """

    experience: Any
    acted_at: tf.Tensor
    weights: Optional[tf.Tensor] = None
    keys: Optional[tf.Tensor] = None


class TrajectorySink:
    """Writes the steps of one collect actor's environments to the replay server; no window spans two environments."""

    num_chunks: int = 0
    """Number of chunks sent; stays 0 for a replay without chunks."""

    def append(self, steps: Any, acted_at: int, crashed: np.ndarray) -> None:
        """Adds one `Trajectory` step per environment; those of an episode come in order and end with its boundary step.

        Args:
          steps: Nest of numpy columns, [num_environments, ...]; copied.
          acted_at: Train step at which the weights that acted were published, or `RANDOM_POLICY`.
          crashed: [num_environments], true where an environment crashed: its row is invalid, and its episode has ended.
        """
        raise NotImplementedError

    def is_blocked(self) -> bool:
        """Returns whether the server blocks writes; takes at most half a second to find out.

        The caller decides how long to keep asking, and appends nothing while blocked.

        Raises:
          RuntimeError: The server refused an item.
        """
        return False

    def close(self, timeout_secs: float) -> None:
        """Sends pending steps; blocks at most about `timeout_secs` seconds."""


class BatchSource:
    """Gives training batches to the learner's compiled loop, and says how many updates it may make."""

    handle: Any = None
    """Passed to `draw` through the compiled function's arguments, so that replacing it does not retrace."""

    num_chunks: int = 0
    """Number of chunks received; stays 0 for a replay without chunks."""

    can_fuse: bool = False
    """Whether XLA can compile `draw`, `unpack` and `after_update` together with the update."""

    @property
    def num_given_back(self) -> int:
        """Number of chunks with which restarted replay servers were refilled; stays 0 for a replay without refills."""
        return 0

    def restore(self, counts: Mapping[str, Any], on_progress: Callable[[], object] = lambda: None) -> None:
        """Starts empty, or from the counts of a checkpoint; called before everything else, and again if it raised.

        Calls `on_progress` many times a second while it reads; what that raises, it raises.
        """

    def counts(self) -> dict[str, Any]:
        """Returns what a checkpoint stores, such as `inserts` and `samples` so far."""
        return {}

    def draw(self, handle: Any) -> tuple[Any, ...]:
        """Returns a batch's parts, distributed over the replicas; called inside a `tf.function`, outside replicas.

        Raises:
          tf.errors.OutOfRangeError: No batch came in time; call `renew` and try again.
          tf.errors.InvalidArgumentError: As above, if `leave_out` confirms it.
        """
        return ()

    def unpack(self, *parts: Any) -> Batch:
        """Returns one replica's batch from its parts; called inside each replica."""
        raise NotImplementedError

    def after_update(self, batch: Batch, loss_info: Any) -> None:
        """Receives an update's result for its batch, in the same graph; called inside each replica.

        Args:
          batch: The result of `unpack`.
          loss_info: The agent's `LossInfo`.
        """
        del batch, loss_info  # AutoGraph cannot transform a function without statements

    def count_observations(self) -> None:
        """Starts counting observations for `take_moments`; called, if at all, before `restore` and the first `draw`."""

    def take_moments(self) -> list[Moments]:
        """Returns the moments of the observations received since the last call; each counts once in a run."""
        return []

    def look_first(self) -> None:
        """Counts observations before the first update of a run, if the source counts only when drawing.

        Raises what `draw` raises.
        """

    def standing_still(self) -> contextlib.AbstractContextManager[Any]:
        """Returns a context in which `counts` and `take_moments` are of one moment; keep it short: readers wait."""
        return contextlib.nullcontext()

    def allow(self, num_updates: int) -> int:
        """Returns how many updates may be made now, at most `num_updates`; 0 while the actors must catch up."""
        return num_updates

    def note_updates(self, num_updates: int) -> None:
        """Counts `num_updates` updates."""

    def await_data(self, secs: float) -> None:
        """Blocks until data arrives, for at most `secs` seconds; returns at once if `draw` waits itself."""

    def renew(self) -> None:
        """Makes a new `handle` after `draw` ran dry. Raises `tf.errors.OpError` while the server is away."""

    def leave_out(self, error: tf.errors.InvalidArgumentError) -> bool:
        """Returns whether a foreign item made `draw` fail; such items are skipped after `renew`."""
        return False

    def is_ready(self) -> bool:
        """Returns whether there is enough to train on; blocks at most some seconds."""
        raise NotImplementedError

    def account(self) -> dict[str, Any]:
        """Returns `held`, `inserts`, `samples` and `ahead` (samples allowed minus samples made), for people and tools.

        With several servers also `servers`: whether each answers, by address. Empty if the server does not answer
        within a second.
        """
        return {}

    def describe(self) -> str:
        """Returns the replay's account in words; blocks at most some seconds."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends its threads; never blocks."""


class Replay:
    """A replay's settings, as gin binds them; read only."""

    can_spread: bool = False
    """Whether several servers can share it."""

    def check(self, *, initial_collect_steps: int) -> None:
        """Raises `ValueError` if its settings do not fit the schedule's."""

    def window(self, agent: Any) -> Window:
        """Returns the window that `agent` trains on: the agent's own, or this replay's if it has none.

        Raises:
          ValueError: Neither defines the length of a window.
        """
        if agent.train_sequence_length is None:
            raise ValueError(
                f"{type(agent).__name__} defines no window length, and neither does {type(self).__name__}. "
                "Choose a replay that defines one."
            )
        return Window(agent.train_sequence_length, getattr(agent, "windows_may_end_early", False))

    def warm_up_steps(self, initial_collect_steps: int) -> int:
        """Returns the number of windows that the random policy collects before training; by default the schedule's."""
        return initial_collect_steps

    def pace(self, lock_step: bool) -> Pace:
        """Returns the pace of actors and learner; `lock_step` is the schedule's setting.

        Raises:
          ValueError: This replay does not support lock-step.
        """
        if lock_step:
            raise ValueError(
                "train.lock_step = True needs a replay with reproducible samples: "
                "experiment.replay = @resident_replay()."
            )
        return Free()

    def table_signatures(self, step_spec: Any) -> dict[str, Any]:
        """Returns the signature of each of its tables, by name, for trajectories of `step_spec`."""
        raise NotImplementedError

    def make_tables(self, step_spec: Any, sampling: Sampling) -> list[reverb.Table]:
        """Returns the server's tables. Raises `ValueError` if their settings contradict each other."""
        raise NotImplementedError

    def is_warm(self, servers: ReplayServers, initial_collect_steps: int) -> Optional[bool]:
        """Returns whether the whole replay holds `initial_collect_steps`; None if only the learner can tell.

        Raises:
          Unreachable: The server does not answer.
        """
        return None

    def make_sink(self, servers: ReplayServers, sampling: Sampling) -> TrajectorySink:
        """Returns a writer for the steps of one actor's environments, to `servers.mine()`."""
        raise NotImplementedError

    def make_source(
        self, servers: ReplayServers, step_spec: Any, sampling: Sampling, strategy: tf.distribute.Strategy
    ) -> BatchSource:
        """Returns the learner's side, which reads all servers.

        Raises:
          RoleError: It does not fit into the free memory (USAGE).
        """
        raise NotImplementedError
