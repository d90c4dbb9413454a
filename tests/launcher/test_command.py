"""What a role is started with."""

from __future__ import annotations

from actorlearner.launcher.command import role_environment


def test_only_the_learner_sees_the_gpus():
    """TensorFlow takes all of a GPU's memory in every process that sees it."""
    environ = {"CUDA_VISIBLE_DEVICES": "0,1", "TF_CPP_MIN_LOG_LEVEL": "0"}
    learner = role_environment("learner", environ)
    assert learner["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert learner["TF_CPP_MIN_LOG_LEVEL"] == "0"
    for kind in ("replay-server", "eval-actor", "collect-actor"):
        environment = role_environment(kind, environ)
        assert environment["CUDA_VISIBLE_DEVICES"] == "-1"
        assert environment["SDL_VIDEODRIVER"] == "dummy"
