"""Load and faults on a running server, with nothing but Python: load.py URL PID SECONDS [CLIENTS [REQUESTS]].

Requests of many kinds until the time is over and there were REQUESTS of them (one a second, unless said). A tenth is left
half way, a tenth is malformed. At the end every answer has to be what the same request gets alone, memory has to be what it
was after a fifth of the time, and open files and slots what they were before. Prints two lines of JSON."""

import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import time
from urllib.parse import urlparse

url, pid, seconds = urlparse(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
clients = int((sys.argv[4:] or ["16"])[0])
least = int((sys.argv[5:] or [seconds])[0])
first, between, whole, answers = [], [], [], []
counts = {"left": 0, "malformed": 0, "whole": 0}
# So many requests differ from each other: each is asked several times, among others each time.
KINDS = 61
TEXTS = ["Name three colours.", "Why is the sky blue?", "Write a short poem about rain.", "What is 12 times 12?",
         "Tell me about Rome. " * 20, "List the planets."]


async def exchange(path, body, leave_after=None):
    """Status and body of an answer; what comes of a stream is timed."""
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"{'POST' if body is not None else 'GET'} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        if body is not None:
            head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n"
        started = time.monotonic()
        writer.write(head.encode() + b"\r\n" + (data if body is not None else b""))
        await writer.drain()
        if leave_after is not None:
            await asyncio.sleep(leave_after)
            return None, b""
        status = int((await reader.readline()).split()[1])
        chunked = False
        while (line := await reader.readline()) not in (b"\r\n", b""):
            chunked |= line.lower().startswith(b"transfer-encoding: chunked")
        if not chunked:
            return status, await reader.read()
        whole_body, last, parts = b"", None, 0
        while size := int(await reader.readline(), 16):
            part = await reader.readexactly(size + 2)
            now = time.monotonic()
            if last is not None:
                # The first part comes before any token.
                (between if parts else first).append(now - (last if parts else started))
                parts += 1
            last, whole_body = now, whole_body + part[:-2]
        return status, whole_body
    finally:
        writer.close()


def request(kind_number):
    """A request that gets the same answer whenever it is asked, one of KINDS."""
    dice = random.Random(kind_number)
    text = dice.choice(TEXTS)
    body = {"temperature": dice.choice([0, 0, 0.8]), "seed": kind_number, "max_tokens": dice.randint(4, 24)}
    kind = dice.choice(["chat", "chat", "stream", "stream", "text", "json", "score"])
    if kind == "text":
        return "/v1/completions", {**body, "prompt": text}
    if kind == "score":
        return "/v1/completions", {"prompt": text, "echo": True, "logprobs": 1, "max_tokens": 0}
    body["messages"] = [{"role": "user", "content": text}]
    if kind == "stream":
        body["stream"] = True
    if kind == "json":
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": {
            "type": "object", "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}}, "required": ["n"],
            "additionalProperties": False}}}
    return "/v1/chat/completions", body


def said(path, body, answer):
    """What an answer says, without ids and times."""
    if body.get("stream"):
        data = [block[6:] for block in answer.decode().split("\n\n") if block.startswith("data: ")]
        assert data[-1] == "[DONE]", data[-1]
        deltas = [json.loads(block)["choices"][0]["delta"].get("content", "") for block in data[:-1]]
        return "".join(deltas)
    choice = json.loads(answer)["choices"][0]
    return [choice.get("text"), choice.get("message", {}).get("content"), (choice.get("logprobs") or {}).get("token_logprobs")]


def held():
    """Resident KiB and open files of the server."""
    with open(f"/proc/{pid}/status") as status:
        resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    return resident, len(os.listdir(f"/proc/{pid}/fd"))


async def client(ends, numbers):
    while time.monotonic() < ends or sum(counts.values()) < least:
        number = next(numbers)
        dice = random.Random(f"fate {number}")
        kind = number % KINDS
        path, body = request(kind)
        fate = dice.random()
        if fate < 0.1:
            counts["left"] += 1
            await exchange(path, body, leave_after=dice.random() * 0.5)
        elif fate < 0.2:
            bad = dice.choice([b"{", b'{"messages": []}', b'{"messages": [{"role": "user", "content": "x"}], "n": 0}', b"\xff"])
            status, _ = await exchange("/v1/chat/completions", bad)
            assert status == 400, status
            counts["malformed"] += 1
        else:
            started = time.monotonic()
            status, answer = await exchange(path, body)
            assert status == 200, (status, answer)
            whole.append(time.monotonic() - started)
            answers.append((kind, said(path, body, answer)))
            counts["whole"] += 1


async def watch(ends):
    """What is held after a fifth of the time."""
    await asyncio.sleep((ends - time.monotonic()) / 5)
    return held()


async def warm():
    """Fills every slot as far as the load will: memory of a context is the system's until it is first written."""
    slots = len(json.loads((await exchange("/slots", None))[1]))
    longest = {"prompt": 2 * max(TEXTS, key=len), "n": slots, "max_tokens": 48, "ignore_eos": True, "temperature": 0}
    status, answer = await exchange("/v1/completions", longest)
    assert status == 200, answer
    # Forms and scores have memory of their own.
    requests = [request(kind) for kind in range(KINDS)]
    for field in ["response_format", "echo"]:
        await exchange(*next(each for each in requests if field in each[1]))


async def main():
    await warm()
    started, before = time.monotonic(), held()
    ends = started + seconds
    numbers = itertools.count()
    early, *_ = await asyncio.gather(watch(ends), *(client(ends, numbers) for _ in range(clients)))
    took = time.monotonic() - started
    for _ in range(200):
        slots = json.loads((await exchange("/slots", None))[1])
        if not any(slot["is_processing"] for slot in slots):
            break
        await asyncio.sleep(0.1)
    after = held()
    at = lambda times, share: round(1e3 * statistics.quantiles(times, n=100)[share - 1], 1) if len(times) > 1 else None
    print(json.dumps({
        "seconds": round(took), "clients": clients, "requests": counts,
        "resident_kib": {"before": before[0], "early": early[0], "after": after[0]},
        "open_files": {"before": before[1], "after": after[1]}, "stuck_slots": sum(s["is_processing"] for s in slots),
        "first_token_ms": {"p50": at(first, 50), "p99": at(first, 99)},
        "between_tokens_ms": {"p50": at(between, 50), "p99": at(between, 99)},
        "whole_ms": {"p50": at(whole, 50), "p99": at(whole, 99)}}), flush=True)
    # Each of them again, alone.
    alone = {}
    for kind in {kind for kind, _ in answers}:
        path, body = request(kind)
        alone[kind] = said(path, body, (await exchange(path, body))[1])
    differ = [kind for kind, answer in answers if answer != alone[kind]]
    print(json.dumps({"compared": len(answers), "with_requests_alone": len(alone), "differ": differ}))
    assert not differ and not any(s["is_processing"] for s in slots), "answers differ, or slots are stuck"
    assert after[0] <= 1.02 * early[0], "memory grows"
    assert after[1] <= before[1] + 2, "files stay open"


asyncio.run(main())
