"""Takes weights by HTTP and by collective and forgets them, so that what a push costs its sender can be measured.

discarding_peer.py    prints its URL, and serves until it is killed

No SGLang: it answers as one does and has no model. In a process of its own, because its memory must not count.
"""

from __future__ import annotations

import json
import math
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import torch
import torch.distributed as dist

from megatron_pz.sync.collective import join_group

VERSION, GROUPS = ["default"], {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer({"weight_version": VERSION[0]})

    def do_POST(self) -> None:
        left = int(self.headers.get("Content-Length") or 0)
        kept = b""
        while left:
            piece = self.rfile.read(min(left, 1 << 20))
            left -= len(piece)
            kept = kept + piece if len(kept) < 1 << 20 else kept
        if self.path == "/update_weight_version":
            VERSION[0] = json.loads(kept)["new_version"]
        if self.path == "/init_weights_update_group":
            given = json.loads(kept)
            address = given["master_address"], given["master_port"]
            found = given["rank_offset"], given["world_size"], given["group_name"], given["backend"], 60.0
            GROUPS[given["group_name"]] = join_group(address, *found)
        if self.path == "/update_weights_from_distributed":
            receive(json.loads(kept))
        self.answer({"success": True})

    def answer(self, reply: dict[str, Any]) -> None:
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *line: object) -> None:
        pass


def receive(given: dict[str, Any]) -> None:
    sizes = [
        math.prod(shape) * getattr(torch, dtype).itemsize
        for shape, dtype in zip(given["shapes"], given["dtypes"], strict=True)
    ]
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    GROUPS[given["group_name"]].broadcast([torch.empty(sum(sizes), dtype=torch.uint8)], options).wait()


if __name__ == "__main__":
    server = HTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
