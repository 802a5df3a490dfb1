"""Why a TLS handshake failed, in words for people.

OpenSSL has three voices.  Its check of the peer's certificate calls back with a number
and the certificate that it stopped at (:func:`refusal`).  What else goes wrong is an
error with the library's own short text: either this side's finding, or an *alert*, which
is all that the peer says about its own (:func:`alert_text`).  An alert is one byte, so
that a side which refuses knows more than the one that is refused: what it knows should
be said on both sides wherever there is still a way to say it.

Everything returned here is half a sentence, without a full stop.
"""

from __future__ import annotations

from datetime import datetime

from cryptography import x509
from OpenSSL import SSL

__all__ = ["alert_text", "moment", "refusal", "subject"]

#: Characters of a name in a certificate that are worth showing.
_NAME = 100

# Of OpenSSL's include/openssl/x509_vfy.h.in, without X509_V_ERR_.
_UNABLE_TO_GET_ISSUER_CERT = 2
_CERT_SIGNATURE_FAILURE = 7
_CERT_NOT_YET_VALID = 9
_CERT_HAS_EXPIRED = 10
_DEPTH_ZERO_SELF_SIGNED_CERT = 18
_SELF_SIGNED_CERT_IN_CHAIN = 19
_UNABLE_TO_GET_ISSUER_CERT_LOCALLY = 20
_UNABLE_TO_VERIFY_LEAF_SIGNATURE = 21
_CERT_CHAIN_TOO_LONG = 22
_INVALID_CA = 24
_PATH_LENGTH_EXCEEDED = 25
_INVALID_PURPOSE = 26
_KEYUSAGE_NO_CERTSIGN = 32
_EE_KEY_TOO_SMALL = 66
_CA_KEY_TOO_SMALL = 67
_CA_MD_TOO_WEAK = 68
_INVALID_CA_3 = 79

_NOT_TRUSTED = (
    _UNABLE_TO_GET_ISSUER_CERT,
    _DEPTH_ZERO_SELF_SIGNED_CERT,
    _SELF_SIGNED_CERT_IN_CHAIN,
    _UNABLE_TO_GET_ISSUER_CERT_LOCALLY,
    _UNABLE_TO_VERIFY_LEAF_SIGNATURE,
)
_NO_CA = (_INVALID_CA, _INVALID_CA_3, _KEYUSAGE_NO_CERTSIGN)
_WEAK = (_EE_KEY_TOO_SMALL, _CA_KEY_TOO_SMALL, _CA_MD_TOO_WEAK)


def refusal(number: int, depth: int, certificate: x509.Certificate) -> str:
    """Say why OpenSSL's check of a chain of certificates failed.

    :param number: OpenSSL's number for it, one of ``X509_V_ERR_*``.
    :param depth: of the certificate at which it stopped: 0 is the peer's own.
    :param certificate: that one.
    """
    whose = "its certificate" if depth == 0 else f"its CA's certificate ({subject(certificate)})"
    if number in _NOT_TRUSTED:
        return (
            f"its certificate is not signed by a CA that is trusted here "
            f"(issuer {_shown(certificate.issuer)})"
        )
    if number == _CERT_HAS_EXPIRED:
        return f"{whose} expired on {moment(certificate.not_valid_after_utc)}"
    if number == _CERT_NOT_YET_VALID:
        return (
            f"{whose} is not valid before {moment(certificate.not_valid_before_utc)}, which is "
            f"still to come by the clock of this host"
        )
    if number == _CERT_SIGNATURE_FAILURE:
        return f"the signature of {whose} is wrong: it was not made with the trusted CA's key"
    if number == _INVALID_PURPOSE:
        return (
            f"{whose} is not for this use: it needs serverAuth and clientAuth in its "
            f"extendedKeyUsage, if it has one, and digitalSignature in its keyUsage"
        )
    if number in _NO_CA:
        return f"{whose} is not one of a CA, and has signed another certificate"
    if number in (_PATH_LENGTH_EXCEEDED, _CERT_CHAIN_TOO_LONG):
        return f"there are more CAs between {whose} and the trusted one than that one allows"
    if number in _WEAK:
        return f"the key or the signature of {whose} is too weak"
    return f"{whose} does not pass OpenSSL's check (X509_V_ERR {number})"


def moment(when: datetime) -> str:
    """Return a point in time, as it is shown to people: to the minute, in UTC."""
    return f"{when:%Y-%m-%d at %H:%M} UTC"


def subject(certificate: x509.Certificate) -> str:
    """Return whom a certificate is for, in one printable line."""
    return _shown(certificate.subject)


def _shown(name: x509.Name) -> str:
    # It may be a stranger's, and it goes to logs and terminals.
    text = "".join(c if c.isprintable() else "?" for c in name.rfc4514_string())
    return (text if len(text) <= _NAME else f"{text[:_NAME]}...") or "without a name"


