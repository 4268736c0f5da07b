"""Certificates and keys of a federation: a root of its own, the server's, and one a client."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastfpl import system
from fastfpl.errors import InputError
from fastfpl.files import on_disk

__all__ = ["CA", "SERVER", "SERVER_KEY", "check_keys", "client_key", "write_keys"]

CA, SERVER, SERVER_KEY = "ca.crt", "server.crt", "server.key"
_ROOT_KEY = "ca.key"


def client_key(folder: Path, client: int) -> Path:
    """Return where the private key of a client lies; its public one has ``.pub`` behind."""
    return folder / f"client-{client}"


def write_keys(folder: Path, hosts: Sequence[str], clients: int, days: int = 365) -> None:
    """Make a root certificate, a server's for its hosts, and a pair of keys for every client.

    Keys are on the curve P-384, private ones readable for their owner alone.

    Parameters
    ----------
    folder : Path
        A new or empty one.
    hosts : sequence of str
        Names or addresses by which clients reach the server.
    clients : int
    days : int
        For which the certificates hold.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"fastfpl.flower: the folder of keys must be new or empty; got {folder}; name another"
        )
    if not hosts:
        raise InputError("fastfpl.flower: hosts must name the server; got none")
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()

    def name(text: str) -> Any:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    begin = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(minutes=5)
    end = begin + datetime.timedelta(days=days)

    def certificate(subject: str, key: Any) -> Any:
        return (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("fastfpl federation"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(end)
        )

    def usage(signs: bool) -> Any:
        return x509.KeyUsage(
            digital_signature=not signs,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=signs,
            crl_sign=signs,
            encipher_only=False,
            decipher_only=False,
        )

    root, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    own = x509.SubjectKeyIdentifier.from_public_key(root.public_key())
    top = (
        certificate("fastfpl federation", root)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage(signs=True), critical=True)
        .add_extension(own, critical=False)
        .sign(root, hashes.SHA384())
    )
    leaf = (
        certificate(hosts[0][:64], server)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), critical=False
        )
        .add_extension(x509.SubjectAlternativeName([_host(h) for h in hosts]), critical=False)
        .sign(root, hashes.SHA384())
    )
    form = serialization.PrivateFormat.PKCS8
    with on_disk("fastfpl.flower", "the folder of keys", folder, "or name another"):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        _write(folder / _ROOT_KEY, root.private_bytes(pem, form, plain), 0o600)
        _write(folder / SERVER_KEY, server.private_bytes(pem, form, plain), 0o600)
        _write(folder / CA, top.public_bytes(pem), 0o644)
        _write(folder / SERVER, leaf.public_bytes(pem), 0o644)
        for client in range(clients):
            key = ec.generate_private_key(ec.SECP384R1())
            path = client_key(folder, client)
            ssh = serialization.PrivateFormat.OpenSSH
            _write(path, key.private_bytes(pem, ssh, plain), 0o600)
            public = key.public_key().public_bytes(
                serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
            )
            _write(path.with_name(path.name + ".pub"), public + b"\n", 0o644)


def check_keys(folder: Path, clients: int) -> None:
    """Refuse a folder that lacks what a federation of so many clients needs."""
    wanted = [folder / CA, folder / SERVER, folder / SERVER_KEY]
    for client in range(clients):
        path = client_key(folder, client)
        wanted += [path, path.with_name(path.name + ".pub")]
    missing = [path.name for path in wanted if not path.is_file()]
    if missing:
        raise InputError(
            f"fastfpl.flower: {folder} must hold certificates and keys of {clients} clients; got "
            f"no {', '.join(missing[:6])}; make them by fastfpl flower keys"
        )


def _host(host: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(path: Path, content: bytes, mode: int) -> None:
    number = system.open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(number, "wb") as file:
        file.write(content)
