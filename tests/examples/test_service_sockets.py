"""The service as the network has it: uvicorn on a port of this machine, and clients that write what they like."""

from __future__ import annotations

import http.client
import json
import select
import socket
import threading
import time

import pytest
import uvicorn

from examples import service
from tests.faults.requests import GOOD, Stub

SECONDS = 0.5
"""In which a body must be there."""
RIGHT, WRONG = "Authorization: Bearer secret", "Authorization: Bearer guess"


@pytest.fixture(scope="module")
def port():
    app = service.create_app(Stub(), token="secret", body_seconds=SECONDS)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", **service.SERVER))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def client(port):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        yield client


def head(line: str, *headers: str) -> bytes:
    return "\r\n".join((f"{line} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers, "", "")).encode()


def until_closed(client: socket.socket) -> bytes:
    """What the server sends before it closes the connection."""
    received = b""
    try:
        while piece := client.recv(65536):
            received += piece
    except ConnectionResetError:  # it has left something unread
        pass
    return received


def refused(received: bytes) -> tuple[int, str]:
    lines, _, body = received.partition(b"\r\n\r\n")
    assert b"connection: close" in lines.lower().split(b"\r\n")
    return int(lines.split()[1]), json.loads(body)["detail"]


def asked(port: int, line: str) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(head(line, RIGHT, "Connection: close"))
        return until_closed(client)


def healthy(port: int) -> bool:
    return asked(port, "GET /health").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("more", [[], ["Expect: 100-continue"]])
@pytest.mark.parametrize(("token", "status"), [(WRONG, 401), (RIGHT, 413)])
def test_two_hundred_megabytes_are_refused_before_one_of_them_is_sent(client, token, status, more):
    client.sendall(head("POST /forget", token, "Content-Length: 200000000", *more))
    assert refused(until_closed(client))[0] == status


def test_a_body_without_a_length_is_cut_off(client, port):
    client.sendall(head("POST /forget", RIGHT, "Transfer-Encoding: chunked"))
    for _ in range(5):  # 320 KiB, and no end
        client.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
    assert refused(until_closed(client)) == (413, "expected at most 262144 bytes, got more")
    assert healthy(port)


@pytest.mark.parametrize("drip", [b"", b" "])
@pytest.mark.parametrize("framing", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
def test_a_body_that_is_half_sent_is_not_waited_for(client, port, framing, drip):
    started = time.monotonic()
    client.sendall(head("POST /forget", RIGHT, framing) + b"100\r\n")
    while not select.select([client], [], [], 0.05)[0]:
        client.sendall(drip)
    assert refused(until_closed(client)) == (408, "expected the body within 0.5 s, got a part")
    assert SECONDS <= time.monotonic() - started < SECONDS + 2
    assert healthy(port)


def test_what_a_client_that_went_away_asked_for_is_not_done(port):
    body = json.dumps({**GOOD, "id": "gone"}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(head("POST /forget", RIGHT, f"Content-Length: {len(body) + 1}") + body)
    for _ in range(100):
        if b'{reason="malformed"} 1.0' in asked(port, "GET /metrics"):
            break
        time.sleep(0.02)
    else:
        pytest.fail("nobody noticed")
    assert b"gone" not in asked(port, "GET /edits")


def test_a_connection_is_kept_after_what_is_done(port):
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    own = []
    for number in range(2):
        body = json.dumps(GOOD).replace("#", str(number))
        client.request(
            "POST", "/forget?wait=1", body, {"Authorization": "Bearer secret", "Content-Type": "application/json"}
        )
        answer = client.getresponse()
        own.append(client.sock.getsockname())
        assert (answer.status, json.load(answer)["id"]) == (201, f"fact {number}")
    client.close()
    assert own[0] == own[1]


@pytest.mark.parametrize("wrong", [b"no HTTP at all\r\n\r\n", head("GET /health", f"X: {'x' * 300_000}")])
def test_what_is_not_http_is_refused_by_the_server(client, port, wrong):
    client.sendall(wrong)
    assert until_closed(client).startswith(b"HTTP/1.1 400 ")
    assert healthy(port)
