"""Commitments: proof that a key and a watermark existed before the dispute, which shows neither of them.

The owner writes a commitment when a model is marked and publishes it, or has it timestamped, before the model
is released. Whoever is later given a key and a watermark can check that they are the committed ones. That
matters because much can be chosen afterwards by somebody who already holds the suspect: learned codecs,
trigger images, statistics to align with. What was fixed before the suspect existed was not chosen to fit it.

A model can be committed to by its sketch (`activemark_fast.descent`), with or without a mark: whoever later
says that a suspect descends from it can show that it was there first. A forger can fine-tune the *suspect*
and call the result the original.

One commitment can hold several claims, for marks that were made with different sub-keys (`Key.subkey`): the
expert in one dispute is given one sub-key and its watermark, and learns nothing about the others.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activemark_fast.files import write_whole
from activemark_fast.key import Key
from activemark_fast.watermark import Watermark

if TYPE_CHECKING:
    from cryptography import x509

COMMITMENT_VERSION = 1
MAX_BYTES = 1_000_000
_FORMAT = "activemark commitment"
_CONTEXT = b"activemark_fast/v1/commitment/"
_HASHES = {  # by their ASN.1 object identifiers
    "2.16.840.1.101.3.4.2.1": "sha256",
    "2.16.840.1.101.3.4.2.2": "sha384",
    "2.16.840.1.101.3.4.2.3": "sha512",
}
_FIELDS = frozenset({"claims", "created", "format", "public_key", "signature", "version"})


class CommitmentError(ValueError):
    """A commitment, a timestamp or a certificate file that cannot be used; the message says why."""


@dataclass(frozen=True)
class Timestamp:
    """When a timestamping authority (RFC 3161) saw a commitment.

    Attributes:
        time: the authority's time, UTC.
        trusted: its signature and certificates were checked against root certificates that the caller trusts.
            Without them, nothing but the word of whoever made the file stands for `time`.
    """

    time: datetime
    trusted: bool


@dataclass(frozen=True)
class Commitment:
    """What is published. It shows neither keys nor watermarks nor anything of the models.

    Attributes:
        claims: a hash for each mark (`_claim`), each model (`_model_claim`) and each list of recipients
            (`_recipients_claim`), 32 bytes.
        created: when the owner says it was made: ISO 8601, UTC, to the second. Anybody can write any date.
        public_key: the owner's Ed25519 key, 32 bytes; its secret half is derived from the owner's key.
        signature: by that key over all of the above, 64 bytes.
        timestamp: from a timestamping authority, if its response was given. It is not part of the file.
    """

    claims: tuple[bytes, ...]
    created: str
    public_key: bytes
    signature: bytes
    timestamp: Timestamp | None = field(default=None, compare=False)

    @classmethod
    def make(
        cls,
        owner: Key,
        marks: Iterable[tuple[Key, Watermark]],
        models: Iterable[tuple[Key, bytes]] = (),
        recipients: Iterable[bytes] = (),
    ) -> Commitment:
        """A commitment signed by `owner`.

        Args:
            owner: the owner's key.
            marks: each the key it was made with, and its watermark.
            models: each the key it will be opened with, and the digest of its sketch, 32 bytes.
            recipients: the hash of each list (`tracing.recipients_root`), 32 bytes.

        Raises:
            WatermarkError: a watermark was made with another key.
            ValueError: there is neither a mark nor a model nor a list, or a digest is of another length.
        """
        claims = []
        for key, watermark in marks:
            watermark.check(key)
            claims.append(_claim(key, watermark))
        claims += [_model_claim(key, digest) for key, digest in models]
        claims += [_recipients_claim(root) for root in recipients]
        if not claims:
            raise ValueError("marks, models, recipients: wanted at least one of any, got none")
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        signer = Ed25519PrivateKey.from_private_bytes(owner.derive("commitment/signature"))
        created = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        unsigned = cls(tuple(claims), created, signer.public_key().public_bytes_raw(), b"")
        return replace(unsigned, signature=signer.sign(unsigned._body()))

    def holds(self, key: Key, watermark: Watermark) -> bool:
        """Whether this is a commitment to `key` and `watermark`."""
        claim = _claim(key, watermark)
        return any(hmac.compare_digest(claim, committed) for committed in self.claims)

    def holds_model(self, key: Key, digest: bytes) -> bool:
        """Whether this is a commitment to the model whose sketch has this digest, to be opened with `key`."""
        claim = _model_claim(key, digest)
        return any(hmac.compare_digest(claim, committed) for committed in self.claims)

    def holds_recipients(self, root: bytes) -> bool:
        """Whether this is a commitment to the list of recipients with this hash."""
        claim = _recipients_claim(root)
        return any(hmac.compare_digest(claim, committed) for committed in self.claims)

    def to_bytes(self) -> bytes:
        """The file: JSON, in one form only, so that no byte can change unnoticed."""
        record = self._record() | {"signature": self.signature.hex()}
        return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file, readable by all, whole or not at all."""
        write_whole(path, self.to_bytes(), mode=0o644)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        timestamp: str | os.PathLike[str] | None = None,
        certificates: str | os.PathLike[str] | None = None,
    ) -> Commitment:
        """Reads a file that `save` wrote and checks its signature.

        Args:
            path: the commitment.
            timestamp: an authority's response (RFC 3161, DER) for this file.
            certificates: PEM file of the authority's root certificate, and intermediate ones it left out.

        Raises:
            OSError: a file cannot be read.
            CommitmentError: the commitment is damaged, of a newer format, or its signature is wrong; the
                response is damaged, refused, for another file, or not signed under `certificates`.
            ValueError: certificates without a timestamp.
        """
        if certificates is not None and timestamp is None:
            raise ValueError("certificates: wanted a timestamp for them to be used on, got none")
        data = _read(path)
        try:
            commitment = cls._from_bytes(data)
            if timestamp is None:
                return commitment
            roots = [] if certificates is None else _read_certificates(certificates)
            return replace(commitment, timestamp=_read_timestamp(_read(timestamp), data, roots))
        except CommitmentError as error:
            raise CommitmentError(f"{path}: {error}") from error

    @classmethod
    def _from_bytes(cls, data: bytes) -> Commitment:
        try:
            record = json.loads(data)
            version = record["version"]
            if record["format"] == _FORMAT and isinstance(version, int) and version > COMMITMENT_VERSION:
                raise CommitmentError(
                    f"commitment of format {version}, this release reads format {COMMITMENT_VERSION}: update "
                    "activemark_fast"
                )
            commitment = cls(
                tuple(bytes.fromhex(claim) for claim in record["claims"]),
                record["created"],
                bytes.fromhex(record["public_key"]),
                bytes.fromhex(record["signature"]),
            )
            well_formed = (
                record.keys() == _FIELDS
                and all(len(claim) == 32 for claim in commitment.claims)
                and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", commitment.created)
                and commitment.to_bytes() == data
            )
        except CommitmentError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CommitmentError("no commitment, or damaged") from error
        if not well_formed or not commitment.claims:
            raise CommitmentError("no commitment, or damaged")
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            verifier = Ed25519PublicKey.from_public_bytes(commitment.public_key)
            verifier.verify(commitment.signature, commitment._body())
        except (InvalidSignature, ValueError) as error:
            raise CommitmentError(
                "the commitment's signature is not its owner's: damaged or forged"
            ) from error
        return commitment

    def _record(self) -> dict[str, object]:
        return {
            "format": _FORMAT,
            "version": COMMITMENT_VERSION,
            "claims": [claim.hex() for claim in self.claims],
            "created": self.created,
            "public_key": self.public_key.hex(),
        }

    def _body(self) -> bytes:
        return _CONTEXT + b"signed/" + json.dumps(self._record(), sort_keys=True).encode()


