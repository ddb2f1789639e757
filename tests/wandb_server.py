"""A W&B server in little, for the real client: takes runs, and can refuse, fail, hang or hang up.

It answers what the client asks at a run's start (GraphQL, by the operation's name), and keeps the history rows that
come in by the file stream.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "0123456789abcdef0123456789abcdef01234567"


class WandbServer(ThreadingHTTPServer):
    """Serves on a free port. `mode`: "good", a status code, "hang", or "close" (drops each connection)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode: str | int = "good"
        self.rows: dict[int, dict] = {}  # line of the history -> row
        self.asked: list[str] = []  # everything that came in, as text
        self.arrived, self.let_go = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def steps(self) -> list[int]:
        return [self.rows[line]["_step"] for line in sorted(self.rows)]

    def stop(self) -> None:
        self.let_go.set()
        self.shutdown()
        self.server_close()
        self.thread.join()

    def handle_error(self, request, client_address) -> None:
        pass  # clients that hang up


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *_) -> None:
        pass

    def _answer(self, body: dict, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _handle(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
        self.server.asked.append(f"{self.path} {text}")
        mode = self.server.mode
        if mode == "close":
            self.close_connection = True
            return
        if mode == "hang":
            self.server.let_go.wait()
            self.close_connection = True
            return
        if isinstance(mode, int):
            return self._answer({"error": "refused", "errors": [{"message": "refused"}]}, mode)
        if self.path.endswith("/file_stream"):
            return self._take(json.loads(text))
        if self.path.endswith("/graphql"):
            return self._answer({"data": reply(json.loads(text), self.server.url)})
        self._answer({})

    do_GET = do_POST = do_PUT = _handle

    def _take(self, sent: dict) -> None:
        history = (sent.get("files") or {}).get("wandb-history.jsonl")
        if history:
            for number, line in enumerate(history["content"]):
                self.server.rows[history["offset"] + number] = json.loads(line)
            self.server.arrived.set()
        self._answer({"exitcode": None, "limits": {}})


def reply(asked: dict, url: str) -> dict:
    """What the client needs to hear, by the query's text."""
    query, given = asked.get("query", ""), asked.get("variables") or {}
    if "upsertBucket" in query:
        entity, project = given.get("entity") or "me", given.get("project") or "p"
        name = given.get("name") or "run"
        project = {"id": "p", "name": project, "entity": {"id": "e", "name": entity}}
        bucket = {"id": "b", "name": name, "displayName": given.get("displayName") or name, "description": None}
        bucket |= {"config": "{}", "sweepName": None, "historyLineCount": 0, "project": project}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}
    if "notifyScriptableRunAlert" in query:
        return {"notifyScriptableRunAlert": {"success": True}}
    if "createRunFiles" in query:
        files = [{"name": name, "uploadUrl": f"{url}/upload"} for name in given.get("files") or []]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
    if "viewer" in query:
        return {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
    if "serverInfo" in query:
        return {"serverInfo": {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None}}
    return {"model": {"bucket": None, "id": "p", "name": "p"}, "project": None}
