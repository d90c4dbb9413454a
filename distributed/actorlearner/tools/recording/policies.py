"""Policies for one environment: saved ones, and a random one."""

from __future__ import annotations

import os
import pathlib
from typing import Any, Union

from actorlearner.tools.recording.episodes import Act, Environment

PathLike = Union[str, "os.PathLike[str]"]


def random_act(environment: Environment, seed: int | None = None) -> Act:
    """Returns an act function that draws actions uniformly from the environment's action spec.

    Source: tf_agents.policies.random_py_policy, as both tutorials use it.
    """
    from tf_agents.policies import random_py_policy

    policy = random_py_policy.RandomPyPolicy(environment.time_step_spec(), environment.action_spec(), seed=seed)

    def act(time_step: Any) -> Any:
        return policy.action(time_step).action

    return act


def saved_model_act(policy_dir: PathLike) -> Act:
    """Returns the act function of `load_saved_policy`."""
    return load_saved_policy(policy_dir)[0]


def load_saved_policy(policy_dir: PathLike) -> tuple[Act, int]:
    """Returns an act function for a policy saved by TF-Agents' `PolicySaver`, and the train step of its weights.

    The function carries the policy's state, if any, from step to step and resets it at the first step of each episode:
    use it for one environment at a time. It adds and removes the batch dimension. Only the SavedModel is needed, not
    the code of its networks.

    Args:
      policy_dir: A SavedModel written by `PolicySaver.save`, e.g. `<run>/policies/greedy_policy`.

    Raises:
      ValueError: There is no such SavedModel, or it is not a policy.
    """
    policy_dir = pathlib.Path(policy_dir)
    for needed in ("saved_model.pb", "policy_specs.pbtxt"):
        if not (policy_dir / needed).is_file():
            raise ValueError(
                f"No saved policy in {policy_dir}: it has no {needed}. Pass a directory that PolicySaver wrote, such as"
                " policies/greedy_policy of a run that has saved its policies."
            )
    import tensorflow as tf
    from tf_agents.policies import policy_saver
    from tf_agents.specs import tensor_spec

    def load() -> tuple[Any, Any]:
        specs = policy_saver.specs_from_collect_data_spec(
            tensor_spec.from_pbtxt_file(str(policy_dir / "policy_specs.pbtxt"))
        )
        return specs, tf.saved_model.load(str(policy_dir))

    try:
        found = policy_dir.stat().st_ino
        try:
            specs, policy = load()
        except Exception:
            if policy_dir.stat().st_ino == found:
                raise
            specs, policy = load()  # a running training has replaced it by a newer one
        train_step = int(policy.get_train_step())
        initial_state = policy.get_initial_state(batch_size=1) if specs["policy_state_spec"] else ()
    except Exception as error:
        raise ValueError(f"The saved policy in {policy_dir} cannot be loaded: {error}") from error
    input_specs = (specs["time_step_spec"], specs["policy_state_spec"])
    flat_specs = tf.nest.flatten(input_specs)

    # One concrete function on flat tensors, which batches and unbatches inside the graph, takes about half the time of
    # SavedModelPyTFEagerPolicy.action: seconds over the 9,000 steps of a CartPole video.
    @tf.function(input_signature=[tf.TensorSpec(spec.shape, spec.dtype) for spec in flat_specs])
    def policy_step(*flat_inputs: Any) -> Any:
        time_step, state = tf.nest.pack_sequence_as(input_specs, [value[tf.newaxis] for value in flat_inputs])
        step = policy.action(time_step, state)
        return tf.nest.map_structure(lambda value: value[0], (step.action, step.state))

    concrete_policy_step = policy_step.get_concrete_function()
    initial_state = tf.nest.map_structure(lambda value: value[0], initial_state)
    state = initial_state

    def act(time_step: Any) -> Any:
        nonlocal state
        inputs = tf.nest.flatten((time_step, initial_state if time_step.is_first() else state))
        action, state = concrete_policy_step(
            *(tf.constant(value, dtype=spec.dtype) for value, spec in zip(inputs, flat_specs))
        )
        return tf.nest.map_structure(lambda value: value.numpy(), action)

    return act, train_step