@dataclass(frozen=True)
class Opening:
    """Whether a key and a watermark, or a model, are those of a commitment, and since when.

    Attributes:
        committed: the commitment holds the claim.
        created: when the owner says the commitment was made.
        timestamp: when an authority saw it.
        public_key: whose signature it bears, hexadecimal.
    """

    committed: bool
    created: str
    timestamp: Timestamp | None
    public_key: str

    @classmethod
    def of(cls, commitment: Commitment, key: Key, watermark: Watermark) -> Opening:
        """Opens `commitment` with a key and the watermark it made."""
        return cls._of(commitment, commitment.holds(key, watermark))

    @classmethod
    def of_model(cls, commitment: Commitment, key: Key, digest: bytes) -> Opening:
        """Opens `commitment` with a key and the digest of a model's sketch."""
        return cls._of(commitment, commitment.holds_model(key, digest))

    @classmethod
    def of_recipients(cls, commitment: Commitment, root: bytes) -> Opening:
        """Opens `commitment` with the hash of a list of recipients (`tracing.RecipientProof.root`)."""
        return cls._of(commitment, commitment.holds_recipients(root))

    @classmethod
    def _of(cls, commitment: Commitment, held: bool) -> Opening:
        return cls(held, commitment.created, commitment.timestamp, commitment.public_key.hex())

    @property
    def proven_since(self) -> datetime | None:
        """The time from which on the claim is known to have been fixed, whoever is lying; None if unknown."""
        trusted = self.committed and self.timestamp is not None and self.timestamp.trusted
        return self.timestamp.time if trusted and self.timestamp is not None else None

    def __str__(self) -> str:
        if not self.committed:
            return "not committed: the commitment is to another key, watermark, model or list of recipients"
        signed = f"signed by {self.public_key}"
        if self.timestamp is None:
            return f"committed, {signed}; by the owner's own word on {self.created}: no timestamp"
        time = self.timestamp.time.isoformat()
        if not self.timestamp.trusted:
            return f"committed, {signed}; timestamped {time}, unchecked: no root certificate was given"
        return f"committed before {time} (timestamp checked), {signed}"

    def to_dict(self) -> dict[str, object]:
        """The opening as JSON types."""
        return {
            "committed": self.committed,
            "created": self.created,
            "timestamp": None if self.timestamp is None else self.timestamp.time.isoformat(),
            "timestamp_trusted": None if self.timestamp is None else self.timestamp.trusted,
            "public_key": self.public_key,
        }

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> Opening:
        """What `to_dict` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        time = written["timestamp"]
        seen = None if time is None else Timestamp(datetime.fromisoformat(time), written["timestamp_trusted"])
        return cls(written["committed"], written["created"], seen, written["public_key"])


def timestamp_request(commitment: bytes) -> bytes:
    """An RFC 3161 request (DER) for the file's bytes, to send to a timestamping authority.

    It bears SHA-512 of the file and asks for the authority's certificates; no nonce, for a file that is all
    the authority's response can be about needs none.
    """
    from rfc3161_client import TimestampRequestBuilder

    request = (
        TimestampRequestBuilder().data(commitment).nonce(nonce=False).cert_request(cert_request=True).build()
    )
    return bytes(request.as_bytes())


def _claim(key: Key, watermark: Watermark) -> bytes:
    """SHA-256 over a commitment to the key and the digest of its watermark.

    The watermark's digest covers the settings and the model's fingerprint. The key's commitment is SHA-256
    over a nonce and a value that determines the key, both derived from it. It is *binding*: another key with
    the same commitment would be a collision of SHA-256, in the hash or in the HKDF. It is *hiding*: without
    the key the nonce is 256 unknown bits. (A passphrase can be guessed at here as it can wherever it is
    used.)
    """
    digest = watermark.digest()
    nonce = key.derive(f"commitment/nonce/{digest.hex()}")
    committed = hashlib.sha256(_CONTEXT + b"key/" + nonce + key.derive("commitment/key")).digest()
    return hashlib.sha256(_CONTEXT + b"claim/" + committed + digest).digest()


def _model_claim(key: Key, digest: bytes) -> bytes:
    """SHA-256 over a secret nonce and the digest of a model's sketch; hiding and binding as `_claim` is."""
    if len(digest) != 32:
        raise ValueError(f"digest: wanted 32 bytes, got {len(digest)}")
    nonce = key.derive(f"commitment/model/{digest.hex()}")
    return hashlib.sha256(_CONTEXT + b"model/" + nonce + digest).digest()


