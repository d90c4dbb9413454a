"""The registered Minitaur with the same numbers in fewer calls: it steps about a third faster.

PyBullet's own class reads each joint's angle and velocity separately and sets each motor separately, five times in an
environment step. Here one call handles all eight. Physics, settings and numbers stay those of the registered
environment: `tests/environments/test_minitaur.py` compares them bit for bit.
"""

from __future__ import annotations

import math
from typing import Any, Optional

import numpy as np
import pybullet
from pybullet_envs.bullet import minitaur, minitaur_gym_env

_QUARTER_PI = math.pi / 4


def speed_up(environment: Any) -> None:
    """Speeds up PyBullet's registered Minitaur; other gym environments stay unchanged."""
    inner = environment.unwrapped
    if type(inner) is minitaur_gym_env.MinitaurBulletEnv and _has_registered_motors(inner):
        inner.__class__ = _QuickMinitaurEnv
        _speed_up_robot(inner)


def _has_registered_motors(environment: Any) -> bool:
    """Returns whether motors are driven as in the registered environment: by the motor model, without a speed limit."""
    return (
        environment._accurate_motor_model_enabled
        and not environment._pd_control_enabled
        and not environment._torque_control_enabled
        and environment._leg_model_enabled
        and environment._motor_velocity_limit == np.inf
        and environment._observation_noise_stdev == 0.0
        and not environment._is_render
        and environment._hard_reset  # each episode has a new robot
        and type(environment.minitaur) is minitaur.Minitaur
    )


def _speed_up_robot(environment: Any) -> None:
    """Replaces the methods of the robot; the environment's `reset` makes a new robot each time."""
    robot = environment.minitaur
    robot.__class__ = _QuickMinitaur
    robot.remember_constants()


class _QuickMinitaur(minitaur.Minitaur):
    """A Minitaur whose motors are read and set eight at a time."""

    _overheat_counter: np.ndarray

    def remember_constants(self) -> None:
        self._client = self._pybullet_client._client
        self._directions = np.array(self._motor_direction)
        self._overheat_steps = minitaur.OVERHEAT_SHUTDOWN_TIME / self.time_step
        # The state of the motors' joints, valid until the next simulation step.
        self._joints: Optional[tuple[np.ndarray, np.ndarray]] = None

    def forget_joints(self) -> None:
        self._joints = None

    def _read_joints(self) -> tuple[np.ndarray, np.ndarray]:
        if self._joints is None:
            states = pybullet.getJointStates(self.quadruped, self._motor_id_list, physicsClientId=self._client)
            self._joints = (
                np.array([state[0] for state in states]) * self._directions,
                np.array([state[1] for state in states]) * self._directions,
            )
        return self._joints

    def GetMotorAngles(self) -> np.ndarray:  # noqa: N802
        return self._read_joints()[0]

    def GetMotorVelocities(self) -> np.ndarray:  # noqa: N802
        return self._read_joints()[1]

    def ApplyAction(self, motor_commands: Any) -> None:  # noqa: N802
        angles, velocities = self._read_joints()
        actual, self._observed_motor_torques = _to_torques(self._motor_model, motor_commands, angles, velocities)
        if self._motor_overheat_protection:
            is_hot = np.abs(actual) > minitaur.OVERHEAT_SHUTDOWN_TORQUE
            self._overheat_counter = np.where(is_hot, self._overheat_counter + 1, 0.0)
            if self._overheat_counter.max() > self._overheat_steps:
                for index in np.flatnonzero(self._overheat_counter > self._overheat_steps):
                    self._motor_enabled_list[index] = False
        self._applied_motor_torque = actual * self._directions
        forces = self._applied_motor_torque.tolist()
        if not all(self._motor_enabled_list):
            forces = [force if enabled else 0 for force, enabled in zip(forces, self._motor_enabled_list)]
        pybullet.setJointMotorControlArray(
            self.quadruped,
            self._motor_id_list,
            pybullet.TORQUE_CONTROL,
            forces=forces,
            physicsClientId=self._client,
        )

    def ConvertFromLegModel(self, actions: Any) -> np.ndarray:  # noqa: N802
        # In double precision, as NumPy computes with scalars, then cast to the actions' type.
        actions = np.asarray(actions)
        wide = actions.astype(np.float64)
        legs = np.arange(8) // 2
        signs = np.array([1, -1, 1, -1, -1, 1, -1, 1])  # which way a motor turns to make its leg longer
        swing = -1 * _QUARTER_PI * (wide[legs + 4] + 1.5)
        extension = signs * _QUARTER_PI * wide[legs]
        return (math.pi + swing + extension).astype(actions.dtype)


