"""What a replay offers to the three roles it joins: tables to the server, sinks to actors, batches to the learner."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Optional, Protocol, runtime_checkable

import numpy as np
import reverb
import tensorflow as tf

from actorlearner.replay.moments import Moments

if TYPE_CHECKING:
    from actorlearner.replay.servers import ReplayServers

RANDOM_POLICY = -1
"""Stands for "no weights acted" where the train step of the acting weights is asked for."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What the learner takes out of a replay, and how that is tied to what goes in.

    Attributes:
      num_steps: Steps in a window; 2 is a transition.
      batch_size: Windows in one train step, over all replicas together.
      num_updates_per_call: Train steps in one compiled call; samples per insert is kept to within one call.
      num_environments: Environments one collect actor steps as a batch.
      initial_collect_steps: Windows inserted before training begins.
      samples_per_insert: Windows sampled for each one inserted after that.
      lock_step: Whether actor and learner take turns, chunk by chunk.
      windows_may_end_early: Whether an episode may end before the last step of a window. What comes after the end is in
        the window, and means nothing.
    """

    num_steps: int
    batch_size: int
    num_updates_per_call: int
    num_environments: int
    initial_collect_steps: int
    samples_per_insert: float
    lock_step: bool = False
    windows_may_end_early: bool = False


class TrajectorySink(Protocol):
    """Takes the steps of one collect actor's environments to the replay server; none of its windows spans two."""

    num_chunks: int
    """How many chunks were sent; 0 for ever where there are none."""

    def append(self, steps: Any, acted_at: int, crashed: np.ndarray) -> None:
        """Adds one `Trajectory` step per environment; those of an episode come in order and end with its boundary.

        Args:
          steps: Nest of numpy columns, [num_environments, ...]; copied.
          acted_at: Train step at which the weights that acted were published, or `RANDOM_POLICY`.
          crashed: [num_environments], true where an environment crashed: its row is none, and its episode has ended.
        """

    def is_blocked(self) -> bool:
        """Returns whether the server holds writes back; blocks at most half a second to find out.

        The caller decides how long to go on asking; it appends nothing while blocked.

        Raises:
          RuntimeError: The server refused an item.
        """
        ...

    def close(self, timeout_secs: float) -> None:
        """Sends what is pending; blocks at most about `timeout_secs` seconds."""


class BatchSource(Protocol):
    """Hands training batches to the learner's compiled loop, and says how many updates it may make."""

    handle: Any
    """Passed to `draw` through the compiled function's arguments, so that replacing it does not retrace."""

    num_chunks: int
    """How many chunks were taken in; 0 for ever where there are none."""

    @property
    def num_given_back(self) -> int:
        """How many chunks were sent to replay servers that had lost them; 0 for ever where none are."""
        ...

    can_fuse: bool
    """Whether XLA can compile `draw` and `unpack` together with the update."""

    def restore(self, counts: Mapping[str, Any], on_progress: Callable[[], object] = lambda: None) -> None:
        """Begins, or goes on from the counts of a checkpoint; called before all else, again when it raised.

        Calls `on_progress` while it reads, many times a second; what that raises, it raises.
        """

    def counts(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps: `inserts` and `samples` so far."""
        ...

    def draw(self, handle: Any) -> tuple[Any, ...]:
        """Returns one batch's parts, distributed over the replicas; called inside a `tf.function`, outside replicas.

        Raises:
          tf.errors.OutOfRangeError: No batch came in time; call `renew` and try again.
          tf.errors.InvalidArgumentError: As above if a source that `MeetsStrangers` says so.
        """
        ...

    def unpack(self, *parts: Any) -> tuple[Any, tf.Tensor]:
        """Returns `(experience, acted_at)` from one replica's parts; called inside each replica.

        Shapes: B = batch of one replica, T = num_steps. `experience` leaves are [B, T, ...], `acted_at` is [B].
        """
        ...

    def count_observations(self) -> None:
        """Begins to count observations for `take_moments`; called before `restore` and the first `draw`, if at all."""

    def take_moments(self) -> list[Moments]:
        """Returns the moments of the observations taken in since the last call, each observation once in a run."""
        ...

    def look_first(self) -> None:
        """Takes observations in for `take_moments` before the first update of a run, where only drawing does.

        Raises what `draw` raises.
        """

    def standing_still(self) -> contextlib.AbstractContextManager[Any]:
        """Returns a context in which `counts` and `take_moments` are of one moment; short, as readers wait."""
        ...

    def allow(self, num_updates: int) -> int:
        """Returns how many updates may be made now, at most `num_updates`; 0 while the actors have to catch up."""
        ...

    def note_updates(self, num_updates: int) -> None:
        """Counts updates that were made."""

    def await_data(self, secs: float) -> None:
        """Returns when something arrived, or after `secs` seconds."""

    def renew(self) -> None:
        """Makes a new `handle` after `draw` ran dry. Raises `tf.errors.OpError` while the server is away."""

    def is_ready(self) -> bool:
        """Returns whether there is enough to train on; blocks at most some seconds."""
        ...

    def account(self) -> dict[str, Any]:
        """Returns `held`, `inserts`, `samples` and `ahead`, the samples allowed less those made; for people and tools.

        Of several servers also `servers`: whether each, by its address, answers. Empty when the server, asked for at
        most a second, does not answer.
        """
        ...

    def describe(self) -> str:
        """Returns how the replay stands, in words; blocks at most some seconds."""
        ...

    def close(self) -> None:
        """Ends its threads; never blocks."""


@runtime_checkable
class MeetsStrangers(BatchSource, Protocol):
    """A batch source whose `draw` fails at an item that some other client inserted."""

    def leave_out(self, error: tf.errors.InvalidArgumentError) -> bool:
        """Returns whether such an item made `draw` fail; it is said, and they are left out after the next `renew`."""
        ...


class Replay(Protocol):
    """A replay as gin binds it; read only."""

    can_lock_step: ClassVar[bool]
    """Whether actor and learner can take turns, with samples that are the same in every run of one seed."""

    can_spread: ClassVar[bool]
    """Whether several servers can hold it between them."""

    def check(self, *, initial_collect_steps: int) -> None:
        """Raises `ValueError` when its settings do not fit the schedule's."""

    def table_signatures(self, step_spec: Any) -> dict[str, Any]:
        """Returns what each of its tables holds, by table name, for trajectories of `step_spec`."""
        ...

    def make_tables(self, step_spec: Any, sampling: Sampling) -> list[reverb.Table]:
        """Returns the server's tables. Raises `ValueError` when their settings contradict each other."""
        ...

    def is_warm(self, servers: ReplayServers, initial_collect_steps: int) -> Optional[bool]:
        """Returns whether the replay as a whole holds `initial_collect_steps`; None when only the learner can tell.

        Raises:
          Unreachable: The server does not answer.
        """
        ...

    def make_sink(self, servers: ReplayServers, sampling: Sampling) -> TrajectorySink:
        """Returns a writer for the steps of one actor's environments, to `servers.mine()`."""
        ...

    def make_source(
        self, servers: ReplayServers, step_spec: Any, sampling: Sampling, strategy: tf.distribute.Strategy
    ) -> BatchSource:
        """Returns the learner's side, which reads all servers.

        Raises:
          RoleError: It does not fit into the memory there is (USAGE).
        """
        ...
