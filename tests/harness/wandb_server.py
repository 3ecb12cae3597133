"""As much of a Weights & Biases server as one run needs."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class WandbServer:
    """A server on this machine; a context manager."""

    def __init__(self, run_id: str) -> None:
        self.history: list[str] = []
        """The lines it was sent."""
        self.artifacts: list[tuple[str, str]] = []
        """Type and name of each artifact."""
        self._run_id = run_id
        self._begun = False
        self._summary = "{}"
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_PUT(self) -> None:
                self._read()
                self._answer({})

            def do_POST(self) -> None:
                self._answer(outer._answer(self.path, json.loads(self._read())))

            def _read(self) -> bytes:
                return self.rfile.read(int(self.headers["Content-Length"]))

            def _answer(self, answer: dict[str, Any]) -> None:
                content = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                if not isinstance(sys.exception(), ConnectionError):  # its client may leave when it pleases
                    super().handle_error(request, client_address)

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path != "/graphql":
            files = body.get("files") or {}
            self.history += files.get("wandb-history.jsonl", {}).get("content", [])
            for content in files.get("wandb-summary.json", {}).get("content", []):
                self._summary = content
            return {"exitcode": None, "limits": {}}
        name = body["query"].split("(")[0].split()[1]
        return {"data": self._graphql(name, body.get("variables") or {})}

    def _graphql(self, name: str, asked: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "P", "name": "circles", "entity": {"id": "E", "name": "me"}}
        bucket = {
            "id": "B",
            "name": self._run_id,
            "displayName": "x",
            "config": "{}",
            "historyLineCount": len(self.history),
        }
        if name == "RunResumeStatus":
            tail = {"historyTail": json.dumps(self.history[-1:]), "eventsTail": "[]", "wandbConfig": '{"t": 1}'}
            counts = {"logLineCount": 0, "eventsLineCount": 0, "summaryMetrics": self._summary, "tags": []}
            return {"model": {**project, "bucket": {**bucket, **tail, **counts}} if self._begun else None}
        if name == "UpsertBucket":
            inserted, self._begun = not self._begun, True
            return {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": inserted}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload/{file}"} for file in asked["files"]]
            return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}
        if name == "CreateArtifact":
            wanted = asked["input"]
            self.artifacts.append((wanted["artifactTypeName"], wanted["artifactCollectionName"]))
            sequence = {"latestArtifact": {"id": "A"}}
            return {"createArtifact": {"artifact": {"id": "A", "state": "COMMITTED", "artifactSequence": sequence}}}
        others: dict[str, dict[str, Any]] = {
            "Viewer": {"viewer": {"id": "V", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}},
            "ServerFeaturesQuery": {"serverInfo": {"features": []}},
            "ArtifactType": {"project": None},
        }
        return others.get(name, {})