def _to_torques(model: Any, commands: Any, angles: np.ndarray, velocities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns `MotorModel.convert_to_torque`'s actual and observed torques, without the slow `np.clip`."""
    limit = minitaur.motor.OBSERVED_TORQUE_LIMIT
    clipping = minitaur.motor.VOLTAGE_CLIPPING
    pwm = -model._kp * (angles - commands) - model._kd * velocities
    pwm = np.minimum(np.maximum(pwm, -1.0), 1.0)
    observed = model._torque_constant * (pwm * model._voltage / model._resistance)
    observed = np.minimum(np.maximum(observed, -limit), limit)
    voltage = pwm * model._voltage - (model._torque_constant + model._viscous_damping) * velocities
    current = np.minimum(np.maximum(voltage, -clipping), clipping) / model._resistance
    actual = np.interp(np.abs(current), model._current_table, model._torque_table)
    return np.sign(current) * actual, observed


class _QuickMinitaurEnv(minitaur_gym_env.MinitaurBulletEnv):
    """The registered environment around a `_QuickMinitaur`."""

    _last_base_position: Any

    def reset(self) -> np.ndarray:
        observation = super().reset()
        _speed_up_robot(self)
        return observation

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, dict[str, Any]]:
        robot = self.minitaur
        if not (np.abs(action) <= self._action_bound + minitaur_gym_env.ACTION_EPS).all():
            self._transform_action_to_motor_command(action)  # raises, naming the component that is out of bounds
        commands = robot.ConvertFromLegModel(action)
        client = self._pybullet_client._client
        for _ in range(self._action_repeat):
            robot.ApplyAction(commands)
            pybullet.stepSimulation(physicsClientId=client)
            robot.forget_joints()
        self._env_step_counter += 1
        position, orientation = pybullet.getBasePositionAndOrientation(robot.quadruped, physicsClientId=client)
        angles, velocities = robot._read_joints()
        torques = robot.GetMotorTorques()
        reward = self._reward_at(position, torques, velocities)
        self._observation = [*angles.tolist(), *velocities.tolist(), *torques.tolist(), *orientation]
        return np.array(self._observation), reward, self._has_ended(position, orientation), {}

    def _reward_at(self, position: tuple[float, ...], torques: np.ndarray, velocities: np.ndarray) -> float:
        last, self._last_base_position = self._last_base_position, position
        forward = position[0] - last[0]
        drift, shake = -abs(position[1] - last[1]), -abs(position[2] - last[2])
        energy = np.abs(np.dot(torques, velocities)) * self._time_step
        self._objectives.append([forward, energy, drift, shake])
        return (
            self._distance_weight * forward
            - self._energy_weight * energy
            + self._drift_weight * drift
            + self._shake_weight * shake
        )

    def _has_ended(self, position: tuple[float, ...], orientation: tuple[float, ...]) -> bool:
        up = pybullet.getMatrixFromQuaternion(orientation)[6:]
        is_fallen = np.dot([0, 0, 1], up) < 0.85 or position[2] < 0.13
        return bool(is_fallen or math.sqrt(position[0] ** 2 + position[1] ** 2) > self._distance_limit)
