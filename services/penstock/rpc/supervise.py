"""Starts the workers of one server, says when they take calls, drains them together, and ends with them.

Run as a script, with the standard library alone (`penstock.rpc.launch` becomes it): it is to weigh nothing beside its
workers. Arguments: a descriptor with the plan, and one that holds the port. `penstock.rpc.worker` is the other side.
"""

import contextlib
import http.client
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

CONTROL_FD = "PENSTOCK_CONTROL_FD"
# Beyond the time that calls have to finish: for closing what the application holds.
CLOSE_S = 15.0
EXIT_S = 5.0
POLL_S = 0.02


class FailureError(Exception):
    """Why the server cannot go on, for the operator."""


class Worker:
    """One child process and the socket to it."""

    def __init__(self, command: dict[str, Any], assignment: dict[str, Any]) -> None:
        self.name: str = command["name"]
        self.admin: str | None = command["admin"]
        self.state = "starting"
        self._received = b""
        self.socket, other = socket.socketpair()
        with other:
            self.process = subprocess.Popen(  # noqa: S603  # our own plan
                command["argv"],
                env={**command["env"], CONTROL_FD: str(other.fileno())},
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
                # Ctrl-C reaches everybody in a terminal's group; here only the supervisor is to hear it.
                start_new_session=True,
            )
        self.socket.sendall(json.dumps(assignment).encode() + b"\n")
        self.socket.setblocking(False)

    def say(self, what: str) -> None:
        with contextlib.suppress(OSError):  # its end is seen where it is looked for
            self.socket.sendall(json.dumps({"do": what}).encode() + b"\n")

    def events(self) -> list[dict[str, str]]:
        """What the worker has said since."""
        with contextlib.suppress(OSError):
            while data := self.socket.recv(65536):
                self._received += data
        *lines, self._received = self._received.split(b"\n")
        return [json.loads(line) for line in lines]

    def ask_admin(self, method: str, path: str) -> bool:
        """Whether Envoy's admin interface answered with success."""
        if self.admin is None:
            return True
        connection = http.client.HTTPConnection("localhost", timeout=2)
        try:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(2)
            connection.sock.connect(self.admin)
            connection.request(method, path)
            return connection.getresponse().status == http.client.OK
        except OSError:
            return False
        finally:
            connection.close()

    def end(self) -> None:
        """Terminates the process, kills it if it stays."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(EXIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Supervisor:
    """All workers of a server."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        self._stop = False
        self._workers: list[Worker] = []
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        for end in (self._wake, self._waker):
            end.setblocking(False)
        self._selector.register(self._wake, selectors.EVENT_READ)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGINT, self._on_stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def run(self) -> None:
        """Returns after a stop that was asked for; raises `FailureError` otherwise."""
        if self._plan["stop_on_eof"]:
            threading.Thread(target=self._wait_for_eof, daemon=True).start()
        try:
            for command, assignment in zip(self._plan["workers"], self._plan["assignments"], strict=True):
                self._workers.append(Worker(command, assignment))
                self._selector.register(self._workers[-1].socket, selectors.EVENT_READ)
            if self._until("serving"):
                self._write_ready_file()
                self._until("for ever")
        except FailureError:
            self._drain()
            raise
        else:
            if not self._drain():
                raise FailureError("A worker did not stop in time and was killed.")
        finally:
            self._remove_ready_file()
            for worker in self._workers:
                worker.end()
            shutil.rmtree(self._plan["folder"], ignore_errors=True)

    def _until(self, state: str) -> bool:
        """Waits for all workers to come so far; whether they did before a stop was asked for."""
        while not self._stop:
            starting = any(worker.state == "started" for worker in self._workers)
            self._step(POLL_S if starting else None)
            for worker in self._workers:
                if worker.state == "started" and worker.ask_admin("GET", "/ready"):
                    worker.state = "announced"
                    worker.say("announce")
                if worker.process.poll() is not None:
                    raise FailureError(f"{worker.name} ended with exit code {worker.process.returncode}.")
            if all(worker.state == state for worker in self._workers):
                return True
        return False

    def _drain(self) -> bool:
        """Lets the workers finish what is in progress; whether all of them did."""
        for worker in self._workers:
            worker.say("drain")
        for worker in self._workers:
            # Clients hear from the connection, by GOAWAY, that they had better use another one.
            worker.ask_admin("POST", "/drain_listeners?graceful&skip_exit")
        until = time.monotonic() + self._plan["drain_s"] + CLOSE_S
        while time.monotonic() < until:
            left = [worker for worker in self._workers if worker.state != "stopped" and worker.process.poll() is None]
            if not left:
                return True
            with contextlib.suppress(FailureError):
                self._step(until - time.monotonic())
        return False

    def _step(self, timeout_s: float | None) -> None:
        """Waits for anything to happen, and takes in what the workers say."""
        self._selector.select(timeout_s)
        with contextlib.suppress(OSError):
            self._wake.recv(4096)
        failed = ""
        for worker in self._workers:
            for event in worker.events():
                worker.state = event["event"] if event["event"] != "failed" else "stopped"
                failed = failed or event["error"]
            if worker.process.poll() is not None and worker.socket.fileno() in self._selector.get_map():
                self._selector.unregister(worker.socket)
        if failed:
            raise FailureError(failed)

    def _on_stop(self, *_: object) -> None:
        self._stop = True

    def _wait_for_eof(self) -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        self._stop = True
        self._waker.send(b"\0")

    def _write_ready_file(self) -> None:
        if self._plan["ready_file"] is None:
            return
        path = Path(self._plan["ready_file"])
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text(self._plan["address"], encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise FailureError(
                f"Cannot write the ready file {path}: {error.strerror}. Choose another with --ready-file."
            ) from error

    def _remove_ready_file(self) -> None:
        if self._plan["ready_file"] is not None:
            with contextlib.suppress(OSError):
                Path(self._plan["ready_file"]).unlink()


def main() -> int:
    plan_descriptor, _held = map(int, sys.argv[1:])
    with os.fdopen(plan_descriptor, "rb") as file:
        plan = json.load(file)
    try:
        Supervisor(plan).run()
    except FailureError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
