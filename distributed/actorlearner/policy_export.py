"""The run's policies as files that others load: SavedModels and numbered checkpoints."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import tensorflow as tf
from tf_agents.agents import tf_agent
from tf_agents.policies import greedy_policy, policy_saver, tf_policy

from actorlearner.agents.exported import with_environment_actions


class PolicyExport:
    """Writes what others load: SavedModels, and numbered checkpoints that TF-Agents' `policy_loader` puts into them.

    Folders and names are those of TF-Agents' `PolicySavedModelTrigger`. As there, the SavedModels hold the weights that
    the agent began with until training ends; those of a numbered checkpoint are loaded into them.
    """

    def __init__(self, agent: tf_agent.TFAgent, train_step: tf.Variable, folder: Path, action_spec: Any = None):
        """Args:
        agent: Whose policies they are.
        train_step: Is saved with them.
        folder: Where they go.
        action_spec: The environment's, where its actions are not the agent's own. See `Experiment.action_spec`.
        """
        greedy = agent.policy
        raw = greedy.wrapped_policy if isinstance(greedy, greedy_policy.GreedyPolicy) else greedy
        if raw is greedy:
            greedy = greedy_policy.GreedyPolicy(raw)
        self._policies: dict[str, tf_policy.TFPolicy] = {
            "policy": raw,
            "collect_policy": agent.collect_policy,
            "greedy_policy": greedy,
        }
        if action_spec is not None:
            policies = self._policies.items()
            self._policies = {name: with_environment_actions(policy, action_spec) for name, policy in policies}
        self._train_step = train_step
        self._folder = folder

    @functools.cache  # noqa: B019  making a saver traces the policy, which takes seconds
    def _saver(self, name: str) -> policy_saver.PolicySaver:
        return policy_saver.PolicySaver(self._policies[name], batch_size=None, train_step=self._train_step)

    def prepare(self) -> None:
        """Writes the SavedModels unless they are there, so that no checkpoint has to; takes some seconds."""
        if not (self._folder / "greedy_policy" / "policy_specs.pbtxt").is_file():  # the last file of the last one
            self.save_policies()

    def save_checkpoint(self, train_step: int) -> None:
        """Writes the policy's variables to `checkpoints/policy_checkpoint_<train step>`."""
        self.prepare()
        self._saver("policy").save_checkpoint(
            str(self._folder / "checkpoints" / f"policy_checkpoint_{train_step:010d}")
        )

    def save_policies(self) -> None:
        """Writes the three SavedModels with the weights the agent has now; takes some seconds."""
        for name in self._policies:
            self._saver(name).save(str(self._folder / name))
