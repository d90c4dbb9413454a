"""What a replay offers to the three roles it joins: tables to the server, sinks to actors, batches to the learner.

collect actor --steps--> [TrajectorySink] --tables--> [BatchSource] --Batch--> agent.train
                                                           ^-- after_update --'

A new replay is a file with a subclass of `Replay` and, as far as those here do not do, of `TrajectorySink` and
`BatchSource`. Each has a default for whatever many replays do not need.
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
"""Stands for "no weights acted" where the train step of the acting weights is asked for."""


class Window(NamedTuple):
    """What an agent trains on: some steps in a row.

    Attributes:
      num_steps: Steps in a window; 2 is a transition.
      may_end_early: Whether an episode may end before the last step of a window. What comes after the end is in the
        window, and means nothing.
    """

    num_steps: int
    may_end_early: bool = False


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What the learner takes out of a replay, and how that is tied to what goes in.

    Attributes:
      num_steps, windows_may_end_early: See `Window`.
      batch_size: Windows in one update, over all replicas together.
      num_updates_per_call: Updates in one compiled call; samples per insert is kept to within one call.
      num_environments: Environments one collect actor steps as a batch.
      initial_collect_steps: Windows inserted before training begins.
      samples_per_insert: Windows sampled for each one inserted after that.
      pace: At whose speed actors and learner go.
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
    """What one replica trains on in one update; B = its windows, T = steps in each.

    Attributes:
      experience: A `Trajectory` with leaves [B, T, ...].
      acted_at: [B] int64: train step at which the weights that acted were published, or `RANDOM_POLICY`.
      weights: [B] float32, by which the agent multiplies the losses; None: it is not told of any.
      keys: [B], by which the source knows the windows again in `after_update`; None where it need not.
    """

    experience: Any
    acted_at: tf.Tensor
    weights: Optional[tf.Tensor] = None
    keys: Optional[tf.Tensor] = None


class TrajectorySink:
    """Takes the steps of one collect actor's environments to the replay server; none of its windows spans two."""

    num_chunks: int = 0
    """How many chunks were sent; 0 for ever where there are none."""

    def append(self, steps: Any, acted_at: int, crashed: np.ndarray) -> None:
        """Adds one `Trajectory` step per environment; those of an episode come in order and end with its boundary.

        Args:
          steps: Nest of numpy columns, [num_environments, ...]; copied.
          acted_at: Train step at which the weights that acted were published, or `RANDOM_POLICY`.
          crashed: [num_environments], true where an environment crashed: its row is none, and its episode has ended.
        """
        raise NotImplementedError

    def is_blocked(self) -> bool:
        """Returns whether the server holds writes back; blocks at most half a second to find out.

        The caller decides how long to go on asking; it appends nothing while blocked.

        Raises:
          RuntimeError: The server refused an item.
        """
        return False

    def close(self, timeout_secs: float) -> None:
        """Sends what is pending; blocks at most about `timeout_secs` seconds."""


