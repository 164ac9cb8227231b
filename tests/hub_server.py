# Copyright 2026 The transformers_ddl team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""A Hugging Face Hub on loopback: what `huggingface_hub` calls to upload a model over HTTP and to download it again."""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


TOKENS = {"hf_writer": ("user", "write"), "hf_reader": ("user", "read")}
LICENSES = {"apache-2.0", "mit", "other"}


class LoopbackHub(ThreadingHTTPServer):
    """
    Repositories of one user. A context manager that serves in a thread.

    Attributes:
        repositories: By name: `private` and `commits`, the list of all files after each commit, `{path: bytes}`.
        objects: Large files by their SHA-256.
        uploads_to_break: Uploads of large files whose connection is to be dropped half-way.
        seen: Number of requests by method and what was asked for.
        not_understood: Requests for anything that this Hub does not know.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories = {}
        self.objects = {}
        self.uploads_to_break = 0
        self.seen = Counter()
        self.not_understood = []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def files(self, repository: str) -> dict[str, bytes]:
        """The files of a repository after its last commit."""
        commits = self.repositories[repository]["commits"]
        return commits[-1] if commits else {}

    def sha(self, repository: str) -> str:
        return f"{len(self.repositories[repository]['commits']):040x}"

    def handle_error(self, request, client_address):
        """Connections end without notice here, at both ends."""


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    routes = [
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>\w+)", "preupload"),
        ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/objects/(?P<oid>\w+)", "upload"),
        ("POST", r"/objects/(?P<oid>\w+)/verify", "verify"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>\w+)", "commit"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)(/revision/(?P<revision>\w+))?", "info"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/auth-check/write", "auth_check"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>\w+)(/(?P<path>.+))?", "tree"),
        ("GET|HEAD", r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>\w+)/(?P<path>.+)", "resolve"),
    ]

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        for methods, pattern, name in self.routes:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split("|"):
                self.server.seen[f"{self.command} {name}"] += 1
                self.content = b"" if name == "upload" else self.body()
                try:
                    getattr(self, name)(**match.groupdict())
                except Refusal as refusal:
                    headers = {"X-Error-Message": str(refusal)} | (
                        {"X-Error-Code": refusal.code} if refusal.code else {}
                    )
                    self.answer({"error": str(refusal)}, refusal.status, headers)
                return
        self.server.not_understood.append(f"{self.command} {path}")
        self.answer({"error": "not found"}, 404)

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args):
        pass

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, content: dict | list | bytes, status: int = 200, headers: dict[str, str] | None = None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # ---- Who asks, and for what ----

    def user(self, name: str | None = None, right: str = "write") -> str:
        """The user, who must have a right to the repositories of `name`'s owner."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in TOKENS:
            raise Refusal(
                401, "Invalid credentials in Authorization header" if token else "Invalid username or password."
            )
        user, rights = TOKENS[token]
        if right == "write" and (rights != "write" or (name or user).split("/")[0] != user):
            raise Refusal(403, "You don't have the rights to write to this namespace")
        return user

    def auth_check(self, name):
        self.user(name)
        self.answer({})

    def repository(self, name: str) -> dict:
        repository = self.server.repositories.get(name)
        if repository is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if repository["private"]:
            self.user(name, "read")
        return repository

    # ---- Uploading ----

    def create(self):
        user = self.user()
        request = json.loads(self.content)
        name = f"{request.get('organization') or user}/{request['name']}"
        if name.split("/")[0] != user:
            raise Refusal(
                403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]!r}"
            )
        known = name in self.server.repositories
        private = request.get("visibility") == "private" or bool(request.get("private"))
        self.server.repositories.setdefault(name, {"private": private, "commits": []})
        self.answer({"url": f"{self.server.url}/{name}", "name": name}, 409 if known else 200)

    def validate(self):
        errors = metadata_errors(json.loads(self.content)["content"])
        content = {"errors": [{"message": error} for error in errors], "warnings": []}
        self.answer(content, 400 if errors else 200)

    def preupload(self, name, revision):
        self.user(name)
        self.repository(name)
        files = []
        for file in json.loads(self.content)["files"]:
            is_large = file["path"].endswith(".safetensors") or b"\0" in base64.b64decode(file["sample"])
            known = self.server.files(name).get(file["path"])
            if known is not None and is_large:
                oid = hashlib.sha256(known).hexdigest()
            elif known is not None:
                oid = hashlib.sha1(b"blob %d\0" % len(known) + known).hexdigest()
            files.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large else "regular",
                    "shouldIgnore": False,
                    "oid": None if known is None else oid,
                }
            )
        self.answer({"files": files})

    def batch(self, name):
        self.user(name)
        self.repository(name)
        objects = []
        for item in json.loads(self.content)["objects"]:
            if item["oid"] not in self.server.objects:
                url = f"{self.server.url}/objects/{item['oid']}"
                item["actions"] = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
            objects.append(item)
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, oid):
        if self.server.uploads_to_break:
            self.server.uploads_to_break -= 1
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            # Without lingering, closing resets the connection
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "The content is not what was announced")
        self.server.objects[oid] = content
        self.answer({})

    def verify(self, oid):
        self.user(right="read")
        size = json.loads(self.content)["size"]
        if len(self.server.objects.get(oid, b"")) != size:
            raise Refusal(400, "The content is not complete")
        self.answer({})

    def commit(self, name, revision):
        self.user(name)
        repository = self.repository(name)
        files = dict(self.server.files(name))
        for line in map(json.loads, self.content.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository["commits"].append(files)
        sha = self.server.sha(name)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"})

    # ---- Downloading ----

    def info(self, name, revision):
        private = self.repository(name)["private"]
        siblings = [{"rfilename": path} for path in self.server.files(name)]
        self.answer({"id": name, "sha": self.server.sha(name), "private": private, "siblings": siblings, "tags": []})

    def tree(self, name, revision, path):
        self.repository(name)
        files = self.server.files(name).items()
        self.answer(
            [
                {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for file, content in files
                if file.startswith(f"{path}/" if path else "")
            ]
        )

    def resolve(self, name, revision, path):
        self.repository(name)
        content = self.server.files(name).get(path)
        if content is None:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.answer(content, headers={"X-Repo-Commit": self.server.sha(name), "ETag": etag})


def metadata_errors(readme: str) -> list[str]:
    """
    What is wrong with the metadata of a model card by https://github.com/huggingface/hub-docs/blob/main/modelcard.md, in
    the Hub's own words as far as they are known.
    """
    block = re.match(r"---\n(.*?)\n---\n", readme, re.DOTALL)
    metadata = yaml.safe_load(block[1]) if block else None
    if not isinstance(metadata, dict):
        return ["empty or missing yaml metadata in repo card"]
    errors = []

    def check(field: str, value, is_valid, hint: str):
        if not is_valid(value):
            errors.append(f'"{field}" with value "{value}" is not valid. {hint}')

    def is_name(value) -> bool:
        return isinstance(value, str) and bool(re.fullmatch(r"([\w-]+/)?[\w.-]+", value))

    def is_text(value) -> bool:
        return isinstance(value, str) and bool(value)

    def listed(field: str) -> list:
        value = metadata.get(field, [])
        return value if isinstance(value, list) else [value]

    if "license" in metadata:
        check("license", metadata["license"], LICENSES.__contains__, "It must be one of those listed.")
    for index, language in enumerate(listed("language")):
        is_code = re.compile(r"[a-z]{2,3}|code|multilingual").fullmatch
        check(f"language[{index}]", language, lambda code: is_text(code) and is_code(code), "Use an ISO 639 code.")
    for index, name in enumerate(listed("datasets")):
        check(f"datasets[{index}]", name, is_name, "If possible, use a dataset id from https://hf.co/datasets.")
    for name in listed("base_model"):
        check("base_model", name, is_name, "Use a model id from https://hf.co/models.")
    for field in ("library_name", "pipeline_tag"):
        check(field, metadata.get(field, "?"), is_text, "It must be a string.")
    for field in ("tags", "metrics"):
        check(field, listed(field), lambda values: all(map(is_text, values)), "It must be a list of strings.")
    for index, model in enumerate(metadata.get("model-index", [])):
        check(f"model-index[{index}].name", model.get("name"), is_text, "It is required.")
        for number, result in enumerate(model.get("results", [])):
            field = f"model-index[{index}].results[{number}]"
            check(f"{field}.task.type", result.get("task", {}).get("type"), is_text, "It is required.")
            check(f"{field}.dataset.type", result.get("dataset", {}).get("type"), is_name, "It is required.")
            check(f"{field}.dataset.name", result.get("dataset", {}).get("name"), is_text, "It is required.")
            check(f"{field}.metrics", result.get("metrics"), bool, "It is required.")
            for metric in result.get("metrics") or []:
                check(f"{field}.metrics.type", metric.get("type"), is_text, "It is required.")
                check(
                    f"{field}.metrics.value", metric.get("value"), lambda value: value is not None, "It is required."
                )
    return errors
