"""`explore`: the explorer of a feature store in Jupyter or from a script; and the server that it and the command run.

The server is uvicorn in a thread of its own, bound to this machine alone unless another address is given.
"""

import errno
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.evaluation.results import ConceptScores, Evaluation
from saelab.explorer.security import LIMITS, ExplorerLimits, is_loopback, make_token
from saelab.lm.huggingface import AnyModel
from saelab.sae.sae import SAE
from saelab.stores.feature_store import FeatureStore
from saelab.visualization.html import escape

if TYPE_CHECKING:
    from saelab.explorer.session import Explorer
    from saelab.interventions.attribution import Attribution
    from saelab.labels.autointerp.clients import Client

HOST, PORT = "127.0.0.1", 8765
EVERYWHERE = ("0.0.0.0", "::", "")
START, GRACE = 10.0, 4
"""seconds to wait for the server to begin, and for its answers to end"""
CONNECTIONS, KEEP_ALIVE = 256, 60
"""connections at once, and seconds that an idle one is kept"""


class ExplorerServer:
    """A running explorer; the last expression of a Jupyter cell shows it.

    Args:
        explorer: what is served; closed with the server.
        host: address to bind to.
        port: port to bind to; 0 is any that is free, None is 8765, or any that is free where that is in use.
        height: height of the frame in Jupyter, in pixels.
        limits: largest requests.

    Raises:
        ValueError: the port is in use, or the address is none of this machine.
    """

    def __init__(
        self,
        explorer: "Explorer",
        host: str = HOST,
        port: int | None = None,
        *,
        height: int = 800,
        limits: ExplorerLimits = LIMITS,
    ) -> None:
        import uvicorn

        from saelab.explorer.app import make_app
        from saelab.explorer.session import END

        self.explorer, self.height, self._patience = explorer, height, END
        listening = bind(host, port)
        token = make_token()
        name = socket.gethostname() if host in EVERYWHERE else host
        self.url = f"http://{f'[{name}]' if ':' in name else name}:{listening.getsockname()[1]}/{token}/"
        self.is_public = not is_loopback(host)
        app: Any = make_app(explorer, token, host=name, public=self.is_public, limits=limits)
        settings: dict[str, Any] = {"lifespan": "off", "ws": "none", "http": "h11", "loop": "asyncio"}
        quiet: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                limit_concurrency=CONNECTIONS,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=GRACE,
                **settings,
                **quiet,
            )
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(listening,), name="saelab explorer", daemon=True)
        self._thread.start()
        self._wait_for_start()

    def _run(self, listening: socket.socket) -> None:
        try:
            self._server.run([listening])
        finally:
            self._ended.set()

    def _wait_for_start(self) -> None:
        pause, waited = threading.Event(), 0.0
        while not self._server.started and self._thread.is_alive() and waited < START:
            pause.wait(0.005)
            waited += 0.005
        if not self._server.started:
            self.close()
            raise RuntimeError(f"The explorer's server must start within {START:g} s, got no answer from it.")

    @property
    def is_running(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._server.should_exit

    def wait(self) -> None:
        """Wait until the server ends, such as for a script whose last line this is; Ctrl-C ends it."""
        try:
            # Not `join`: Python before 3.13 takes a thread for ended when Ctrl-C interrupts it.
            while not self._ended.wait(1.0):
                pass
        finally:
            self.close()

    def close(self) -> None:
        """End the server, what it still generates, and the explorer."""
        self.explorer.closed.set()
        self._server.should_exit = True
        if self._thread is not threading.current_thread() and self._ended.wait(self._patience):
            self._thread.join(self._patience)
        # The last turn of what was generated ends first: a thread at work in torch would abort the process as it exits.
        if self.explorer.lock.acquire(timeout=self._patience):
            self.explorer.lock.release()
        self.explorer.close()

    def __enter__(self) -> "ExplorerServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ExplorerServer({self.url!r})"

    def _repr_html_(self) -> str:
        return (
            f'<iframe src="{escape(self.url)}" title="{escape(self.explorer.title)}" '
            f'style="width:100%;height:{self.height}px;border:0"></iframe>'
        )


def bind(host: str, port: int | None) -> socket.socket:
    """A socket that is bound to an address; see `ExplorerServer` for the port.

    Raises:
        ValueError: the port is in use or may not be used, or the address is none of this machine.
    """
    if port is not None and not 0 <= port < 2**16:
        raise ValueError(f"`port` must be in 0..65535, got {port}.")
    try:
        return _bind(host, PORT if port is None else port)
    except OSError as error:
        if port is None and error.errno == errno.EADDRINUSE:
            return _bind(host, 0)
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"`port` must be free, got {port}, which another program uses. Give another one, or 0 for any."
            ) from None
        place = host if port is None else f"{host}:{port}"
        raise ValueError(
            f"`host` and `port` must be an address of this machine, got {place} ({error.strerror})."
        ) from None


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol, without which asyncio leaves Nagle's algorithm on: 40 ms for each answer.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if sys.platform != "win32":  # where it would let two programs share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except BaseException:
        listening.close()
        raise
    return listening