#: What the peer means by an alert, by the name that OpenSSL has for it (RFC 8446,
#: section 6.2; OpenSSL's prefix "tlsv13 alert", "ssl/tls alert" ... is of no interest).
_ALERTS = {
    "access denied": "the peer refuses this host",
    "bad certificate": (
        "the peer refuses this host's certificate: it is damaged, too weak, or not yet valid by "
        "the peer's clock; compare the clocks of the two hosts"
    ),
    "bad record mac": "a record reached the peer damaged, or was tampered with on the way",
    "certificate expired": (
        "the peer refuses this host's certificate: it has expired by the peer's clock; make a "
        "new one with 'qmigctl pki host', or set that clock right"
    ),
    "certificate required": (
        "the peer demands a certificate, and this side presented none; it needs one that is "
        "signed by a CA that the peer knows"
    ),
    "certificate revoked": "the peer refuses this host's certificate: it was revoked",
    "certificate unknown": "the peer refuses this host's certificate, and does not say why",
    "decode error": "the peer could not read a message of the TLS handshake",
    "decrypt error": (
        "the peer found a signature of this side to be wrong: this host's certificate was not "
        "made with the key of the CA that the peer trusts, or bytes were changed on the way"
    ),
    "handshake failure": (
        "the peer and this side have no cipher, group or kind of signature in common"
    ),
    "illegal parameter": "the peer found a value in the TLS handshake that must not be there",
    "insufficient security": "the peer finds what this side offers too weak",
    "internal error": "the peer had an error of its own; its log should say which",
    "no application protocol": (
        "the peer speaks TLS for another purpose; is there a qmigd at that port?"
    ),
    "protocol version": "the peer does not speak TLS 1.3, and this side speaks nothing older",
    "record overflow": "a record that is too long reached the peer: this is no longer TLS",
    "unexpected message": "the peer got a message that it did not expect",
    "unknown ca": (
        "the peer does not trust this host's certificate: it is not signed by a CA that the peer "
        "knows; 'ca' in the peer's [tls] must have the CA of this host"
    ),
    "unsupported certificate": (
        "the peer refuses this host's certificate: it is not for this use, and needs serverAuth "
        "and clientAuth in its extendedKeyUsage and digitalSignature in its keyUsage"
    ),
    "user canceled": "the peer broke the handshake off",
}

_NO_TLS = "what the peer sends is not TLS"

#: What this side finds, by OpenSSL's text for it.
_FINDINGS = {
    "bad signature": (
        "a signature of the peer is wrong: it does not have the key of its certificate, or bytes "
        "were changed on the way"
    ),
    "certificate verify failed": "the peer's certificate is refused",
    "data length too long": _NO_TLS,
    "decryption failed or bad record mac": (
        "a record arrived damaged, or was tampered with on the way"
    ),
    "encrypted length too long": _NO_TLS,
    "http request": "the peer speaks HTTP and not TLS",
    "https proxy request": "the peer speaks HTTP and not TLS",
    "no shared cipher": "the peer and this side have no cipher in common",
    "no suitable groups": "the peer and this side have no group for the key exchange in common",
    "no suitable key share": "the peer and this side have no group for the key exchange in common",
    "no suitable signature algorithm": (
        "the peer and this side have no kind of signature in common that this host's key can make"
    ),
    "packet length too long": _NO_TLS,
    "peer did not return a certificate": (
        "the peer presented no certificate; it needs one that is signed by a CA that is trusted "
        "here"
    ),
    "unexpected message": _NO_TLS,
    "unsupported protocol": "the peer does not speak TLS 1.3, and this side speaks nothing older",
    "wrong ssl version": "the peer does not speak TLS 1.3, and this side speaks nothing older",
    "wrong version number": _NO_TLS,
}


def alert_text(error: SSL.Error) -> tuple[str, bool]:
    """Say what the failure of a handshake means.

    Under TLS 1.3 the client is through with its handshake before the server has looked at
    its certificate: the server's alert then comes with the first read.

    :param error: of ``do_handshake`` or ``recv``; not WantReadError or WantWriteError, which
        are no failures.
    :return: half a sentence, and whether it was the peer that said so.
    """
    if isinstance(error, SSL.ZeroReturnError):
        return "the peer ended the TLS session", True
    if isinstance(error, SSL.SysCallError):
        return "the connection ended in the midst of the TLS handshake", False
    for reason in (reasons := _reasons(error)):
        _, said, alert = reason.partition("alert ")
        if said:
            return _ALERTS.get(alert, f"the peer ended the TLS handshake: {alert}"), True
        if reason in _FINDINGS:
            return _FINDINGS[reason], False
    return f"the TLS handshake failed: {'; '.join(reasons) or 'OpenSSL does not say why'}", False


def _reasons(error: SSL.Error) -> list[str]:
    """Return OpenSSL's queue of errors as texts: tuples of library, function and reason."""
    queue = error.args[0] if error.args and isinstance(error.args[0], list) else []
    return [str(entry[-1]) for entry in queue if isinstance(entry, tuple) and entry]
