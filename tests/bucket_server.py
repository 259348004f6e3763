"""`gcp-storage-emulator` with a bucket "bucket" on a free port, whose URL it prints: python -m tests.bucket_server.

Google's storage does some things that the emulator (2026.7) does not, and they are added to its handlers here:
preconditions on generations, by which tensorstore, orbax and our leases keep two writers apart; the generation in a
download's headers, without which tensorstore cannot state that precondition; and gcsfs's way to move an object.
"""

import http.server
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

MOVE = r"^/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.+)/moveTo/o/(?P<dest_object_id>.+)$"


def generation(request, storage) -> str:
    """Of the object that a request is about; "0" where it is not there."""
    name = request.params.get("object_id") or request.query["name"][0]
    try:
        return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
    except NotFound:
        return "0"


def guarded(handler):
    """The emulator's handler, called where the request's preconditions hold."""

    def handle(request, response, storage):
        wanted, unwanted = (request.query.get(f"ifGeneration{kind}", [None])[0] for kind in ("Match", "NotMatch"))
        if wanted is not None and wanted != generation(request, storage):
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif unwanted is not None and unwanted == generation(request, storage):
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            handler(request, response, storage)
            if request.method == server.GET:
                response["x-goog-generation"] = generation(request, storage)

    return handle


def move(request, response, storage) -> None:
    request.params["dest_bucket_name"] = request.params["bucket_name"]
    objects.copy(request, response, storage)
    objects.delete(request, response, storage)


def main() -> None:
    for _, handlers in server.HANDLERS:
        for method, handler in handlers.items():
            if handler in (objects.get, objects.insert, objects.download, objects.delete):
                handlers[method] = guarded(handler)
    server.HANDLERS = ((MOVE, {server.POST: move}), *server.HANDLERS)
    http.server.HTTPServer.request_queue_size = 128  # tensorstore opens dozens of connections at a time
    with server.create_server("localhost", 0, in_memory=True, default_bucket="bucket") as running:
        print(f"http://localhost:{running._api._httpd.server_port}", flush=True)
        running._api.is_running.wait()
        super(server.APIThread, running._api).join()  # its own stops it


if __name__ == "__main__":
    main()
