"""What a labelling server is told: the addresses it answers to, and its limits."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from tastemaker.errors import ConfigError

MEBIBYTE = 1 << 20
# A proxy on the same machine.
LOOPBACK = ("127.0.0.1", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A token bucket: so many acts at once, and so many a second from then on."""

    burst: int
    per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LabellingSettings:
    """`origins` are the addresses people type, as browsers write them; links are made with the first.

    `proxies` are the addresses or networks of those whose word on a caller's address counts: what ends TLS in front.
    """

    origins: tuple[str, ...]
    proxies: tuple[str, ...] = LOOPBACK
    body_limit: int = MEBIBYTE
    import_limit: int = 64 * MEBIBYTE  # a lead's upload to a path that ends in /import
    body_seconds: float = 60.0  # a body that takes longer than this to arrive is given up
    # Ten guesses at once and then two a minute: a password of twelve characters outlives that.
    sign_in_by_account: Limit = Limit(burst=10, per_second=1 / 30)
    # A whole team may sit behind one address.
    sign_in_by_address: Limit = Limit(burst=60, per_second=0.5)
    claim: Limit = Limit(burst=60, per_second=2.0)
    submit: Limit = Limit(burst=60, per_second=2.0)
    api: Limit = Limit(burst=300, per_second=50.0)

    def __post_init__(self) -> None:
        if not self.origins:
            raise ConfigError("A labelling server needs at least one origin, such as https://labels.example.org.")
        for origin in self.origins:
            _check_origin(origin)
        if len({urlsplit(origin).scheme for origin in self.origins}) > 1:
            raise ConfigError(
                f"The origins {', '.join(self.origins)} mix http and https; a server has one kind of cookie."
            )
        for proxy in self.proxies:
            _check_proxy(proxy)

    @property
    def secure(self) -> bool:
        """Whether people come over TLS, so that cookies may be kept to it."""
        return self.origins[0].startswith("https://")

    @property
    def hosts(self) -> frozenset[str]:
        """The Host headers that are ours: another one is a name that someone else made point here."""
        return frozenset(urlsplit(origin).netloc for origin in self.origins)


def network_of(host: str) -> str:
    """What a caller's acts are counted by: the address, or of IPv6 the /64 network, all of whose addresses are one
    caller's to choose."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def loopback_origins(port: int) -> tuple[str, ...]:
    """The addresses under which a browser on the same machine reaches a port."""
    end = "" if port == 80 else f":{port}"
    return tuple(f"http://{host}{end}" for host in ("127.0.0.1", "localhost", "[::1]"))


def _check_origin(origin: str) -> None:
    try:
        parts = urlsplit(origin)
        port, host = parts.port, parts.hostname
    except ValueError as error:
        raise ConfigError(
            f"The origin {origin!r} is no address ({error}); give one such as https://labels.example.org."
        ) from error
    default = {"http": 80, "https": 443}.get(parts.scheme)
    if (
        default is None
        or not host
        or parts.username is not None
        or origin != f"{parts.scheme}://{parts.netloc}".lower()
    ):
        raise ConfigError(
            f"The origin {origin!r} must be a scheme and a host in small letters and nothing more, such as "
            "https://labels.example.org (no path, no final slash)."
        )
    if port == default:
        raise ConfigError(f"The origin {origin!r} must leave out :{port}, as browsers do.")
    if parts.scheme == "http" and not is_loopback(host):
        raise ConfigError(
            f"With the origin {origin!r} passwords would travel in the clear; put a proxy that ends TLS in front of "
            "the server and give its https:// address."
        )


def _check_proxy(proxy: str) -> None:
    """Whoever is let through here can say to be anybody, so it is never a name and never everyone."""
    try:
        network = ipaddress.ip_network(proxy)
    except ValueError as error:
        raise ConfigError(
            f"The proxy {proxy!r} is neither an address nor a network ({error}); give one such as 10.0.0.2 or "
            "172.18.0.0/16."
        ) from error
    if network.prefixlen == 0:
        raise ConfigError(
            f"The proxy {proxy!r} is everybody, so anybody could pass for another; give the proxy's own address or "
            "network, such as 10.0.0.2 or 172.18.0.0/16."
        )
