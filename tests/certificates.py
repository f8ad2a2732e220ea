"""An authority that vouches for whom a test likes, as PEM files in a folder."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PEM = serialization.Encoding.PEM
DAY = datetime.timedelta(days=1)


class Authority:
    """`path` is the file of its own certificate."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(name)
        now = datetime.datetime.now(datetime.UTC)
        itself = self._builder(self._name, self._key.public_key(), now - DAY, now + DAY, authority=True)
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(itself.sign(self._key, hashes.SHA256()).public_bytes(PEM))

    def issue(self, name: str, *, file: str | None = None, expired: bool = False, password: bytes = b"") -> Path:
        """The file of a certificate for `name` (a host or an address) with its private key behind it."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        until = now - DAY / 2 if expired else now + DAY
        certificate = self._builder(_named(name), key.public_key(), now - DAY, until, host=name)
        locked = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        path = self._folder / f"{file or name}.pem"
        signed = certificate.sign(self._key, hashes.SHA256()).public_bytes(PEM)
        path.write_bytes(signed + key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, locked))
        return path

    def server(self, name: str, *, expired: bool = False) -> ssl.SSLContext:
        """What a server that is called `name` answers with."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.issue(name, file=f"server-{name}", expired=expired))
        return context

    def _builder(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        since: datetime.datetime,
        until: datetime.datetime,
        *,
        authority: bool = False,
        host: str | None = None,
    ) -> x509.CertificateBuilder:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(since)
            .not_valid_after(until)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        return (
            builder if host is None else builder.add_extension(x509.SubjectAlternativeName([_alternative(host)]), False)
        )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
