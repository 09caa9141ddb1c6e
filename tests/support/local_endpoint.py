"""A local endpoint in this process, in front of servers that already run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import uvicorn

from deploy.local_endpoint.app import listen, make_app, server_config
from deploy.local_endpoint.contract import Corners, PlatformLimits
from deploy.local_endpoint.pins import Instance
from deploy.local_endpoint.routing import Router
from deploy.local_endpoint.service import EndpointService
from deploy.serve.torchserve import TorchServe

NAME = "llava"


class Endpoint:
    """A local endpoint in a thread, on a free port."""

    def __init__(
        self,
        servers: list[TorchServe],
        corners: Corners | None = None,
        limits: PlatformLimits | None = None,
        clock: Callable[[], float] = time.time,
        origins: Sequence[str] = (),
        cut_parts: bool = False,
        router: Router | None = None,
    ) -> None:
        self.corners = corners or Corners()
        instances = [
            Instance(
                number,
                server.url,
                str(server.log_path),
                getattr(server, "openai_url", ""),
                getattr(server, "worker_metrics_url", ""),
            )
            for number, server in enumerate(servers, 1)
        ]
        self.service = EndpointService(NAME, instances, corners, limits, clock, cut_parts=cut_parts, router=router)
        self._listener = listen(0)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        app = make_app(self.service, origins)
        self._server = uvicorn.Server(server_config(app, log_level="error", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True)

    def __enter__(self) -> Endpoint:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
