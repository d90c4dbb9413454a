"""Saves an optimizer's moments under the names of their variables.

Keras' new optimizers (`tf.keras.optimizers.*`) keep a list for each kind of moment, and TensorFlow saves a list by
index, which is the variable's position in the agent's list. Some of TF-Agents' agents (TD3, PPO, CQL) make that list
from a set, in an order that differs between processes. So the lists are hidden from TensorFlow, and the moments are
saved as `moments/<optimizer>/<kind>/<variable>`. Legacy optimizers save moments by variable already.
"""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Optional

import tensorflow as tf
from tensorflow.core.protobuf import trackable_object_graph_pb2

from actorlearner.runtime.lifecycle import ExitCode, RoleError

_EDGE = "moments"
_GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"  # TensorFlow's name of the tensor with the object graph


class NamedMoments:
    """The moments of all optimizers that are reachable from a `tf.train.Checkpoint`."""

    def __init__(self, checkpoint: tf.train.Checkpoint):
        """Args:
        checkpoint: Has an attribute `moments` from the first `attach` on.
        """
        self._checkpoint = checkpoint
        self._lists: list[tuple[Any, str]] = []  # (optimizer, attribute) of the lists hidden from TensorFlow
        self._names: set[tuple[str, str, str]] = set()

    def attach(self) -> None:
        """Makes the checkpoint hold the moments by name; call it again after an optimizer has built its variables.

        Raises:
          RoleError: An optimizer has state that cannot be assigned to a variable by name (USAGE).
        """
        nodes = _nodes_by_path(self._checkpoint)
        variables = {path: node for path, node in nodes.items() if isinstance(node, tf.Variable)}
        moments: dict[str, dict[str, dict[str, tf.Variable]]] = {}
        for path, node in nodes.items():
            if isinstance(node, tf.keras.optimizers.Optimizer):
                optimizer = getattr(node, "inner_optimizer", node)  # the one inside a LossScaleOptimizer
                if getattr(optimizer, "_index_dict", None):
                    moments[path] = self._take_lists(optimizer, path, variables)
        found = {
            (optimizer, kind, name) for optimizer, kinds in moments.items() for kind in kinds for name in kinds[kind]
        }
        if found - self._names:
            self._names |= found
            setattr(self._checkpoint, _EDGE, moments)

    def _take_lists(
        self, optimizer: Any, where: str, variables: dict[str, tf.Variable]
    ) -> dict[str, dict[str, tf.Variable]]:
        """Returns the optimizer's moments by kind and variable, and hides its lists from TensorFlow."""
        trained = {optimizer._var_key(variable): path for path, variable in variables.items()}
        unnamed = [key for key in optimizer._index_dict if key not in trained]
        if unnamed:
            raise RoleError(
                f"the optimizer {where} ({type(optimizer).__name__}) trains variables that are not part of the agent "
                f"({', '.join(map(str, unnamed[:3]))}): they cannot be saved. Make their network an attribute of it.",
                ExitCode.USAGE,
            )
        in_order = [trained[key] for key, _ in sorted(optimizer._index_dict.items(), key=lambda item: item[1])]
        kinds: dict[str, dict[str, tf.Variable]] = {}
        for attribute, value in list(vars(optimizer).items()):
            if not isinstance(value, list) or not value or not all(isinstance(one, tf.Variable) for one in value):
                continue
            if attribute == "_variables":  # lists all variables, which are also listed elsewhere
                self._hide(optimizer, attribute)
            elif len(value) == len(in_order):
                kinds[attribute] = dict(zip(in_order, value))
                self._hide(optimizer, attribute)
        self._require_named(optimizer, where, kinds)
        return kinds

    @staticmethod
    def _require_named(optimizer: Any, where: str, kinds: dict[str, dict[str, tf.Variable]]) -> None:
        named = {id(moment) for moments in kinds.values() for moment in moments.values()}
        named |= {id(value) for value in vars(optimizer).values()}
        unnamed = [one.name for one in optimizer.variables if id(one) not in named]
        if unnamed:
            raise RoleError(
                f"the optimizer {where} ({type(optimizer).__name__}) keeps {', '.join(unnamed[:3])} so that its "
                "trained variable cannot be told, and a resumed run could restore it to another one. Let the optimizer "
                "keep one list for each kind of moment, with an item for each variable, as Keras' own do.",
                ExitCode.USAGE,
            )

    def _hide(self, optimizer: Any, attribute: str) -> None:
        _set_tracked(optimizer, attribute, tracked=False)
        if not any(one is optimizer and name == attribute for one, name in self._lists):
            self._lists.append((optimizer, attribute))

    @contextlib.contextmanager
    def as_written(self, prefix: str) -> Iterator[None]:
        """Allows reading the checkpoint at `prefix`; one from an earlier version has lists instead of names.

        Raises:
          ValueError: It has moments of optimizers or variables that do not exist here.
        """
        written = _written_names(prefix)
        if written is not None:
            missing = written - self._names
            if missing:
                optimizer, kind, name = min(missing)
                raise ValueError(f"it has {kind} of {name} from the optimizer {optimizer}, which does not exist here.")
            yield
            return
        if self._lists:
            logging.info("%s has moments by position, as earlier versions wrote them", prefix)
        try:
            self._show(tracked=True)
            yield
        finally:
            self._show(tracked=False)

    def _show(self, *, tracked: bool) -> None:
        for optimizer, attribute in self._lists:
            _set_tracked(optimizer, attribute, tracked=tracked)
        if self._names:
            if tracked:
                self._hidden = getattr(self._checkpoint, _EDGE)
                delattr(self._checkpoint, _EDGE)
            else:
                setattr(self._checkpoint, _EDGE, self._hidden)


def _set_tracked(owner: Any, attribute: str, *, tracked: bool) -> None:
    """Makes TensorFlow save a list with its owner, or not; the list itself stays as it is."""
    value = list(getattr(owner, attribute))
    delattr(owner, attribute)
    setattr(owner, attribute, value if tracked else owner._no_dependency(value))


def _nodes_by_path(checkpoint: tf.train.Checkpoint) -> dict[str, Any]:
    """Returns the checkpoint's objects by their shortest path, which is the same in every process."""
    nodes: dict[str, Any] = {}
    seen = {id(checkpoint)}
    to_visit: collections.deque[tuple[tuple[str, ...], Any]] = collections.deque([((), checkpoint)])
    while to_visit:
        path, node = to_visit.popleft()
        for name, child in sorted(tf.train.TrackableView.children(node).items()):
            if id(child) not in seen and (path or name != _EDGE):
                seen.add(id(child))
                nodes["/".join((*path, name))] = child
                to_visit.append(((*path, name), child))
    return nodes


def _written_names(prefix: str) -> Optional[set[tuple[str, str, str]]]:
    """Returns (optimizer, kind, variable) of each moment in a checkpoint; None if it has none by name."""
    graph = trackable_object_graph_pb2.TrackableObjectGraph()
    graph.ParseFromString(tf.train.load_checkpoint(prefix).get_tensor(_GRAPH_KEY))

    def children(node_id: int) -> dict[str, int]:
        return {child.local_name: child.node_id for child in graph.nodes[node_id].children}

    root = children(0)
    if _EDGE not in root:
        return None
    return {
        (optimizer, kind, name)
        for optimizer, kinds in children(root[_EDGE]).items()
        for kind, moments in children(kinds).items()
        for name in children(moments)
    }
