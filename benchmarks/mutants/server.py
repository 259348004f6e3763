"""Mutants of the reward server, its protocol and client, and of the proof of what it scores with."""

from benchmarks.mutants import Mutant

APP, BATCHER, BODIES, CONNECTIONS, ENGINE, PROTOCOL, SHAPES, WAITING = (
    f"dinalrm_jax/server/{name}.py"
    for name in ("app", "batcher", "bodies", "connections", "engine", "protocol", "shapes", "waiting")
)
CLIENT, DIGEST, FILES, TORCH = (
    f"dinalrm_jax/{name}.py" for name in ("client", "weights/digest", "weights/files", "weights/torch_file")
)


BATCHING, WIRE = "tests/server/test_batcher.py", "tests/server/test_protocol.py"  # three seconds each


def attack(name: str) -> str:
    return f"tests/server/test_attacks.py -k {name}"


def served(name: str) -> str:
    return f"tests/server/test_server.py -k {name}"


def weights(name: str) -> str:
    return f"tests/weights/test_pretrained.py -k {name}"


MUTANTS: list[Mutant] = [
    # ---------------------------------------------------------------------------------- batches
    Mutant(
        "full batches overtake a rare shape for ever",
        WAITING,
        "waited(self._max_wait) or full",
        "full",
        BATCHING,
    ),
    Mutant(
        "shapes do not take turns, older rows of a common one go first",
        WAITING,
        "min(candidates, key=lambda shape: self._last_batch.get(shape, 0))",
        "candidates[0]",
        BATCHING,
    ),
    Mutant(
        "a row that has not waited makes full batches wait",
        WAITING,
        "now - batch[0].arrived >= seconds",
        "True",
        BATCHING,
    ),
    Mutant(
        "rows of two shapes in one batch",
        WAITING,
        "by_shape.setdefault(item.row.shape, [])",
        "by_shape.setdefault(None, [])",
        BATCHING,
    ),
    Mutant(
        "the queue takes any number of rows",
        BATCHER,
        "if len(self._queue) + len(rows) > self._max_queue:",
        "if len(self._queue) > self._max_queue:",
        BATCHING,
    ),
    Mutant(
        "requests that are being read have no place in the queue",
        BATCHER,
        "taken = len(self._queue) + len(self._announced)",
        "taken = len(self._queue)",
        BATCHING,
    ),
    Mutant(
        "cancelled rows keep their place",
        BATCHER,
        "            self._queue.discard(future)",
        "            pass",
        BATCHING,
    ),
    Mutant(
        "a batch waits for bodies that cannot be here in time",
        BATCHER,
        "time.monotonic() if soon else -math.inf",
        "time.monotonic()",
        BATCHING,
    ),
    Mutant(
        "NaN is a score",
        BATCHER,
        "            if np.isfinite(score):\n                item",
        "            if True:\n                item",
        BATCHING,
    ),
    Mutant(
        "a row's own NaN is the device's fault",
        BATCHER,
        'RequestError(422, "non_finite_score", message)',
        'RequestError(500, "non_finite_score", message)',
        BATCHING,
    ),
    Mutant(
        "a device's NaN is the row's fault",
        BATCHER,
        "if np.isfinite(again):",
        "if False:",
        BATCHING,
    ),
    Mutant(
        "an error in our own code is nobody's end",
        BATCHER,
        "            self._die(error)\n            self._fail(batch, error)",
        "            self._fail(batch, error)",
        BATCHING,
    ),
    Mutant(
        "a drain drops what waits",
        BATCHER,
        "if not self._queue and self.state != READY:",
        "if self.state != READY:",
        BATCHING,
    ),
    Mutant(
        "a drain waits for weights and programs",
        BATCHER,
        "        if self._never_ready:\n            return True\n",
        "",
        BATCHING,
    ),
    Mutant(
        "a drain waits for a new shape",
        BATCHER,
        "if item.row.shape in self._new.pending], _shut_down())",
        "if False], _shut_down())",
        BATCHING,
    ),
    Mutant(
        "failed shapes are forgotten",
        SHAPES,
        "if shape in self.failed:",
        "if False:",
        BATCHING,
    ),
    Mutant(
        "any number of new shapes",
        SHAPES,
        "if self._begun == self._limit:",
        "if not self._limit:",
        BATCHING,
    ),
    Mutant(
        "any number of compilations at a time",
        SHAPES,
        "if len(self.pending) == MAX_PENDING:",
        "if False:",
        BATCHING,
    ),
    # ----------------------------------------------------------------------------------- scores
    Mutant(
        "one seed for a batch",
        ENGINE,
        "seed_key([row.seed for row in padded])",
        "seed_key([padded[0].seed for _ in padded])",
        served("scores_are_the_models"),
    ),
    Mutant(
        "one level for a batch",
        ENGINE,
        "np.array([row.sigma for row in padded], np.float32)",
        "np.array([padded[0].sigma for _ in padded], np.float32)",
        served("scores_are_the_models"),
    ),
    Mutant(
        "padding stands before the rows",
        ENGINE,
        "padded = [*rows, *(size - len(rows)) * [rows[0]]]",
        "padded = [*(size - len(rows)) * [rows[0]], *rows]",
        served("depend_on_its_batch"),
    ),
    Mutant(
        "u is not moved to the schedule",
        APP,
        "sigmas = self._sigmas[np.argmin(np.abs(self._sigmas - parsed.u[:, None]), axis=1)]",
        "sigmas = parsed.u",
        served("request_of_pytorch"),
    ),
    Mutant(
        "no deadline",
        APP,
        "async with asyncio.timeout_at(deadline):",
        "async with asyncio.timeout_at(None):",
        served("deadline_drops"),
    ),
    # --------------------------------------------------------------------------------- requests
    Mutant(
        "any key is the key",
        APP,
        'if scheme.lower() != "bearer" or not right:',
        'if scheme.lower() != "bearer":',
        served("api_key"),
    ),
    Mutant(
        "any scheme is Bearer",
        APP,
        'if scheme.lower() != "bearer" or not right:',
        "if not right:",
        served("api_key"),
    ),
    Mutant(
        "bearer is not Bearer",
        APP,
        'if scheme.lower() != "bearer" or not right:',
        'if scheme != "Bearer" or not right:',
        served("api_key"),
    ),
    Mutant(
        "401 does not say how to authenticate",
        APP,
        "if status == 401:",
        "if False:",
        served("api_key"),
    ),
    Mutant(
        "429 does not say when to come again",
        APP,
        "RETRIES = (429, 503)",
        "RETRIES = (503,)",
        attack("bounded_in_bytes"),
    ),
    Mutant(
        "503 does not say when to come again",
        APP,
        "RETRIES = (429, 503)",
        "RETRIES = (429,)",
        served("ready_means"),
    ),
    Mutant(
        "answers do not say whose scores they are",
        APP,
        "response.headers[WEIGHTS_HEADER] = self.batcher.engine.digest",
        "pass",
        served("whose_scores"),
    ),
    Mutant(
        "any version of the protocol",
        PROTOCOL,
        "if found != VERSION:",
        "if found is None:",
        served("bad_headers"),
    ),
    Mutant(
        "a second content-encoding is taken",
        PROTOCOL,
        'not in (None, "identity"):',
        'in ("gzip", "deflate"):',
        served("bad_headers"),
    ),
    Mutant(
        "a header may stand twice",
        PROTOCOL,
        "if len(values) > 1:",
        "if False:",
        attack("stand_twice"),
    ),
    Mutant("a tensor may stand twice", PROTOCOL, "if name in found:", "if False:", WIRE),
    Mutant(
        "bytes may follow the tensors",
        PROTOCOL,
        "if start + position != len(body):",
        "if False:",
        WIRE,
    ),
    Mutant("u up to 2", PROTOCOL, "(u <= 1)", "(u <= 2)", WIRE),
    Mutant("NaN may come in", PROTOCOL, "if not finite.all():", "if False:", WIRE),
    Mutant(
        "clients write control characters into the log",
        PROTOCOL,
        'return text if text.isprintable() else text.encode("unicode_escape").decode()',
        'return text.encode("utf-8", "backslashreplace").decode()',
        attack("one_line_of_a_log"),
    ),
    # ----------------------------------------------------------------------------------- bounds
    Mutant(
        "bodies take any number of bytes",
        BODIES,
        "if held > (self.limit - self.held) / 2:",
        "if held > self.limit:",
        attack("beyond_what_is_free"),
    ),
    Mutant(
        "one body may take all that is free",
        BODIES,
        "if held > (self.limit - self.held) / 2:",
        "if held > self.limit - self.held:",
        attack("bounded_in_bytes"),
    ),
    Mutant(
        "chunks are not counted",
        BODIES,
        "hold.take(end - max(position, announced))",
        "pass",
        attack("beyond_what_is_free"),
    ),
    Mutant(
        "a body may be of any announced size",
        BODIES,
        "if announced > self.largest:",
        "if False:",
        served("large_and_slow"),
    ),
    Mutant(
        "a body may be of any size that is not announced",
        BODIES,
        "if end > self.largest:",
        "if False:",
        attack("bounded_in_bytes"),
    ),
    Mutant(
        "slow bodies hold their bytes to the deadline",
        BODIES,
        "clock.reschedule(min(deadline, started + PATIENCE + position / SLOWEST))",
        "clock.reschedule(deadline)",
        attack("slow_bodies"),
    ),
    Mutant(
        "bytes are free while their rows are scored",
        APP,
        "hold.release_after(futures)",
        "hold.release()",
        attack("until_the_rows"),
    ),
    Mutant(
        "refused bodies hold their bytes for ever",
        APP,
        "            hold.release()\n            raise",
        "            raise",
        attack("bounded_in_bytes"),
    ),
    Mutant(
        "bodies are inflated before they are looked at",
        CONNECTIONS,
        "auto_decompress=False",
        "auto_decompress=True",
        attack("inflated"),
    ),
    Mutant(
        "a head may take for ever",
        CONNECTIONS,
        "call_later(HEAD_SECONDS, self.drop)",
        "call_later(100 * HEAD_SECONDS, self.drop)",
        attack("head_must_come"),
    ),
    Mutant(
        "any number of connections",
        CONNECTIONS,
        "if len(self.open) >= self.limit:",
        "if False:",
        attack("make_room"),
    ),
    Mutant(
        "faithful clients are closed first",
        CONNECTIONS,
        "next(iter(self.unproven), None) or next(iter(self.idle), None)",
        "next(iter(self.idle), None) or next(iter(self.unproven), None)",
        attack("make_room"),
    ),
    Mutant(
        "every failed accept is logged",
        CONNECTIONS,
        'elif self.throttle.admits("accept"):',
        "else:",
        attack("few_times_a_second"),
    ),
    # ----------------------------------------------------------------------------------- client
    Mutant(
        "a request that fails is a group of errors",
        CLIENT,
        "failed = errors.exceptions[0]",
        "failed = errors",
        served("bad_request_among"),
    ),
    Mutant("a proxy for this machine", CLIENT, '"trust_env": not local', '"trust_env": True', served("proxies")),
    Mutant("no proxy at all", CLIENT, '"trust_env": not local', '"trust_env": False', served("proxies")),
    Mutant(
        "an answer of too few scores",
        CLIENT,
        " and len(scores) == rows",
        "",
        served("answers_that_are_no_scores"),
    ),
    Mutant(
        "NaN in an answer is a reward",
        CLIENT,
        " and np.isfinite(scores).all()",
        "",
        served("answers_that_are_no_scores"),
    ),
    Mutant(
        "a server that is not ready is not tried again",
        CLIENT,
        "RETRIED = (408, 429, 500, 502, 503, 504)",
        "RETRIED = (408, 429, 500, 502, 504)",
        served("unready_servers"),
    ),
    # ---------------------------------------------------------------------------------- weights
    Mutant(
        "the digest rounds trained weights",
        DIGEST,
        "np.float32 if is_trainable(name) else ml_dtypes.bfloat16",
        "ml_dtypes.bfloat16",
        weights("digest"),
    ),
    Mutant(
        "the digest depends on the compute dtype",
        DIGEST,
        "np.float32 if is_trainable(name) else ml_dtypes.bfloat16",
        "np.float32",
        weights("digest"),
    ),
    Mutant("the digest forgets shapes", DIGEST, "{name} {array.shape} ", "{name} ", weights("digest")),
    Mutant("the digest forgets names", DIGEST, "{name} {array.shape} ", "{array.shape} ", weights("digest")),
    Mutant(
        "the digest reads the beginning of large arrays",
        DIGEST,
        "range(0, values.size, PART)",
        "range(0, min(values.size, PART), PART)",
        weights("digest"),
    ),
    Mutant(
        "the revision is ignored",
        FILES,
        "snapshot_download(name, revision=revision, ",
        "snapshot_download(name, ",
        weights("revision"),
    ),
    Mutant("a directory has any revision", FILES, "if revision is not None:", "if False:", weights("revision")),
    Mutant("expanded tensors are read", TORCH, "if step <= reach:", "if False:", weights("torch_files")),
    Mutant(
        "storages of no tensor are read",
        TORCH,
        "if MOST * storage.used < len(storage.values):",
        "if False:",
        weights("torch_files"),
    ),
    Mutant(
        "compressed storages are read",
        TORCH,
        "if info.compress_type != zipfile.ZIP_STORED:",
        "if False:",
        weights("torch_files"),
    ),
    Mutant(
        "any number of tensors of one storage",
        TORCH,
        "if storage.used > MOST * len(values):",
        "if False:",
        weights("torch_files"),
    ),
]
