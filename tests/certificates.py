"""Certificates for tests: an authority in a folder, and what it issues."""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Issued(NamedTuple):
    """Paths of PEM files."""

    cert: str
    key: str


class Authority:
    """Issues certificates that are good for a day, for servers on loopback and for clients."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(folder.name)
        self.ca = str(folder / "ca.pem")
        builder = _certificate(self._name, self._name, self._key)
        _write(self.ca, builder.add_extension(x509.BasicConstraints(True, None), True).sign(self._key, hashes.SHA256()))

    def issue(self, name: str, *, address: str = "127.0.0.1") -> Issued:
        """Write a certificate for `address` (a host name or an IP) and its key, over those of this name if need be."""
        key = ec.generate_private_key(ec.SECP256R1())
        known_as = x509.IPAddress(ip_address(address)) if address[0].isdigit() else x509.DNSName(address)
        builder = _certificate(_name(name), self._name, key)
        signed = builder.add_extension(x509.SubjectAlternativeName([known_as]), False).sign(self._key, hashes.SHA256())
        issued = Issued(str(self._folder / f"{name}.pem"), str(self._folder / f"{name}-key.pem"))
        _write(issued.cert, signed)
        Path(issued.key).write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return issued


def _certificate(name: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _write(path: str, certificate: x509.Certificate) -> None:
    Path(path).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
