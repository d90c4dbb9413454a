"""Make the certificates for TLS: a CA, and one for each role."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from actorlearner.flags import positive
from actorlearner.runtime.lifecycle import ExitCode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the folder, the names and the validity of the certificates."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="where they are written; give it as --tls_dir")
    parser.add_argument(
        "--hosts", nargs="+", action="extend", default=[], metavar="NAME",
        help="names and addresses at which the other roles reach the replay server (default: localhost, replay-server)",
    )  # fmt: skip
    parser.add_argument("--days", type=positive, default=365, metavar="N", help="the roles' validity (default: 365)")
    parser.add_argument("--ca_days", type=positive, default=3650, metavar="N", help="the CA's validity (default: 3650)")
    parser.add_argument(
        "--renew", action="store_true", help="replace the roles' certificates with new ones from the CA in DIR"
    )
    parser.add_argument(
        "--check", action="store_true", help="only list them; exit code 1 if one expires --within_days"
    )
    parser.add_argument("--within_days", type=float, default=30.0, metavar="N", help="limit for --check (default: 30)")


def run(arguments: argparse.Namespace) -> int:
    """Writes or lists the certificates; returns the exit status."""
    import datetime

    from actorlearner.runtime.tls import authority

    try:
        if arguments.check:
            found = authority.read_certificates(arguments.folder)
        else:
            found = authority.make_certificates(
                arguments.folder,
                arguments.hosts,
                days=arguments.days,
                ca_days=arguments.ca_days,
                renew=arguments.renew,
            )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.CANNOT_CREATE if isinstance(error, OSError) else ExitCode.USAGE
    now = datetime.datetime.now(datetime.timezone.utc)
    text, is_due = authority.describe(found, now, arguments.within_days)
    print(text)
    renewal = f"actorlearner certs {arguments.folder} --renew"
    if arguments.check:
        if is_due:
            print(f"Renew with: {renewal}", file=sys.stderr)
        return 1 if is_due else 0
    print(
        f"Copy to each machine only the folders of its roles, readable only by its owner; keep "
        f"{arguments.folder / authority.CA_KEY} off all of them.\nBefore they expire: {renewal}"
    )
    return ExitCode.DONE
