"""`actorlearner certs`: what it writes, what it never overwrites, and what it says about expiry."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from actorlearner import cli
from actorlearner.runtime.tls.authority import CA_KEY, ROLES, make_certificates, read_certificates
from actorlearner.runtime.tls.certificates import CA, CERTIFICATE, KEY, make_context


def certs(*arguments: object) -> int:
    return cli.main(["certs", *map(str, arguments)])


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_role_gets_a_folder_that_works_by_itself(tmp_path, capsys):
    """A machine gets the folders of its roles and nothing else; above all not the CA's key."""
    assert certs(tmp_path / "certs", "--hosts", "gpu1", "10.0.0.7") == 0
    for role in ROLES:
        assert {path.name for path in (tmp_path / "certs" / role).iterdir()} == {CA, CERTIFICATE, KEY}
        make_context(tmp_path / "certs" / role, is_server=role == "replay-server")
    said = capsys.readouterr().out
    assert "for localhost, 127.0.0.1, ::1, replay-server, gpu1, 10.0.0.7" in said
    assert "valid for 365 days" in said and "valid for 3650 days" in said
    assert f"actorlearner certs {tmp_path / 'certs'} --renew" in said
    assert f"keep {tmp_path / 'certs' / CA_KEY} off all of them" in said


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_nobody_but_their_owner_reads_the_keys(tmp_path, umask):
    """Whoever has a key is the role."""
    before = os.umask(umask)
    try:
        make_certificates(tmp_path / "certs", [])
        make_certificates(tmp_path / "certs", [], renew=True)
    finally:
        os.umask(before)
    keys = list((tmp_path / "certs").rglob("*.key"))
    assert len(keys) == 1 + len(ROLES)
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


def test_nothing_is_overwritten_without_being_told(tmp_path, capsys):
    """A second CA in the place of the first would shut every role out at its next start."""
    folder = tmp_path / "certs"
    assert certs(folder) == 0
    before = snapshot(folder)
    assert certs(folder) == 64
    assert f"{folder / CA} exists, and nothing is overwritten. --renew makes new" in capsys.readouterr().err
    assert snapshot(folder) == before
    (tmp_path / "half" / "learner").mkdir(parents=True)
    assert certs(tmp_path / "half") == 64
    assert snapshot(tmp_path / "half") == {}


def test_renewing_keeps_the_ca_and_the_hosts(tmp_path, capsys):
    """With another CA the roles that run would refuse those that are started."""
    folder = tmp_path / "certs"
    assert certs(folder, "--hosts", "gpu1") == 0
    before = snapshot(folder)
    assert certs(folder, "--renew", "--days=20") == 0
    after = snapshot(folder)
    assert set(after) == set(before)
    changed = {path.relative_to(folder).as_posix() for path in before if before[path] != after[path]}
    assert changed == {f"{role}/{name}" for role in ROLES for name in (CERTIFICATE, KEY)}
    found = {certificate.subject: certificate for certificate in read_certificates(folder)}
    assert found["replay-server"].hosts[-1] == "gpu1"
    assert certs(folder, "--renew", "--hosts", "gpu2") == 0
    found = {certificate.subject: certificate for certificate in read_certificates(folder)}
    assert found["replay-server"].hosts[-1] == "gpu2" and "gpu1" not in found["replay-server"].hosts


def test_no_certificate_outlives_its_ca(tmp_path):
    """It would be refused on a day that nothing announces."""
    found = make_certificates(tmp_path / "certs", [], days=100, ca_days=10)
    assert {certificate.expires for certificate in found} == {found[0].expires}


def test_openssl_agrees_which_certificate_may_be_what(tmp_path):
    """An actor's key, on a machine that many use, must not make it the replay server."""
    folder = tmp_path / "certs"
    make_certificates(folder, ["gpu1"])
    openssl = shutil.which("openssl")
    if not openssl:
        pytest.fail("there is no openssl command: install openssl")

    def accepts(role: str, purpose: str, *options: str) -> bool:
        command = [openssl, "verify", "-x509_strict", "-CAfile", folder / CA, "-purpose", purpose, *options]
        return not subprocess.run([*command, folder / role / CERTIFICATE], capture_output=True).returncode

    assert [role for role in ROLES if accepts(role, "sslserver")] == ["replay-server"]
    assert all(accepts(role, "sslclient") for role in ROLES)
    assert accepts("replay-server", "sslserver", "-verify_hostname", "gpu1")
    assert not accepts("replay-server", "sslserver", "-verify_hostname", "gpu2")


def test_what_expires_is_told_in_time(tmp_path, capsys):
    """Else it is told by every role at once, on a Sunday."""
    folder = tmp_path / "certs"
    make_certificates(folder, [], days=20)
    assert certs(folder, "--check", "--within_days=10") == 0
    assert "learner/tls.crt  valid for 20 days" in capsys.readouterr().out
    assert certs(folder, "--check") == 1
    said = capsys.readouterr()
    assert "learner/tls.crt  expires in 20.0 days" in said.out
    assert f"Renew with: actorlearner certs {folder} --renew" in said.err
    make_certificates(folder, [], days=-1, renew=True)
    assert certs(folder, "--check", "--within_days=0") == 1
    assert "learner/tls.crt  HAS EXPIRED, until" in capsys.readouterr().out
    shutil.rmtree(folder / "replay-server")
    (folder / CA).unlink()
    assert certs(folder, "--check") == 1  # as on a machine that has some roles' folders


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hosts", "gpu1:8008"], "--hosts: 'gpu1:8008': expected a host name or address, without a port"),
        (["--renew"], "is missing. `actorlearner certs` alone"),
        (["--check"], "holds no certificates. Make them with: actorlearner certs "),
    ],
)
def test_what_cannot_work_is_said_and_leaves_nothing(tmp_path, capsys, arguments, message):
    assert certs(tmp_path / "certs", *arguments) == 64
    assert message in capsys.readouterr().err
    assert snapshot(tmp_path) == {}


def test_an_expired_ca_is_not_renewed_from(tmp_path, capsys):
    make_certificates(tmp_path / "certs", [], ca_days=-1)
    assert certs(tmp_path / "certs", "--renew") == 64
    assert "expired at" in capsys.readouterr().err