def _recipients_claim(root: bytes) -> bytes:
    """SHA-256 over the hash of a list of recipients, whose leaves are salted."""
    if len(root) != 32:
        raise ValueError(f"recipients: wanted 32 bytes, got {len(root)}")
    return hashlib.sha256(_CONTEXT + b"recipients/" + root).digest()


def _read(path: str | os.PathLike[str]) -> bytes:
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise CommitmentError(f"{path}: wanted at most {MAX_BYTES} bytes, got more")
    return data


def _read_certificates(path: str | os.PathLike[str]) -> list[x509.Certificate]:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError as error:
        raise CommitmentError(f"{Path(path)}: wanted certificates as PEM") from error


def _read_timestamp(response: bytes, data: bytes, certificates: Sequence[x509.Certificate]) -> Timestamp:
    """What an authority's response says of `data`. Raises CommitmentError where it says nothing of it."""
    from rfc3161_client import PKIStatus, VerificationError, VerifierBuilder, decode_timestamp_response

    try:
        decoded = decode_timestamp_response(response)
        if PKIStatus(decoded.status) != PKIStatus.GRANTED:
            raise CommitmentError("timestamp: the authority refused the request")
        stated = decoded.tst_info
        algorithm, seen = stated.message_imprint.hash_algorithm.dotted_string, stated.message_imprint.message
        time = stated.gen_time.astimezone(timezone.utc)
    except CommitmentError:
        raise
    except ValueError as error:
        raise CommitmentError("timestamp: no RFC 3161 response, or damaged") from error
    if algorithm not in _HASHES or hashlib.new(_HASHES[algorithm], data).digest() != seen:
        raise CommitmentError("timestamp: it is for another file")
    if certificates:
        try:
            VerifierBuilder(roots=list(certificates)).build().verify_message(decoded, data)
        except (VerificationError, ValueError) as error:
            raise CommitmentError("timestamp: not signed under the root certificates given") from error
    return Timestamp(time, trusted=bool(certificates))
