"""TLS between roles: the certificates they show and require, and why a connection was refused, in words.

Both ends show a certificate and verify the other's, with TLS 1.3 and nothing older. A role's files are in
<--tls_dir>/<role>: ca.crt, tls.crt and tls.key, the names in Kubernetes' TLS secrets. They are read for every
connection, so new ones take effect without a restart.

This file imports only the standard library, so that the relay, a process of its own, starts fast.
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Optional

CA, CERTIFICATE, KEY = "ca.crt", "tls.crt", "tls.key"

HANDSHAKE_SECS = 10.0
"""Deadline for a connection and its handshake, in seconds."""

_WHAT_IS_WRONG = {  # X509_V_ERR_..., as OpenSSL numbers them
    9: "is not valid yet; compare the clocks",
    10: "has expired",
    **dict.fromkeys((18, 19, 20, 21), "is of another CA than {ca}"),
    26: "is made for another role",
    **dict.fromkeys((62, 63, 64), "does not name it: give `actorlearner certs` the host's name"),
}

_WHY_REFUSED = {  # parts of OpenSSL's names for the alerts that a peer sends
    "CERTIFICATE_EXPIRED": "it has expired",
    "UNKNOWN_CA": "it is of another CA",
    "CERTIFICATE_REQUIRED": "it asks for one",
    "UNSUPPORTED_CERTIFICATE": "it is made for another role",
    "BAD_CERTIFICATE": "it names another host, or is damaged",
    "CERTIFICATE_UNKNOWN": "without a reason",
    "DECRYPT_ERROR": "its signature is wrong",
}


def make_context(folder: Path, *, is_server: bool) -> ssl.SSLContext:
    """Returns the TLS context of a role: the certificate it shows and the CA it requires.

    Raises:
      ValueError: The files in `folder` are missing, unreadable, or do not match; the message says which.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED  # a client's context also checks the host's name
    if is_server:
        context.num_tickets = 0  # type: ignore[attr-defined]  # a resumed session shows no certificate
    try:
        for name in (CA, CERTIFICATE, KEY):
            (folder / name).read_bytes()  # OpenSSL's errors do not say which file
        context.load_verify_locations(folder / CA)
        context.load_cert_chain(folder / CERTIFICATE, folder / KEY)
    except ssl.SSLError as error:
        raise ValueError(
            f"{folder}: {CA}, {CERTIFICATE} and {KEY} do not match, or are damaged ({error.reason or error})"
        ) from error
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from error
    return context


def describe_refusal(error: Exception, peer: str, folder: Path) -> Optional[str]:
    """Returns which end refused which certificate and why; None if `error` is a broken connection, not a refusal.

    Args:
      error: What a handshake, or the first read after it, raised. (With TLS 1.3 a client's handshake ends before the
        server has checked its certificate.)
      peer: The other end, for the message.
      folder: Holds this end's files.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        what = _WHAT_IS_WRONG.get(error.verify_code, f"is not accepted: {error.verify_message}")
        return f"{peer} shows a certificate that {what.format(ca=folder / CA)}"
    reason = (error.reason or str(error)) if isinstance(error, ssl.SSLError) else ""
    if not reason or isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)) or "UNEXPECTED_EOF" in reason:
        return None
    if "PEER_DID_NOT_RETURN_A_CERTIFICATE" in reason:
        return f"{peer} shows no certificate"
    for name, why in _WHY_REFUSED.items():
        if name in reason:
            return f"{peer} refuses the certificate {folder / CERTIFICATE}: {why}"
    if "ALERT" in reason:
        return f"{peer} refuses the connection: {reason.lower().replace('_', ' ')}"
    return f"{peer} does not speak TLS 1.3 ({reason.lower().replace('_', ' ')})"


def speaks_tls(host: str, port: int, timeout_secs: float = 3.0) -> bool:
    """Returns whether any server answers there in TLS; blocks at most about `timeout_secs` seconds."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((host, port), timeout=timeout_secs) as connection:
            context.wrap_socket(connection).close()
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")
    except OSError:
        return False
    return True
