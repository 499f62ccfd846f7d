"""How fast a server makes texts together: speed.py URL CLIENTS... For each number of clients: tokens a second, all texts
together, and the same by the time that the engine alone spent in its steps, which is what the engine could do."""

import asyncio
import json
import sys
import time
from urllib.parse import urlparse

url = urlparse(sys.argv[1])
PROMPT, MADE, ROUNDS = 128, 192, 2


async def exchange(path, body=None):
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    data = json.dumps(body).encode() if body is not None else b""
    writer.write(f"{'POST' if data else 'GET'} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
                 f"content-length: {len(data)}\r\n\r\n".encode() + data)
    head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert b" 200 " in head.split(b"\r\n")[0], (head, answer)
    return answer.decode()


async def counts():
    """Seconds in steps, steps, and tokens made."""
    page = await exchange("/metrics")
    value = lambda name: float(next(line for line in page.splitlines() if line.startswith(name)).split()[-1])
    return value("decdec_step_seconds_sum"), value("decdec_step_seconds_count"), value("vllm:generation_tokens_total")


async def client(name):
    for number in range(ROUNDS):
        prompt = [(7919 * (name * ROUNDS + number) + 31 * i) % 40000 + 100 for i in range(PROMPT)]
        body = {"prompt": prompt, "max_tokens": MADE, "ignore_eos": True, "temperature": 0}
        answer = json.loads(await exchange("/v1/completions", body))
        assert answer["usage"]["completion_tokens"] == MADE, answer["usage"]


async def main():
    await client(1000)
    for clients in map(int, sys.argv[2:]):
        before, started = await counts(), time.monotonic()
        await asyncio.gather(*(client(i) for i in range(clients)))
        took, after = time.monotonic() - started, await counts()
        stepping, steps, made = (b - a for a, b in zip(before, after))
        print(json.dumps({"clients": clients, "tokens_per_second": round(made / took, 1),
                          "by_steps_alone": round(made / stepping, 1), "share": round(stepping / took, 4),
                          "step_ms": round(1e3 * stepping / steps, 3), "seconds": round(took, 1)}), flush=True)


asyncio.run(main())
