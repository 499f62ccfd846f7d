"""What clients do wrong: faults.py URL. Idle connections, half a request, a header of 1 MB, readers that do not read;
after each the server answers as before."""

import json
import socket
import sys
import time
import urllib.request
from urllib.parse import urlparse

url = urlparse(sys.argv[1])


def connect():
    return socket.create_connection((url.hostname, url.port), timeout=30)


def fine():
    body = json.dumps({"prompt": "a", "max_tokens": 2}).encode()
    request = urllib.request.Request(sys.argv[1] + "/v1/completions", body, {"content-type": "application/json"})
    started = time.monotonic()
    assert json.load(urllib.request.urlopen(request, timeout=60))["choices"], "no answer"
    return time.monotonic() - started


def post(body, length=None):
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length or len(body)}"
    return f"{head}\r\n\r\n{body}".encode()


fine()
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 20_000), hard))
count = min(hard, 20_000) - 200 if hard < 10_200 else 10_000
idle = [connect() for _ in range(count)]
assert fine() < 30
print(f"ok {count} idle connections")
for connection in idle:
    connection.close()
half = [connect() for _ in range(50)]
for connection in half:
    connection.sendall(post("{", 1000))
assert fine() < 30
print("ok 50 half-open bodies")
large = connect()
try:
    large.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"x" * (1 << 20) + b"\r\n\r\n")
except (BrokenPipeError, ConnectionResetError):
    pass
try:
    assert b" 431 " in large.recv(100)
except ConnectionResetError:
    pass
assert fine() < 30
print("ok a header of 1 MB")
slow = [connect() for _ in range(4)]
for connection in slow:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.sendall(post(json.dumps({"prompt": "a", "max_tokens": 300, "stream": True, "logprobs": 20, "ignore_eos": True})))
time.sleep(1)
assert fine() < 60
print("ok 4 readers that do not read")
for connection in half + slow:
    connection.close()
for _ in range(300):
    slots = json.load(urllib.request.urlopen(sys.argv[1] + "/slots"))
    if not any(slot["is_processing"] for slot in slots):
        break
    time.sleep(0.1)
assert not any(slot["is_processing"] for slot in slots), slots
print("ok no slot is stuck; all faults are over")
