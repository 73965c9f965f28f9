"""What a certificate states: its form, and who signed it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite
from typing import Any

FORMAT = "cir-certificate-2"
SETTINGS = {"text_tokens": 10_000_000, "generate": 1000, "seed": 2**63}
"""The highest of each: a stranger's certificate must not have us work for ever."""
HASHES = ("data_sha256", "weights_sha256", "files_sha256")
KEYS = {"format", "method", "sources", "settings", *HASHES, "set_aside", "before", "after", "versions"}


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
    aside = content["set_aside"]
    if not isinstance(aside, list) or not all(isinstance(name, str) for name in aside) or len({*aside}) != len(aside):
        raise ValueError(f"certificate, set_aside: expected ids of facts, got {aside!r:.80}")
    for when in ("before", "after"):
        _keys(when, _mapping(when, content[when]), {"measures", "attacks", "recall"})
        for kind in ("measures", "attacks"):
            for name, outcome in _mapping(kind, content[when][kind]).items():
                _outcome(f"{when}, {name!r:.80}", outcome)
        for name, value in _mapping("recall", content[when]["recall"]).items():
            _figure(f"{when}, recall of {name!r:.80}", value, 0.0, 1.0 + 1e-6)


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
    if type(outcome["count"]) is not int or outcome["count"] < 1:
        raise ValueError(f"certificate, {where}: expected a count, got {outcome['count']!r:.80}")


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
    serialization, ed25519 = _cryptography()
    try:
        private = serialization.load_pem_private_key(key, None)
    except (ValueError, TypeError) as error:
        raise ValueError(f"expected a private Ed25519 key, PEM without a password, got {error!s:.200}") from error
    if not isinstance(private, ed25519.Ed25519PrivateKey):
        raise ValueError(f"expected a private Ed25519 key, got {type(private).__name__}")
    return bytes(private.sign(said))


def check_signature(said: bytes, signed: bytes, key: bytes) -> None:
    """Check that who has the private key of the public ``key``, PEM, signed just this; raises ValueError if not."""
    from cryptography.exceptions import InvalidSignature

    serialization, ed25519 = _cryptography()
    try:
        public = serialization.load_pem_public_key(key)
    except (ValueError, TypeError) as error:
        raise ValueError(f"expected a public Ed25519 key, PEM, got {error!s:.200}") from error
    if not isinstance(public, ed25519.Ed25519PublicKey):
        raise ValueError(f"expected a public Ed25519 key, got {type(public).__name__}")
    try:
        public.verify(signed, said)
    except InvalidSignature:
        raise ValueError(
            "certificate.sig: expected the signature of this certificate by that key, got another"
        ) from None


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise ValueError(
            "expected the package cryptography, which signatures need: pip install 'cir[sign]'"
        ) from None
    return serialization, ed25519
