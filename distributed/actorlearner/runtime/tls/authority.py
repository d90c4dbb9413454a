"""Makes the certificates for TLS between roles: a small CA for the run, and one certificate for each role.

  DIR/ca.key              signs new certificates; keep it off the training machines
  DIR/ca.crt              the CA that every role trusts
  DIR/<role>/             ca.crt, tls.crt, tls.key: all that a machine with this role needs, as --tls_dir=DIR expects

Only the replay server's certificate is valid for a server: an actor cannot impersonate it.
"""

from __future__ import annotations

import dataclasses
import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Union

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from actorlearner.runtime import durable_files
from actorlearner.runtime.tls.certificates import CA, CERTIFICATE, KEY

REPLAY_SERVER = "replay-server"
ROLES = (REPLAY_SERVER, "learner", "collect-actor", "eval-actor")
CA_KEY = "ca.key"

ALWAYS = ("localhost", "127.0.0.1", "::1", REPLAY_SERVER)
"""Names that every replay server certificate has: its own machine's, and those in docker/ and launch/kubernetes."""

_CLOCK_SKEW = datetime.timedelta(minutes=5)


@dataclasses.dataclass(frozen=True)
class Certificate:
    """A certificate file and its content.

    Attributes:
      path: Path of the certificate.
      subject: Its role, or the CA's name.
      hosts: Names and addresses at which it may be reached; empty for roles that are not servers.
      expires: In UTC.
    """

    path: Path
    subject: str
    hosts: Sequence[str]
    expires: datetime.datetime

    def days_left(self, now: datetime.datetime) -> float:
        return (self.expires - now) / datetime.timedelta(days=1)


def make_certificates(
    folder: Path, hosts: Sequence[str], *, days: float = 365, ca_days: float = 3650, renew: bool = False
) -> Sequence[Certificate]:
    """Writes a CA and a certificate for each role into `folder`, and returns all of them.

    Args:
      folder: Holds the certificates; made if missing.
      hosts: Names and addresses at which the other roles reach the replay server, besides `ALWAYS`. When renewing, an
        empty list keeps those of the old certificate.
      days: Validity of the roles' certificates; never beyond the CA's.
      ca_days: Validity of a new CA.
      renew: Replaces the roles' certificates and keys by new ones from the CA in `folder`. The CA itself is never
        replaced.

    Raises:
      ValueError: There is a CA but `renew` is not set, or the reverse; or the CA has expired.
      OSError: The folder cannot be read or written.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    for host in hosts:
        _host(host)  # check all hosts before writing anything
    if renew:
        if not (folder / CA_KEY).is_file():
            raise ValueError(f"--renew: {folder / CA_KEY} is missing. `actorlearner certs` alone makes a new CA")
        ca_certificate, ca_key = _read_ca(folder)
        hosts = hosts or _read_hosts(folder)
        if ca_certificate.not_valid_after_utc < now:
            raise ValueError(
                f"--renew: the CA {folder / CA} expired at {ca_certificate.not_valid_after_utc}. Make a new one in "
                "another directory, and give all roles their new certificates at once"
            )
    else:
        taken = [name for name in (CA, CA_KEY, *ROLES) if (folder / name).exists()]
        if taken:
            raise ValueError(
                f"{folder / taken[0]} exists, and nothing is overwritten. --renew makes new certificates of the same "
                "CA; for a new CA give another directory"
            )
        folder.mkdir(parents=True, exist_ok=True)
        ca_certificate, ca_key = _make_ca(now, ca_days)
        _write(folder / CA_KEY, _to_pem(ca_key), secret=True)
        _write(folder / CA, _to_pem(ca_certificate))
    expires = min(now + datetime.timedelta(days=days), ca_certificate.not_valid_after_utc)
    for role in ROLES:
        names = [*ALWAYS, *hosts] if role == REPLAY_SERVER else [role]
        certificate, key = _make_role(role, list(dict.fromkeys(names)), now, expires, ca_certificate, ca_key)
        (folder / role).mkdir(exist_ok=True)
        _write(folder / role / CA, _to_pem(ca_certificate))
        _write(folder / role / KEY, _to_pem(key), secret=True)
        _write(folder / role / CERTIFICATE, _to_pem(certificate))
    return read_certificates(folder)


def read_certificates(folder: Path) -> Sequence[Certificate]:
    """Returns the CA's and the roles' certificates in `folder`.

    Raises:
      ValueError: There are none, or one cannot be parsed.
      OSError: A file cannot be read.
    """
    found = []
    for path in (folder / CA, *(folder / role / CERTIFICATE for role in ROLES)):
        if path.exists():
            certificate = _read(path)
            (name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            hosts = _names(certificate) if name.value == REPLAY_SERVER else []
            found.append(Certificate(path, str(name.value), hosts, certificate.not_valid_after_utc))
    if not found:
        raise ValueError(f"{folder} holds no certificates. Make them with: actorlearner certs {folder} --hosts NAME...")
    return found


def describe(certificates: Sequence[Certificate], now: datetime.datetime, within_days: float) -> tuple[str, bool]:
    """Returns a line for each certificate, and whether any has expired or expires within `within_days`."""
    lines, is_due = [], False
    for certificate in certificates:
        days = certificate.days_left(now)
        state = f"valid for {days:.0f} days" if days >= within_days else f"expires in {days:.1f} days"
        if days < 0:
            state = "HAS EXPIRED"
        is_due = is_due or days < within_days
        hosts = f"  for {', '.join(certificate.hosts)}" if certificate.hosts else ""
        lines.append(f"{certificate.path}  {state}, until {certificate.expires:%Y-%m-%d %H:%M} UTC{hosts}")
    return "\n".join(lines), is_due


def _make_ca(now: datetime.datetime, days: float) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"actorlearner CA of {now:%Y-%m-%d %H:%M:%S}")  # with the time, so that CAs can be told apart
    certificate = (
        _builder(name, name, key.public_key(), now, now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate, key


def _make_role(
    role: str,
    hosts: Sequence[str],
    now: datetime.datetime,
    expires: datetime.datetime,
    ca_certificate: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if role == REPLAY_SERVER:  # a replay server may also be a client of another one
        purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
    certificate = (
        _builder(_name(role), ca_certificate.subject, key.public_key(), now, expires)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return certificate, key


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    expires: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, expires) - _CLOCK_SKEW)
        .not_valid_after(expires)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host or not host.isascii() or set(host) & set(":/@ ,"):
        raise ValueError(f"--hosts: '{host}': expected a host name or address, without a port")
    return x509.DNSName(host)


def _names(certificate: x509.Certificate) -> Sequence[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def _read_hosts(folder: Path) -> Sequence[str]:
    path = folder / REPLAY_SERVER / CERTIFICATE
    return [name for name in _names(_read(path)) if name not in ALWAYS] if path.exists() else []


def _read_ca(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = serialization.load_pem_private_key((folder / CA_KEY).read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{folder / CA_KEY} is not a key made by `actorlearner certs`")
    return _read(folder / CA), key


def _read(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a certificate: {error}") from error


def _to_pem(thing: Union[x509.Certificate, ec.EllipticCurvePrivateKey]) -> bytes:
    if isinstance(thing, x509.Certificate):
        return thing.public_bytes(serialization.Encoding.PEM)
    return thing.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes, *, secret: bool = False) -> None:
    """Writes `content` atomically; a secret is readable only by its owner at every moment."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644), "wb") as file:
        file.write(content)
    durable_files.put_in_place(new, path)
