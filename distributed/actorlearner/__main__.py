"""`python -m actorlearner`: the same as the `actorlearner` command."""

from actorlearner.supported_platform import check_platform

if __name__ == "__main__":
    check_platform()  # before cli, whose imports fail on an unsupported platform

    from actorlearner.cli import main

    raise SystemExit(main())