def explore(
    store: FeatureStore | str | Path,
    model: AnyModel | str | None = None,
    sae: SAE | str | Path | None = None,
    *,
    compare: FeatureStore | str | Path | None = None,
    evaluation: Evaluation | Mapping[str, Any] | str | Path | None = None,
    attribution: "Attribution | str | Path | None" = None,
    concepts: ConceptScores | str | Path | None = None,
    client: "Client | None" = None,
    read_only: bool = False,
    title: str = "",
    host: str = HOST,
    port: int | None = None,
    browser: bool = False,
    height: int = 800,
) -> ExplorerServer:
    """The explorer of a feature store, served until it is closed: features to search, name and steer, in a browser.

    In Jupyter the result of the cell shows it in a frame; elsewhere its address is printed. The page is served to this
    machine alone, under an address with a random token, and nothing is fetched from the network.

    Args:
        store: feature store, or its folder.
        model: language model of the store, or its name, which is loaded in the background; None takes the one that the
            store was made with, where it is on this machine.
        sae: the SAE that was harvested, or its folder; None takes the one that the store was made with.
        compare: another store of the same text, whose features are shown as partners; None for none.
        evaluation: result of `evaluate`, or its file; None for none.
        attribution: result of `attribute`, or the file that it was saved to; None for none.
        concepts: result of `score_concepts`, or the file that it was saved to: the concept of each feature and its F1
            are listed; None for none.
        client: client of a language model that labels features when asked to; None for none.
        read_only: let nobody change labels, notes and lists.
        title: title of the page; empty names the store.
        host: address to serve at; another one than that of this machine lets others read and change everything.
        port: port to serve at; 0 is any that is free, None is 8765, or any where that is in use.
        browser: open a browser.
        height: height of the frame in Jupyter, in pixels.

    Raises:
        ValueError: the model, SAE, results or other store are not those of the store, or the port is in use.
        FileNotFoundError: a folder or file does not exist.
    """
    from saelab.explorer.session import Explorer

    explorer = Explorer.open(
        store,
        model,
        sae,
        compare=compare,
        evaluation=evaluation,
        attribution=_load(attribution) if isinstance(attribution, str | Path) else attribution,
        concepts=ConceptScores.load(concepts) if isinstance(concepts, str | Path) else concepts,
        client=client,
        read_only=read_only,
        title=title,
    )
    try:
        server = ExplorerServer(explorer, host, port, height=height)
    except BaseException:
        explorer.close()
        raise
    if not in_notebook():
        sys.stdout.write(f"{describe_address(server)}\n")
    if browser:
        import webbrowser

        webbrowser.open(server.url)
    return server


def _load(attribution: str | Path) -> "Attribution":
    from saelab.interventions.attribution import Attribution

    return Attribution.load(attribution)


def describe_address(server: ExplorerServer) -> str:
    """The address of a server as a line of text, with a warning where others can reach it."""
    lines = [f"The explorer is at {server.url}"]
    if server.is_public:
        lines.append(
            "WARNING: it is served to other machines, without encryption: whoever has the address can read everything "
            "in it, change labels and use the model."
        )
    return "\n".join(lines)


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this program."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None
