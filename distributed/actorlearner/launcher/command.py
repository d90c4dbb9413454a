"""A role's command line and environment."""

from __future__ import annotations

from collections.abc import Mapping

REPLAY_SERVER = "replay-server"
LEARNER = "learner"
EVAL_ACTOR = "eval-actor"
COLLECT_ACTOR = "collect-actor"
ACTORS = (EVAL_ACTOR, COLLECT_ACTOR)


def role_environment(kind: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Returns `environ` with what a role needs: headless, unbuffered, no TLS, and the GPUs for the learner alone."""
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2", **environ, "SDL_VIDEODRIVER": "dummy", "PYTHONUNBUFFERED": "1"}
    environment.pop("ACTORLEARNER_TLS_DIR", None)
    if kind != LEARNER:
        environment["CUDA_VISIBLE_DEVICES"] = "-1"
    return environment