class BatchSource:
    """Hands training batches to the learner's compiled loop, and says how many updates it may make."""

    handle: Any = None
    """Passed to `draw` through the compiled function's arguments, so that replacing it does not retrace."""

    num_chunks: int = 0
    """How many chunks were taken in; 0 for ever where there are none."""

    can_fuse: bool = False
    """Whether XLA can compile `draw`, `unpack` and `after_update` together with the update."""

    @property
    def num_given_back(self) -> int:
        """How many chunks were sent to replay servers that had lost them; 0 for ever where none are."""
        return 0

    def restore(self, counts: Mapping[str, Any], on_progress: Callable[[], object] = lambda: None) -> None:
        """Begins, or goes on from the counts of a checkpoint; called before all else, again when it raised.

        Calls `on_progress` while it reads, many times a second; what that raises, it raises.
        """

    def counts(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps, such as `inserts` and `samples` so far."""
        return {}

    def draw(self, handle: Any) -> tuple[Any, ...]:
        """Returns one batch's parts, distributed over the replicas; called inside a `tf.function`, outside replicas.

        Raises:
          tf.errors.OutOfRangeError: No batch came in time; call `renew` and try again.
          tf.errors.InvalidArgumentError: As above if `leave_out` says so.
        """
        return ()

    def unpack(self, *parts: Any) -> Batch:
        """Returns one replica's batch from its parts; called inside each replica."""
        raise NotImplementedError

    def after_update(self, batch: Batch, loss_info: Any) -> None:
        """Takes what an update says of its batch, in the same graph; called inside each replica.

        Args:
          batch: What `unpack` returned.
          loss_info: The agent's `LossInfo`.
        """
        del batch, loss_info  # AutoGraph cannot transform a function without statements

    def count_observations(self) -> None:
        """Begins to count observations for `take_moments`; called before `restore` and the first `draw`, if at all."""

    def take_moments(self) -> list[Moments]:
        """Returns the moments of the observations taken in since the last call, each observation once in a run."""
        return []

    def look_first(self) -> None:
        """Takes observations in for `take_moments` before the first update of a run, where only drawing does.

        Raises what `draw` raises.
        """

    def standing_still(self) -> contextlib.AbstractContextManager[Any]:
        """Returns a context in which `counts` and `take_moments` are of one moment; short, as readers wait."""
        return contextlib.nullcontext()

    def allow(self, num_updates: int) -> int:
        """Returns how many updates may be made now, at most `num_updates`; 0 while the actors have to catch up."""
        return num_updates

    def note_updates(self, num_updates: int) -> None:
        """Counts updates that were made."""

    def await_data(self, secs: float) -> None:
        """Returns when something arrived, or after `secs` seconds; at once where `draw` is what waits."""

    def renew(self) -> None:
        """Makes a new `handle` after `draw` ran dry. Raises `tf.errors.OpError` while the server is away."""

    def leave_out(self, error: tf.errors.InvalidArgumentError) -> bool:
        """Returns whether an item of some other client made `draw` fail; such items are left out after `renew`."""
        return False

    def is_ready(self) -> bool:
        """Returns whether there is enough to train on; blocks at most some seconds."""
        raise NotImplementedError

    def account(self) -> dict[str, Any]:
        """Returns `held`, `inserts`, `samples` and `ahead`, the samples allowed less those made; for people and tools.

        Of several servers also `servers`: whether each, by its address, answers. Empty when the server, asked for at
        most a second, does not answer.
        """
        return {}

    def describe(self) -> str:
        """Returns how the replay stands, in words; blocks at most some seconds."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends its threads; never blocks."""


class Replay:
    """A replay as gin binds it; read only."""

    can_spread: bool = False
    """Whether several servers can hold it between them."""

    def check(self, *, initial_collect_steps: int) -> None:
        """Raises `ValueError` when its settings do not fit the schedule's."""

    def window(self, agent: Any) -> Window:
        """Returns what `agent` is given to train on: what it says, or where it says nothing what this replay says.

        Raises:
          ValueError: Neither says how long a window is.
        """
        if agent.train_sequence_length is None:
            raise ValueError(
                f"{type(agent).__name__} does not say how many steps it trains on, nor does {type(self).__name__}. "
                "Give the experiment a replay that does."
            )
        return Window(agent.train_sequence_length, getattr(agent, "windows_may_end_early", False))

    def warm_up_steps(self, initial_collect_steps: int) -> int:
        """Returns how many windows a random policy collects before training, given the schedule's number."""
        return initial_collect_steps

    def pace(self, lock_step: bool) -> Pace:
        """Returns at whose speed actors and learner go; `lock_step` is the schedule's wish.

        Raises:
          ValueError: They cannot take turns with this replay.
        """
        if lock_step:
            raise ValueError(
                "train.lock_step = True needs a replay whose samples can be repeated: "
                "experiment.replay = @resident_replay()."
            )
        return Free()

    def table_signatures(self, step_spec: Any) -> dict[str, Any]:
        """Returns what each of its tables holds, by table name, for trajectories of `step_spec`."""
        raise NotImplementedError

    def make_tables(self, step_spec: Any, sampling: Sampling) -> list[reverb.Table]:
        """Returns the server's tables. Raises `ValueError` when their settings contradict each other."""
        raise NotImplementedError

    def is_warm(self, servers: ReplayServers, initial_collect_steps: int) -> Optional[bool]:
        """Returns whether the replay as a whole holds `initial_collect_steps`; None when only the learner can tell.

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
          RoleError: It does not fit into the memory there is (USAGE).
        """
        raise NotImplementedError
