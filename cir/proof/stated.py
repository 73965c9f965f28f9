"""What a certificate states: its form, and who signed it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import fields
from math import isfinite
from typing import Any

from cir.proof.verdict import Thresholds, judge

FORMAT = "cir-certificate-3"
SETTINGS = {"text_tokens": 10_000_000, "generate": 1000, "seed": 2**63}
"""The highest of each: a stranger's certificate must not have us work for ever."""
HASHES = ("data_sha256", "weights_sha256", "files_sha256")
KEYS = {
    "format",
    "date",
    "signer",
    "method",
    "sources",
    "settings",
    *HASHES,
    "set_aside",
    "attacker",
    "before",
    "after",
}
KEYS |= {"thresholds", "verdict", "versions"}
UNITS = ("neighbour_recall", "same_subject_recall", "loss")
"""What should stay, of which a certificate has the value of each unit: a fact, or a window of text."""


def check_content(content: Any) -> None:
    """Check that ``content`` has just the keys that a certificate has, and figures that can be.

    Raises:
        ValueError: if not; the message names the place.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise ValueError(f"certificate: expected format {FORMAT}, got {found!r:.80}; make it anew")
    _keys("certificate", content, KEYS)
    for name in HASHES:
        for of, digest in _mapping(name, content[name]).items():
            if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
                raise ValueError(f"certificate, {name}, {of!r:.80}: expected a SHA-256, got {digest!r:.80}")
    _keys("weights_sha256", content["weights_sha256"], {"before", "after"})
    _settings(content["settings"])
    for name in ("method", "sources", "versions"):
        _mapping(name, content[name])
    if not all(isinstance(value, str | int) for value in content["sources"].values()):
        raise ValueError(f"certificate, sources: expected names and numbers, got {content['sources']!r:.80}")
    if not isinstance(content["date"], str) or not re.fullmatch(r"\d{4}(-\d\d){2}T\d\d(:\d\d){2}Z", content["date"]):
        raise ValueError(f"certificate, date: expected one like 2026-01-31T12:00:00Z, got {content['date']!r:.80}")
    signer = content["signer"]
    if signer is not None and not (isinstance(signer, str) and re.fullmatch("[0-9a-f]{64}", signer)):
        raise ValueError(f"certificate, signer: expected none or a SHA-256 of a key, got {signer!r:.80}")
    _ids("set_aside", content["set_aside"])
    _keys("attacker", _mapping("attacker", content["attacker"]), {"taught", "asked"})
    _ids("attacker, asked", content["attacker"]["asked"])
    _count("attacker, taught", content["attacker"]["taught"], 0)
    for when in ("before", "after"):
        _keys(when, _mapping(when, content[when]), {"measures", "attacks", "recall", "kept"})
        for kind in ("measures", "attacks"):
            for name, outcome in _mapping(kind, content[when][kind]).items():
                _outcome(f"{when}, {name!r:.80}", outcome)
        for name, value in _mapping("recall", content[when]["recall"]).items():
            _figure(f"{when}, recall of {name!r:.80}", value, 0.0, 1.0 + 1e-6)
        for kind, values in _mapping("kept", content[when]["kept"]).items():
            if kind not in UNITS:
                raise ValueError(f"certificate, kept: expected some of {', '.join(UNITS)}, got {kind!r:.80}")
            for name, value in _mapping(kind, values).items():
                _figure(f"{when}, {kind} of {name!r:.80}", value, 0.0, 1e30 if kind == "loss" else 1.0 + 1e-6)
    _verdict(content)


def _verdict(content: Mapping[str, Any]) -> None:
    """The thresholds must be some, and the verdict be that of the figures."""
    given = _mapping("thresholds", content["thresholds"])
    _keys("thresholds", given, {field.name for field in fields(Thresholds)})
    try:
        Thresholds(**given)
    except ValueError as error:
        raise ValueError(f"certificate, thresholds, {error}") from error
    own = judge(content)
    if content["verdict"] != own.stated():
        raise ValueError(
            f"certificate, verdict: expected that of its figures, {own.heading!r}, got {content['verdict']!r:.80}"
        )


def _ids(where: str, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value) or len({*value}) != len(value):
        raise ValueError(f"certificate, {where}: expected ids of facts, got {value!r:.80}")


def _count(where: str, value: Any, least: int) -> None:
    if type(value) is not int or not least <= value <= 2**53:
        raise ValueError(f"certificate, {where}: expected a count, got {value!r:.80}")


def _settings(settings: Any) -> None:
    _keys("settings", _mapping("settings", settings), {*SETTINGS, "relearning"})
    if not isinstance(settings["relearning"], bool):
        raise ValueError(f"certificate, relearning: expected true or false, got {settings['relearning']!r:.80}")
    for name, most in SETTINGS.items():
        value = settings[name]
        if type(value) is not int or not 0 <= value <= most:
            raise ValueError(f"certificate, {name}: expected a number from 0 to {most}, got {value!r:.80}")


def _outcome(where: str, outcome: Any) -> None:
    _keys(where, _mapping(where, outcome), {"value", "stderr", "count"})
    _figure(where, outcome["value"])
    _figure(f"{where}, stderr", outcome["stderr"], 0.0)
    _count(where, outcome["count"], 1)


def _figure(where: str, value: Any, least: float = -1e30, most: float = 1e30) -> None:
    if type(value) not in (int, float) or not isfinite(value) or not least <= value <= most:
        raise ValueError(f"certificate, {where}: expected a figure that can be, got {value!r:.80}")


def _mapping(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"certificate, {where}: expected an object, got {value!r:.80}")
    return value


def _keys(where: str, value: Mapping[str, Any], keys: set[str]) -> None:
    if value.keys() != keys:
        wrong = sorted(value.keys() ^ keys)
        raise ValueError(f"certificate, {where}: expected the keys {', '.join(sorted(keys))}; wrong: {wrong!r:.80}")


def signature(said: bytes, key: bytes) -> bytes:
    """Of ``said`` by Ed25519 (RFC 8032) with a private key, PEM: 64 bytes, and ``pip install 'cir[sign]'``.

    Raises:
        ValueError: on a key of another kind.
    """
    return bytes(_private(key).sign(said))


def check_signature(said: bytes, signed: bytes, key: bytes) -> None:
    """Check that who has the private key of the public ``key``, PEM, signed just this; raises ValueError if not."""
    from cryptography.exceptions import InvalidSignature

    try:
        _public(key).verify(signed, said)
    except InvalidSignature:
        raise ValueError(
            "certificate.sig: expected the signature of this certificate by that key, got another"
        ) from None


def fingerprint(key: bytes) -> str:
    """SHA-256 of the DER form of a public key, PEM, as `openssl pkey -pubin -outform DER | sha256sum` has it.

    Raises:
        ValueError: on a key of another kind.
    """
    return _digest(_public(key))


def signer(key: bytes) -> str:
    """The :func:`fingerprint` of the public key of a private one, PEM; raises ValueError on a key of another kind."""
    return _digest(_private(key).public_key())


def _digest(public: Any) -> str:
    form, _ = _cryptography()
    der = public.public_bytes(form.Encoding.DER, form.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def _private(key: bytes) -> Any:
    serialization, ed25519 = _cryptography()
    try:
        private = serialization.load_pem_private_key(key, None)
    except (ValueError, TypeError) as error:
        raise ValueError(f"expected a private Ed25519 key, PEM without a password, got {error!s:.200}") from error
    if not isinstance(private, ed25519.Ed25519PrivateKey):
        raise ValueError(f"expected a private Ed25519 key, got {type(private).__name__}")
    return private


def _public(key: bytes) -> Any:
    serialization, ed25519 = _cryptography()
    try:
        public = serialization.load_pem_public_key(key)
    except (ValueError, TypeError) as error:
        raise ValueError(f"expected a public Ed25519 key, PEM, got {error!s:.200}") from error
    if not isinstance(public, ed25519.Ed25519PublicKey):
        raise ValueError(f"expected a public Ed25519 key, got {type(public).__name__}")
    return public


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise ValueError(
            "expected the package cryptography, which signatures need: pip install 'cir[sign]'"
        ) from None
    return serialization, ed25519
