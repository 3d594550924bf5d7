"""Whether W&B may be written to online: whether anybody is logged in, and whether the server is there."""

from __future__ import annotations

import functools
import netrc
import os
import socket
import threading
import urllib.request
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

Mode = Literal["offline", "online", "disabled"]
PUBLIC = "api.wandb.ai"  # what `wandb login` wrote into netrc before the public server moved; wandb still takes it


def server() -> str:
    """The W&B server's address: WANDB_BASE_URL, else what wandb's own settings say."""
    if address := os.environ.get("WANDB_BASE_URL"):
        return address
    import wandb

    return str(wandb.setup().settings.base_url)


def logged_in() -> bool:
    """Whether there is a key for the server: in the environment, or an entry of `wandb login` in netrc. The key is not kept."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    home = Path.home()
    places = [Path(os.environ["NETRC"]).expanduser()] if os.environ.get("NETRC") else [home / ".netrc", home / "_netrc"]
    place = next((path for path in places if path.is_file()), None)
    if place is None:
        return False
    try:
        entries = netrc.netrc(place)
    except (netrc.NetrcParseError, OSError):
        return False  # wandb cannot read it either, so nobody is logged in
    hosts = [urlsplit(server()).netloc, *([] if os.environ.get("WANDB_BASE_URL") else [PUBLIC])]
    return any(entries.authenticators(host) for host in hosts)


@functools.cache
def reachable(address: str, timeout_s: float = 1.5) -> bool:
    """Whether the server, or the proxy before it, takes a connection; asked once per process, and never longer than the timeout."""
    url = urlsplit(address)
    host = url.hostname or ""
    proxy = urllib.request.getproxies().get(url.scheme)
    target = urlsplit(proxy) if proxy and not urllib.request.proxy_bypass(host) else url
    port = target.port or (443 if target.scheme == "https" else 80)
    answered = threading.Event()

    def knock() -> None:
        try:
            socket.create_connection((target.hostname or "", port), timeout_s).close()
        except OSError:
            return  # refused, unknown or unreachable: the answer is no
        answered.set()

    # In a thread of its own, since looking up a name has no timeout.
    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answered.is_set()


def choose(mode: str) -> tuple[Mode, str]:
    """The mode W&B is opened in, and a line to say where it is not what was asked for."""
    wanted = os.environ.get("WANDB_MODE") or "auto" if mode == "auto" else mode
    if wanted in ("offline", "dryrun"):
        return "offline", ""
    if wanted == "disabled":
        return "disabled", ""
    if not logged_in():
        return "offline", "nobody is logged in" if wanted == "online" else ""
    if not reachable(server()):
        return "offline", f"{server()} does not answer"
    return "online", ""
