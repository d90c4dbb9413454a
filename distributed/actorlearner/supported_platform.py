"""Reports in one message that this machine cannot run actorlearner, before an import fails with an obscure error.

dm-reverb 0.14 has builds only for CPython 3.9, 3.10 and 3.11 on Linux x86_64 (glibc), and it is tied to
TensorFlow 2.15; this decides for the whole package. setup.py, the command and launch/environment.sh use this check.

Standard library only, and the syntax of Python 3.6, so that it runs where the rest of the package does not even parse.
"""

import os
import platform
import sys

EXIT_CODE = 64
OLDEST_PYTHON = (3, 9)
NEWEST_PYTHON = (3, 11)


def describe_problem(
    implementation: str, version: "tuple[int, ...]", system: str, machine: str, libc: str, is_64_bit: bool = True
) -> str:
    """Returns what to tell the user about a platform with these facts; the empty string if it is supported.

    Args:
      implementation: `platform.python_implementation()`, e.g. "CPython".
      version: The interpreter's version; at least (major, minor).
      system: `platform.system()`, e.g. "Linux".
      machine: `platform.machine()`, e.g. "x86_64".
      libc: "glibc", or anything else for another C library.
      is_64_bit: Whether the interpreter is a 64-bit build.
    """
    python_fits = implementation == "CPython" and OLDEST_PYTHON <= tuple(version[:2]) <= NEWEST_PYTHON and is_64_bit
    machine_fits = system == "Linux" and machine == "x86_64" and libc == "glibc"
    if python_fits and machine_fits:
        return ""
    found = "{} {}{} on {} {}{}".format(
        implementation,
        ".".join(str(part) for part in version[:3]),
        "" if is_64_bit else " (32-bit)",
        system or "an unknown system",
        machine or "(unknown CPU)",
        "" if system != "Linux" or libc == "glibc" else " without glibc",
    )
    if machine_fits:
        remedy = "launch/local.sh, which finds or fetches such a Python, or Docker: see docker/ in the repository"
    else:
        remedy = "Docker, on an x86_64 machine: see docker/ in the repository"
    return (
        "actorlearner does not run here.\n"
        "  found:     {}\n"
        "  supported: CPython 3.9-3.11 (64-bit) on Linux x86_64 with glibc, as Reverb has builds for nothing else\n"
        "  remedy:    {}"
    ).format(found, remedy)


def describe_problem_here() -> str:
    """Returns `describe_problem` for the running interpreter and machine."""
    try:
        libc = (os.confstr("CS_GNU_LIBC_VERSION") or "unknown").split()[0]
    except (AttributeError, OSError, ValueError):
        libc = ""
    return describe_problem(
        platform.python_implementation(),
        tuple(sys.version_info[:3]),
        platform.system(),
        platform.machine(),
        libc,
        sys.maxsize > 2**32,
    )


def check_platform() -> None:
    """Returns if actorlearner can run here.

    Raises:
      SystemExit: It cannot; exit code 64, after printing the message to stderr.
    """
    problem = describe_problem_here()
    if problem:
        sys.stderr.write(problem + "\n")
        sys.stderr.flush()
        raise SystemExit(EXIT_CODE)


if __name__ == "__main__":
    check_platform()
