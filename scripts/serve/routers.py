"""Two replicas behind a router: routers.py ROUTER DECDEC MODEL LOGS. ROUTER is vllm-router or smg."""

import concurrent.futures
import json
import pathlib
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

router, program, model, logs = sys.argv[1:5]
name = pathlib.Path(router).name
ports, front, running = [8111, 8112], 8110, {}


def ask(port, path, body=None, timeout=120):
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return answer.read().decode()


def wait(what, holds, seconds=120):
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        try:
            if holds():
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.2)
    raise AssertionError(f"{what} does not come")


def replica(port):
    log = open(f"{logs}-{port}.log", "a")
    running[port] = subprocess.Popen([program, "serve", "--checkpoint-path", model, "--port", str(port), "--slots", "4",
        "--served-model-name", "m", "--max-seq-len", "1024", "--drain-notice", "2"], stdout=log, stderr=log)
    wait(f"replica {port}", lambda: ask(port, "/ready"))


def one(number):
    """A text through the router; a client asks again where a router says that nobody is there."""
    body = {"model": "m", "messages": [{"role": "user", "content": f"Count to {number}."}], "max_tokens": 12, "temperature": 0}
    for _ in range(20):
        try:
            return json.loads(ask(front, "/v1/chat/completions", body))["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            # 404: the router knows of no replica yet.
            if error.code not in (404, 429, 500, 502, 503, 504):
                raise AssertionError(f"{error.code}: {error.read()}") from error
            time.sleep(0.5)
    raise AssertionError(f"request {number} is lost")


def all_of(numbers):
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        return list(threads.map(one, numbers))


def made(port):
    page = ask(port, "/metrics")
    line = next(line for line in page.splitlines() if line.startswith("vllm:generation_tokens_total"))
    return float(line.split()[-1])


try:
    for port in ports:
        replica(port)
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    command = [router] + (["launch"] if name == "smg" else []) + ["--worker-urls", *urls, "--policy", "round_robin",
        "--host", "127.0.0.1", "--port", str(front)]
    running["router"] = subprocess.Popen(command, stdout=open(f"{logs}.log", "w"), stderr=subprocess.STDOUT)
    wait("the router", lambda: one(1))
    expected = all_of(range(2, 18))
    shares = [made(port) for port in ports]
    assert min(shares) > 0.25 * sum(shares), f"not balanced: {shares}"
    print(f"balanced: {shares} tokens")
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(one, number) for number in range(2, 18)]
        time.sleep(0.7)
        running[ports[0]].kill()
        assert [answer.result() for answer in answers] == expected, "another answer after a kill"
    print("one killed under load: every request was answered as before")
    running[ports[0]].wait()
    replica(ports[0])
    time.sleep(5)
    before = made(ports[0])
    wait("the replica's return", lambda: one(3) and made(ports[0]) > before)
    print("brought back")
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(one, number) for number in range(2, 18)]
        time.sleep(0.7)
        running[ports[1]].send_signal(signal.SIGTERM)
        assert [answer.result() for answer in answers] == expected, "another answer after a drain"
    assert running[ports[1]].wait(timeout=60) == 0
    print(f"{name}: balanced, one killed, brought back, one drained; {3 * len(expected)} answers, none lost")
finally:
    for process in running.values():
        process.kill()
