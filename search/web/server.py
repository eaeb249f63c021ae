"""The HTTP server around the service."""

from __future__ import annotations

from types import FrameType

import uvicorn

from .app import App

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "prune-search serve: %(message)s"}},
    "handlers": {
        "stderr": {
            "class": "logging.StreamHandler",
            "formatter": "plain",
            "stream": "ext://sys.stderr",
        }
    },
    "loggers": {
        "uvicorn": {"handlers": ["stderr"], "level": "CRITICAL", "propagate": False},
        "prunesearch.serve": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
    },
}
GRACE_S = 5


class Server(uvicorn.Server):
    """Ends event streams and checks when it is asked to end: they would keep it waiting."""

    def __init__(self, app: App, most_connections: int) -> None:
        """Serves nothing yet.

        Args:
            app: The service.
            most_connections: At a time; further ones get status 503.
        """
        self._app = app
        super().__init__(
            uvicorn.Config(
                app,
                log_config=LOGGING,
                access_log=False,
                proxy_headers=False,  # anybody could claim to be another client
                server_header=False,
                ws="none",
                http="h11",
                limit_concurrency=most_connections,
                timeout_graceful_shutdown=GRACE_S,
            )
        )

    @property
    def searches(self) -> list[str]:
        """The searches that were started here and are still running."""
        launches = self._app.service.launcher.launches()
        return [name for name, launch in launches.items() if launch.code is None]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """At Ctrl-C and SIGTERM."""
        self._app.end()
        super().handle_exit(sig, frame)
