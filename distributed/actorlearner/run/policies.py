"""Exports the run's policies as SavedModels and numbered checkpoints."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf
from tf_agents.agents import tf_agent
from tf_agents.policies import policy_saver, tf_policy

from actorlearner.agents.exported import with_environment_actions
from actorlearner.agents.policies import Policies
from actorlearner.runtime import durable_files

_SPECS = "policy_specs.pbtxt"  # written last in a SavedModel
_VARIABLES = Path("variables", "variables")

NAMES = ("policy", "collect_policy", "greedy_policy")


class PolicyExport:
    """Writes SavedModels, and numbered checkpoints that TF-Agents' `policy_loader` loads into them.

    Folders and names are those of TF-Agents' `PolicySavedModelTrigger`. Each is written to a temporary name, synced and
    renamed, so that none is ever seen half-written. Each says its train step: the number, or the SavedModel's
    `get_train_step()`.

    Writing has two parts: the first reads the variables between two train steps and returns the second, which waits for
    the disk and may be called in another thread, in the same order.

    Attributes:
      is_prepared: Whether the SavedModels exist, so that writing them takes milliseconds.
    """

    def __init__(
        self,
        agent: tf_agent.TFAgent,
        train_step: tf.Variable,
        folder: Path,
        action_spec: Any = None,
        *,
        anew: bool = False,
    ):
        """Args:
        agent: The agent whose policies are exported.
        train_step: Its value names the policies.
        folder: Holds the policies; made if missing.
        action_spec: The environment's action spec, if it differs from the agent's. See `Experiment.action_spec`.
        anew: Existing SavedModels were made with other settings, so their graphs must be traced again.
        """
        policies = Policies(agent, train_step)
        each = (policies.plain, policies.collect, policies.greedy)
        self._policies: dict[str, tf_policy.TFPolicy] = dict(zip(NAMES, each))
        if action_spec is not None:
            self._policies = {
                name: with_environment_actions(policy, action_spec) for name, policy in self._policies.items()
            }
        self._train_step = train_step
        # Policies with the same variables in the same order are written once.
        self._like = {name: next(other for other in self._policies if self._has_equal(name, other)) for name in NAMES}
        self._folder = folder
        self.is_prepared = not anew and all((folder / name / _SPECS).is_file() for name in self._policies)
        self._numbers = itertools.count()
        self._checkpoints = folder / "checkpoints"
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        for place in (folder, self._checkpoints):  # left by a learner that was killed while writing
            for leftover in (*place.glob(".*.new"), *place.glob("*.old")):
                shutil.rmtree(leftover, ignore_errors=True)

    def _has_equal(self, one: str, other: str) -> bool:
        variables, others = self._policies[one].variables(), self._policies[other].variables()
        return list(map(id, variables)) == list(map(id, others))

    @functools.cache  # noqa: B019  making a saver traces the policy, which takes seconds
    def _saver(self, name: str) -> policy_saver.PolicySaver:
        return policy_saver.PolicySaver(self._policies[name], batch_size=None, train_step=self._train_step)

    @functools.cache  # noqa: B019  compiled at its first use: otherwise TensorFlow walks all objects at every write
    def _write_variables(self, name: str) -> Callable[[str], None]:
        """Returns a function that writes a policy's variables under a prefix, as `PolicySaver.save_checkpoint` does."""
        module = tf.Module()
        module.model_variables, module.train_step = self._policies[name].variables(), self._train_step
        checkpoint = tf.train.Checkpoint(
            policy=module, model_variables=module.model_variables, train_step=self._train_step
        )
        return tf.function(checkpoint.write, input_signature=[tf.TensorSpec((), tf.string)], autograph=False)

    def prepare(self) -> None:
        """Writes the SavedModels unless they exist; later only their variables are written. Takes some seconds."""
        if not self.is_prepared:
            self.save_policies()

    def save_policies(self) -> None:
        """Writes the three SavedModels with the weights the agent has now; takes some seconds."""
        for name in self._policies:
            new = self._make_aside(self._folder / name)
            self._saver(name).save(str(new))
            durable_files.put_in_place(new, self._folder / name)
        self.is_prepared = True

    def write_policies(self) -> Callable[[], None]:
        """Writes the agent's present weights into the three SavedModels; takes milliseconds after `prepare`."""
        self.prepare()
        written = {name: self._make_aside(self._folder / name) for name in NAMES}
        with _removed_if_it_fails(*written.values()):
            for name in set(self._like.values()):
                self._write_variables(name)(str(written[name] / _VARIABLES))

        def finish() -> None:
            with _removed_if_it_fails(*written.values()):
                for name, new in written.items():
                    if self._like[name] != name:
                        for path in (written[self._like[name]] / _VARIABLES).parent.iterdir():
                            _copy(path, (new / _VARIABLES).parent / path.name)
                    _copy_graph(self._folder / name, new)
                for name, new in written.items():
                    durable_files.put_in_place(new, self._folder / name)

        return finish

    def write_checkpoint(self) -> Callable[[], None]:
        """Writes the policy's variables to `checkpoints/policy_checkpoint_<train step>`."""
        path = self._path(int(self._train_step.numpy()))
        new = self._make_aside(path)
        with _removed_if_it_fails(new):
            self._write_variables("policy")(str(new / _VARIABLES))

        def finish() -> None:
            with _removed_if_it_fails(new):
                durable_files.put_in_place(new, path)

        return finish

    def find_missing(self, train_steps: Iterable[int]) -> list[int]:
        """Returns which of these train steps have no finished numbered checkpoint."""

        def is_there(train_step: int) -> bool:
            index = self._path(train_step) / _VARIABLES.with_suffix(".index")
            return index.is_file() and index.stat().st_size > 0

        return [train_step for train_step in train_steps if not is_there(train_step)]

    def _path(self, train_step: int) -> Path:
        return self._checkpoints / f"policy_checkpoint_{train_step:010d}"

    def _make_aside(self, path: Path) -> Path:
        aside = path.with_name(f".{path.name}-{next(self._numbers)}.new")
        (aside / _VARIABLES).parent.mkdir(parents=True)
        return aside


@contextlib.contextmanager
def _removed_if_it_fails(*folders: Path) -> Iterator[None]:
    """Removes half-written folders on an error, because each retry would fill a full disk further."""
    try:
        yield
    except BaseException:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _copy_graph(saved_model: Path, new: Path) -> None:
    """Copies a SavedModel into a folder, without its variables and their fingerprint."""
    for path in saved_model.iterdir():
        if path.is_dir():
            if path.name != _VARIABLES.parent.name:
                shutil.copytree(path, new / path.name)
        elif path.name != "fingerprint.pb":
            _copy(path, new / path.name)


def _copy(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy)
    except OSError:  # the file system has no links
        shutil.copy2(path, copy)
