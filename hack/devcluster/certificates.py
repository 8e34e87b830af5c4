"""The cluster's certificates: one authority, the API server's, and a client certificate for each component."""

import base64
import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_LIFETIME = datetime.timedelta(days=3650)


class Authority:
    """A certificate authority in a folder, made on first use; so is everything that it signs."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.certificate = folder / "ca.crt"
        if not self.certificate.exists():
            key = _write_key(folder / "ca.key")
            builder = _builder(_name("perch-devcluster"), _name("perch-devcluster"), key)
            builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            _write(self.certificate, builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def server(self, name: str, hosts: Sequence[str]) -> tuple[Path, Path]:
        """Certificate and key of a server that is reached under these host names and addresses."""
        return self._issue(name, _name(name), ExtendedKeyUsageOID.SERVER_AUTH, hosts)

    def client(self, name: str, user: str, group: str = "") -> tuple[Path, Path]:
        """Certificate and key of a client: the common name is its user, the organization its group."""
        return self._issue(name, _name(user, group), ExtendedKeyUsageOID.CLIENT_AUTH, [])

    def signing_key(self, name: str) -> Path:
        """A key to sign service account tokens with."""
        path = self._folder / f"{name}.key"
        if not path.exists():
            _write_key(path)
        return path

    def kubeconfig(self, path: Path, server: str, client: tuple[Path, Path]) -> Path:
        """A kubeconfig that carries everything inside, so that the file can be copied elsewhere."""
        certificate, key = client
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "perch",
                    "cluster": {"server": server, "certificate-authority-data": _inline(self.certificate)},
                }
            ],
            "users": [
                {
                    "name": "perch",
                    "user": {"client-certificate-data": _inline(certificate), "client-key-data": _inline(key)},
                }
            ],
            "contexts": [{"name": "perch", "context": {"cluster": "perch", "user": "perch"}}],
            "current-context": "perch",
        }
        _write(path, yaml.safe_dump(document).encode())
        return path

    def _issue(self, name: str, subject: x509.Name, usage: x509.ObjectIdentifier, hosts: Sequence[str]) -> tuple[Path, Path]:
        certificate, key_path = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        if not certificate.exists():
            authority = x509.load_pem_x509_certificate(self.certificate.read_bytes())
            signer = serialization.load_pem_private_key((self._folder / "ca.key").read_bytes(), None)
            assert isinstance(signer, ec.EllipticCurvePrivateKey)
            builder = _builder(subject, authority.subject, _write_key(key_path))
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            if hosts:
                names = [_host(host) for host in hosts]
                builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
            _write(certificate, builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        return certificate, key_path


def _name(common_name: str, organization: str = "") -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    if organization:
        attributes.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
    return x509.Name(attributes)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + _LIFETIME)
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    form = serialization.PrivateFormat.TraditionalOpenSSL  # kube-apiserver finds no public key in PKCS 8
    _write(path, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return key


def _inline(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _write(path: Path, content: bytes) -> None:
    """Complete or not there: an interrupted run leaves no half certificate that the next one would trust."""
    draft = path.with_suffix(path.suffix + ".new")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
    draft.replace(path)
