"""The `evaluate.py serve` command: a reading room on this machine."""

import hashlib
import secrets
import socket
import sys
from pathlib import Path

from decomp_jax.errors import UserError
from decomp_jax.inference.encode import encoded_by, restore_with_bank
from decomp_jax.room.session import Room

try:
    import uvicorn

    from decomp_jax.room.http import make_app
except ModuleNotFoundError as missing:
    raise UserError(f'evaluate.py serve: needs {missing.name}; pip install -e ".[serve]"') from missing

ADDRESS = "127.0.0.1"  # and no other: a room has one reader
CLOSING = 3  # seconds that answers under way have when the program is stopped


def serve(workdir: str | Path, bank: str | Path, data: str | Path | None, port: int) -> None:
    """Prints the address of a reading room, and serves it until the program is stopped.

    Args:
        workdir: the run whose network made the bank.
        bank: the archive.
        data: the data set that the bank encodes; by default where it was then. Without its images the room shows what
            the network paints from the codes.
        port: 0 takes one that is free.

    Raises:
        UserError: the bank is another network's, the data set another bank's, or the port is taken.
    """
    decomposer, archive = restore_with_bank(workdir, bank)
    try:
        dataset = decomposer.take_images(encoded_by(archive, data), str(data or archive.meta["data"]))
    except UserError as error:
        if data is not None:
            raise
        print(f"{error}; the room shows what the network paints from the codes", file=sys.stderr)
        dataset = None
    digest = hashlib.sha256((Path(bank) / "bank.json").read_bytes()).hexdigest()
    serve_room(Room(decomposer, archive, dataset, bank_digest=digest), port)


def serve_room(room: Room, port: int) -> None:
    """`serve` of a room that is made."""
    token = secrets.token_urlsafe(32)
    app = make_app(room, token)
    with _listening(port) as listening:
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="on",
                                timeout_graceful_shutdown=CLOSING)
        _Server(config, f"http://{ADDRESS}:{listening.getsockname()[1]}/#{token}").run(sockets=[listening])


class _Server(uvicorn.Server):
    """Prints its address once signals are its own: until then they are exceptions, which code below may swallow."""

    def __init__(self, config: uvicorn.Config, address: str) -> None:
        super().__init__(config)
        self._address = address

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self._address, flush=True)


def _listening(port: int) -> socket.socket:
    try:
        return socket.create_server((ADDRESS, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port={port}: can't be listened on ({error}); give another, or none") from error
