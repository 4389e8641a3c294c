"""The Python client against a server that misbehaves on command; every test runs with threads and with asyncio.

Usage: client_test.py [unittest arguments], with the installed package on PYTHONPATH.
"""
import array
import asyncio
import gc
import hashlib
import inspect
import io
import os
import pathlib
import tempfile
import threading
import time
import unittest

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own lines about connections that tests end
import grpc

import refocus
from fake_server import FakeServer, fail
from refocus.options import AdaptOptions, CreateOptions, GenerateOptions
from refocus.v1 import cluster_pb2, context_pb2, inference_pb2

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
QUICK = refocus.RetryPolicy(attempts=4, first_delay=0.01, max_delay=0.05)
Event = inference_pb2.GenerateEvent


def unavailable(request, context):
    fail(context, UNAVAILABLE, "QUEUE_FULL")


def unavailable_stream(request, context):
    fail(context, UNAVAILABLE, "QUEUE_FULL")
    yield


def answer_events(text="abc"):
    for letter in text:
        yield Event(text=letter, token_ids=[ord(letter)])
    yield Event(summary=inference_pb2.GenerateSummary(generated_tokens=len(text), request_id="r"))


def created(requests, context):
    messages = list(requests)
    return context_pb2.Context(name="contexts/" + (messages[0].header.context_id or "made"))


class Threads:
    """Runs what a test asks for with refocus.Client."""

    def make(self, **options):
        self.client = refocus.Client(self.server.address, retry=QUICK, **options)

    def close(self):
        self.client.close()

    def do(self, ask):
        return ask(self.client)

    def read(self, ask, until=lambda event: False):
        """Events of a stream up to one that ends the loop; the stream is kept."""
        stream, events = ask(self.client), []
        for event in stream:
            events.append(event)
            if until(event):
                break
        self.stream = stream
        return events

    def block(self, ask, body):
        with ask(self.client) as entered:
            body(entered)


class Asyncio:
    """The same with refocus.aio.Client. One loop for all: gRPC's poller belongs to the process."""

    loop = asyncio.new_event_loop()

    def make(self, **options):
        async def client():
            return refocus.aio.Client(self.server.address, retry=QUICK, **options)
        self.client = self.loop.run_until_complete(client())

    def close(self):
        self.loop.run_until_complete(self.client.close())

    def do(self, ask):
        return self.loop.run_until_complete(ask(self.client))

    def read(self, ask, until=lambda event: False):
        async def run():
            stream, events = ask(self.client), []
            async for event in stream:
                events.append(event)
                if until(event):
                    break
            self.stream = stream
            await asyncio.sleep(0.05)
            return events
        return self.loop.run_until_complete(run())

    def block(self, ask, body):
        async def run():
            entered = ask(self.client)
            async with (await entered if inspect.isawaitable(entered) else entered) as inside:
                body(inside)
        self.loop.run_until_complete(run())


class Tests:
    def setUp(self):
        self.server = FakeServer()
        self.make(timeout=10, read_timeout=5)

    def tearDown(self):
        self.close()
        self.server.stop()

    # ---- Errors and retries.

    def test_an_error_has_reason_and_metadata(self):
        self.server.on["GetContext"] = lambda request, context: fail(
            context, grpc.StatusCode.NOT_FOUND, "CONTEXT_NOT_FOUND", "no such context", {"name": request.name})
        with self.assertRaises(refocus.NotFoundError) as caught:
            self.do(lambda client: client.context("emma").info())
        error = caught.exception
        self.assertEqual(("CONTEXT_NOT_FOUND", {"name": "contexts/emma"}, None, grpc.StatusCode.NOT_FOUND),
                         (error.reason, error.metadata, error.retry_after, error.code))
        self.assertEqual("no such context [CONTEXT_NOT_FOUND]", str(error))
        self.assertIsInstance(error, refocus.RefocusError)
        self.assertEqual(1, len(self.server.calls))

    def test_unavailable_is_tried_again(self):
        self.server.on["GetModel"] = [unavailable, unavailable, lambda *_: cluster_pb2.Model(name="tiny")]
        self.assertEqual("tiny", self.do(lambda client: client.model()).name)
        self.assertEqual(3, len(self.server.calls))

    def test_but_not_for_ever(self):
        self.server.on["GetModel"] = unavailable
        with self.assertRaises(refocus.UnavailableError) as caught:
            self.do(lambda client: client.model())
        self.assertEqual("QUEUE_FULL", caught.exception.reason)
        self.assertEqual(QUICK.attempts, len(self.server.calls))

    def test_nobody_listens(self):
        self.server.stop()
        with self.assertRaises(refocus.UnavailableError) as caught:
            self.do(lambda client: client.model())
        self.assertEqual("", caught.exception.reason)

    def test_exhausted_resources_only_with_a_time(self):
        full = lambda after: lambda request, context: fail(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "KV_CAPACITY",
                                                            retry_after=after)
        self.server.on["GetModel"] = [full(0.2), lambda *_: cluster_pb2.Model(name="tiny")]
        begin = time.monotonic()
        self.assertEqual("tiny", self.do(lambda client: client.model()).name)
        self.assertGreaterEqual(time.monotonic() - begin, 0.2)
        self.server.on["GetModel"] = full(None)
        self.server.calls.clear()
        with self.assertRaises(refocus.ResourceExhaustedError):
            self.do(lambda client: client.model())
        self.assertEqual(1, len(self.server.calls))

    def test_no_wait_beyond_the_deadline(self):
        self.server.on["GetModel"] = lambda request, context: fail(context, UNAVAILABLE, "DRAINING", retry_after=60)
        begin = time.monotonic()
        with self.assertRaises(refocus.UnavailableError) as caught:
            self.do(lambda client: client.model())
        self.assertEqual(60, caught.exception.retry_after)
        self.assertLess(time.monotonic() - begin, 2)

    def test_deadlines(self):
        self.close()
        self.make(timeout=0.3, read_timeout=0.3)
        over = threading.Event()

        def silent(request, context):
            context.add_callback(over.set)
            over.wait(10)
            yield Event()
        self.server.on["Generate"] = silent
        self.server.on["GetModel"] = lambda *_: time.sleep(1) or cluster_pb2.Model()
        with self.assertRaises(refocus.DeadlineExceededError):
            self.do(lambda client: client.model())
        with self.assertRaises(refocus.DeadlineExceededError):
            self.do(lambda client: client.context("a").ask("q"))
        self.assertTrue(over.wait(5))

    def test_metadata_that_is_nobody_s(self):
        def odd(request, context):
            context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff\xff"), ("other", "x")))
            context.abort(grpc.StatusCode.INTERNAL, "odd")
        self.server.on["GetModel"] = odd
        with self.assertRaises(refocus.InternalError) as caught:
            self.do(lambda client: client.model())
        self.assertEqual(("odd", ""), (caught.exception.message, caught.exception.reason))

    # ---- Uploads.

    def uploaded(self, call=-1):
        """Header, content and end of an upload as the server saw it; the chunks must fit together."""
        header, *chunks, finish = self.server.named("CreateContext")[call]
        content = b""
        for message in chunks:
            piece = message.chunk.text or array.array("I", message.chunk.ids.ids).tobytes()
            unit = 1 if message.chunk.text else 4
            self.assertEqual(len(content) // unit, message.chunk.offset)
            self.assertLessEqual(len(piece), 512 << 10)
            content += piece
            total = len(content) // unit
        self.assertEqual(total, finish.finish.total)
        self.assertEqual(hashlib.sha256(content).digest(), finish.finish.sha256)
        return header.header, content, len(chunks)

    def test_uploads_of_every_kind(self):
        self.server.on["CreateContext"] = created
        text = "caf\u00e9 " * 200_000
        data = text.encode()
        ids = list(range(300_000))
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "text"
            path.write_bytes(data)
            for source, want in ((text, data), (data, data), (path, data), (io.BytesIO(data), data),
                                 (ids, array.array("I", ids).tobytes()), ("short", b"short")):
                seen = []
                context = self.do(lambda client: client.create(source, "emma", prefill=False, on_progress=seen.append,
                                                               labels={"a": "b"}, ttl=90.5))
                header, content, chunks = self.uploaded()
                self.assertEqual(want, content)
                self.assertEqual((chunks, "contexts/emma", "emma", {"a": "b"}, 90, 500_000_000),
                                 (-(-len(want) // (512 << 10)), context.name, header.context_id, dict(header.labels),
                                  header.ttl.seconds, header.ttl.nanos))
                self.assertEqual(chunks, len(seen))
                self.assertEqual("upload", seen[-1].phase)

    def test_an_upload_is_repeated_as_a_whole_under_one_id(self):
        def breaks(requests, context):
            next(requests)
            fail(context, UNAVAILABLE)
        self.server.on["CreateContext"] = [breaks, created]
        file = io.BytesIO(b"skipped" + b"x" * (3 << 20))
        file.seek(7)
        self.do(lambda client: client.create(file, prefill=False))
        first, second = self.server.named("CreateContext")
        self.assertEqual(b"x" * (3 << 20), self.uploaded()[1])
        self.assertEqual(first[0].header.request_id, second[0].header.request_id)
        self.assertTrue(first[0].header.request_id)

    def test_what_cannot_be_read_again_is_not_sent_again(self):
        class Pipe(io.BytesIO):
            def seekable(self):
                return False
        self.server.on["CreateContext"] = [lambda requests, context: list(requests) and fail(context, UNAVAILABLE),
                                           created]
        with self.assertRaises(refocus.UnavailableError):
            self.do(lambda client: client.create(Pipe(b"text"), prefill=False))
        self.assertEqual(1, len(self.server.named("CreateContext")))

    def test_a_source_s_own_error_comes_through(self):
        class Broken(io.BytesIO):
            def read(self, *_):
                raise OSError("the disk is gone")
        self.server.on["CreateContext"] = created
        with self.assertRaisesRegex(OSError, "the disk is gone"):
            self.do(lambda client: client.create(Broken(), prefill=False))
        with self.assertRaises(FileNotFoundError):
            self.do(lambda client: client.create(pathlib.Path("/nonexistent/text"), prefill=False))

    def test_create_prefills_and_keeps_the_upload(self):
        def prefill(request, context):
            yield context_pb2.PrefillEvent(prefilled_tokens=5, total_tokens=10, tokens_per_second=2, eta_seconds=2.5)
            yield context_pb2.PrefillEvent(prefilled_tokens=10, total_tokens=10, context=context_pb2.Context())
        self.server.on.update(CreateContext=created, PrefillContext=prefill)
        seen = []
        self.do(lambda client: client.create("text", on_progress=seen.append))
        self.assertEqual([("upload", 4, 4), ("prefill", 5, 10), ("prefill", 10, 10)],
                         [(p.phase, p.done, p.total) for p in seen])
        self.assertEqual((2.0, 2.5), (seen[1].rate, seen[1].eta))
        self.server.on["PrefillContext"] = lambda request, context: fail(
            context, grpc.StatusCode.RESOURCE_EXHAUSTED, "KV_CAPACITY")
        with self.assertRaises(refocus.ResourceExhaustedError) as caught:
            self.do(lambda client: client.create("text", "kept"))
        self.assertIn("contexts/kept was uploaded", caught.exception.__notes__[0])

    # ---- Streams.

    def test_tokens_come_one_by_one(self):
        read = threading.Semaphore(0)

        def stepwise(request, context):
            for event in answer_events():
                yield event
                if event.text:
                    self.assertTrue(read.acquire(timeout=5), "the event before was not delivered")
        self.server.on["Generate"] = stepwise
        events = self.read(lambda client: client.context("a").generate("q", adapter="default", max_tokens=7),
                           until=lambda event: read.release())
        self.assertEqual(["a", "b", "c", ""], [event.text for event in events])
        request, = self.server.named("Generate")
        self.assertEqual(("contexts/a", "default", b"q", 7),
                         (request.name, request.adapter_id, request.prompt.text, request.max_tokens))
        self.assertFalse(request.HasField("temperature"))

    def test_a_whole_answer(self):
        self.server.on["Generate"] = lambda *_: answer_events("caf\u00e9")
        answer = self.do(lambda client: client.context("a").ask([1, 2], chat=None))
        self.assertEqual(("caf\u00e9", 4, "r"), (answer.text, len(answer.token_ids), answer.summary.request_id))
        self.do(lambda client: client.context("a").ask(chat="Who?"))
        ids, chat = self.server.named("Generate")
        self.assertEqual([1, 2], list(ids.prompt.ids.ids))
        self.assertEqual((b"\n\nWho?", False), (chat.chat.question, chat.HasField("prompt")))

    def test_conversations(self):
        self.server.on["CreateContext"] = created
        self.server.on["Generate"] = lambda *_: iter([Event(reasoning="caf", token_ids=[1]), Event(reasoning="\u00e9"),
                                                      Event(text="A", summary=inference_pb2.GenerateSummary())])
        self.server.on["Score"] = lambda requests, _: (inference_pb2.ScoreEvent(target_id=r.target_id) for r in requests)
        self.do(lambda client: client.create("text", prefill=False, prologue=refocus.prologue("caf\u00e9", user=b"U")))
        self.do(lambda client: client.create("text", prefill=False, prologue=refocus.prologue(date="1 May 2026")))
        told, default = [messages[0].header.prologue for messages in self.server.named("CreateContext")]
        self.assertEqual(("caf\u00e9".encode(), b"U", ""), (told.system, told.user, told.date))
        self.assertEqual((False, b"", "1 May 2026"), (default.HasField("system"), default.user, default.date))

        first = refocus.chat("Who?", thinking=False)
        second = refocus.chat("And \u00e9?", [("Who?", "Anne."), (b"Where?", b"Bath.")], thinking_budget=9, gap="\n",
                              allow_special=True)
        answer = self.do(lambda client: client.context("a").ask(chat=first))
        self.assertEqual(("caf\u00e9", "A"), (answer.reasoning, answer.text))
        self.do(lambda client: client.context("a").ask(chat=second))
        one, two = [request.chat for request in self.server.named("Generate")]
        self.assertEqual((b"\n\nWho?", [], False, False), (one.question, list(one.earlier), one.thinking,
                                                            one.HasField("thinking_budget")))
        self.assertTrue(one.HasField("thinking") and not two.HasField("thinking"))
        self.assertEqual(("And \u00e9?".encode(), 9, True), (two.question, two.thinking_budget, two.allow_special))
        self.assertEqual([(b"\nWho?", b"Anne."), (b"Where?", b"Bath.")],
                         [(exchange.question, exchange.answer) for exchange in two.earlier])

        self.do(lambda client: client.context("a").score(["x", "y"], chat=b"Who?"))
        requests, = self.server.named("Score")
        self.assertEqual([(b"\n\nWho?", b"x", False), (b"\n\nWho?", b"y", False)],
                         [(r.chat.question, r.target.text, r.HasField("prompt")) for r in requests])

    def test_samples_are_told_apart(self):
        def mixed(request, context):
            for letter in "ab":
                for sample in range(request.n):
                    yield Event(sample=sample, text=letter * (sample + 1), prompt_logprobs=[-1.5] * (sample == 0),
                                prompt_best=[{"id": 7}] * (sample == 0))
            for sample in (1, 0):
                yield Event(sample=sample, summary=inference_pb2.GenerateSummary(seed=sample))
        self.server.on["Generate"] = mixed
        answers = self.do(lambda client: client.context("a").generate(
            "q", n=2, temperature=1.0, logit_bias={5: -1.0}).answers())
        self.assertEqual([("ab", 0), ("aabb", 1)], [(answer.text, answer.summary.seed) for answer in answers])
        self.assertEqual([-1.5, -1.5], answers[0].prompt_logprobs)
        self.assertEqual([[7, 7], []], [[best.id for best in answer.prompt_best] for answer in answers])
        self.assertEqual({5: -1.0}, dict(self.server.named("Generate")[0].logit_bias))
        with self.assertRaises(refocus.DataLossError):
            self.server.on["Generate"] = lambda *_: iter([Event(summary={})])
            self.do(lambda client: client.context("a").generate("q", n=2).answers())

    def test_how_tokens_are_drawn(self):
        knobs = GenerateOptions(
            temperature=0.75, seed=2**64 - 1, top_k=40, top_p=0.5, min_p=0.25, repetition_penalty=1.5,
            presence_penalty=-0.5, frequency_penalty=0.125, logit_bias={7: -2.5, 9: 1.0}, min_tokens=3, max_tokens=5,
            stop=["x"], stop_token_ids=[4], ignore_eos=True, logprobs=2, prompt_logprobs=True)
        self.server.on["Generate"] = lambda *_: answer_events()
        self.do(lambda client: client.context("a").ask("q", **knobs))
        self.do(lambda client: client.context("a").ask("q", top_k=0, top_p=0.0))
        full, zeros = self.server.named("Generate")
        for name, value in knobs.items():
            got = getattr(full, name)
            self.assertEqual(value, type(value)(got), name)
        # What is set to zero is sent (and judged by the server); what is left out is not.
        self.assertEqual([True, True, False], [zeros.HasField(name) for name in ("top_k", "top_p", "min_p")])

    def test_a_break_cancels(self):
        cancelled = threading.Event()

        def endless(request, context):
            context.add_callback(cancelled.set)
            while context.is_active():
                yield Event(text="x")
                time.sleep(0.01)
        self.server.on["Generate"] = endless
        events = self.read(lambda client: client.context("a").generate("q"), until=lambda event: True)
        gc.collect()
        self.assertEqual(1, len(events))
        self.assertTrue(cancelled.wait(5), "the server still works for a caller who left the loop")

    def test_the_end_of_a_block_cancels(self):
        cancelled = threading.Event()

        def endless(request, context):
            context.add_callback(cancelled.set)
            while context.is_active():
                yield Event(text="x")
                time.sleep(0.01)
        self.server.on["Generate"] = endless
        held = []

        if isinstance(self, Asyncio):
            async def run():
                async with self.client.context("a").generate("q") as stream:
                    held.append(stream)
                    self.assertEqual("x", (await stream._events.__anext__()).text)
            self.loop.run_until_complete(run())
        else:
            with self.client.context("a").generate("q") as stream:
                held.append(stream)
                self.assertEqual("x", next(stream._events).text)
        self.assertTrue(cancelled.wait(5))

    def test_an_answer_that_did_not_begin_is_asked_for_again(self):
        self.server.on["Generate"] = [unavailable_stream, lambda *_: answer_events()]
        self.assertEqual("abc", self.do(lambda client: client.context("a").ask("q")).text)

    def test_a_half_answer_is_not(self):
        def breaks(request, context):
            yield Event(text="a")
            fail(context, UNAVAILABLE, "WORKER_LOST", retry_after=0.01)
        self.server.on["Generate"] = breaks
        with self.assertRaises(refocus.UnavailableError) as caught:
            self.do(lambda client: client.context("a").ask("q"))
        self.assertEqual("WORKER_LOST", caught.exception.reason)
        self.assertEqual(1, len(self.server.calls))

    def test_streams_that_end_too_early(self):
        self.server.on.update(
            Generate=lambda *_: iter([Event(text="a")]), PrefillContext=lambda *_: iter([context_pb2.PrefillEvent()]),
            AdaptContext=lambda *_: iter([context_pb2.AdaptEvent(effective={})]),
            Score=lambda requests, context: iter([inference_pb2.ScoreEvent()]), ProbeAttention=lambda *_: iter([]))
        for ask in (lambda c: c.ask("q"), lambda c: c.prefill(), lambda c: c.adapt(), lambda c: c.score(["a", "b"]),
                    lambda c: c.probe([(0, 1)])):
            with self.assertRaises(refocus.DataLossError) as caught:
                self.do(lambda client: ask(client.context("a")))
            self.assertEqual("RESULTS_MISSING", caught.exception.reason)

    def test_an_adaptation_is_attached_to(self):
        def events(last, end):
            adapt = context_pb2.AdaptEvent
            yield adapt(effective=adapt.Effective(steps=4))
            yield adapt(probe_loss_before=2.0)
            for step in range(1, last + 1):
                yield adapt(step=adapt.Step(step=step, loss=1 / step))
                if step % 2 == 0:
                    yield adapt(probe=adapt.Probe(step=step, loss=step))
            if end:
                yield adapt(probe_loss_after=1.5)
                yield adapt(adapter=context_pb2.Adapter(id="default", revision=1))

        def breaks(request, context):
            yield from events(2, False)
            fail(context, UNAVAILABLE)
        self.server.on["AdaptContext"] = [breaks, unavailable_stream, lambda *_: events(4, True)]
        seen = []
        done = self.do(lambda client: client.context("a").adapt(steps=4, on_progress=seen.append))
        self.assertEqual([1, 2, 3, 4], [step.step for step in done.steps])
        self.assertEqual([2, 4], [probe.step for probe in done.probes])
        self.assertEqual([(1, 4, 1.0), (2, 4, 0.5), (3, 4, 1 / 3), (4, 4, 0.25)],
                         [(p.done, p.total, p.loss) for p in seen])
        self.assertEqual((2.0, 1.5, 1), (done.probe_loss_before, done.probe_loss_after, done.adapter.revision))
        first, second, third = self.server.named("AdaptContext")
        self.assertEqual(1, len({first.request_id, second.request_id, third.request_id}))
        self.assertEqual((4, "default", context_pb2.CANCEL), (first.steps, first.adapter_id, first.on_disconnect))
        self.assertFalse(first.HasField("learning_rate"))

    def test_only_missing_scores_are_asked_for_again(self):
        def answer(requests, context, count):
            for request, _ in zip(requests, range(count)):
                yield inference_pb2.ScoreEvent(target_id=request.target_id, sum_logprob=-len(request.target.text))
            if count == 2:
                fail(context, UNAVAILABLE)
        self.server.on["Score"] = [lambda r, c: answer(r, c, 2), lambda r, c: answer(r, c, 99)]
        results = self.do(lambda client: client.context("a").score(["a", "bb", "ccc", "dddd"], prompt="p"))
        self.assertEqual([-1, -2, -3, -4], [result.sum_logprob for result in results])
        again = self.server.named("Score")[1]
        self.assertEqual([b"ccc", b"dddd"], [request.target.text for request in again])
        self.assertEqual(b"p", again[0].prompt.text)
        self.assertEqual([], self.do(lambda client: client.context("a").score([])))

    def test_probe_puts_pieces_together(self):
        def masses(rows, layer):
            return [row + layer / 10 + part / 100 for row in rows for part in (0, 1, 2)]

        def answer(request, context):
            for rows in ([10, 11], [12]):
                for layer in (0, 3):
                    yield inference_pb2.ProbeAttentionEvent(layer=layer, positions=rows, row_count=len(rows),
                                                            mass=masses(rows, layer))
            yield inference_pb2.ProbeAttentionEvent(
                summary=inference_pb2.ProbeAttentionSummary(layers=[0, 3], heads=[5], rows=3))

        def breaks(request, context):
            yield next(answer(request, context))
            fail(context, UNAVAILABLE)
        self.server.on["ProbeAttention"] = [breaks, answer]
        got = self.do(lambda client: client.context("a").probe([(0, 4), (4, 9), (2, 2)], "q", layers=[3, 0], heads=[5]))
        self.assertEqual(((2, 3, 3, 1), [0, 3], [10, 11, 12], [5]), (got.shape, got.layers, got.positions, got.heads))
        self.assertAlmostEqual(12.31, got.at(1, 2, 1), places=5)
        self.assertAlmostEqual(10.02, got.at(0, 0, 2, 0), places=5)
        self.assertEqual([(0, 4), (4, 9), (2, 2)], got.ranges)
        with self.assertRaises(IndexError):
            got.at(2, 0, 0)

    # ---- The rest.

    def test_all_pages_of_a_list(self):
        pages = {"": (["contexts/a", "contexts/b"], "2"), "2": (["contexts/c"], "")}
        self.server.on["ListContexts"] = lambda request, context: context_pb2.ListContextsResponse(
            contexts=[context_pb2.Context(name=name) for name in pages[request.page_token][0]],
            next_page_token=pages[request.page_token][1])
        self.assertEqual(["contexts/a", "contexts/b", "contexts/c"],
                         [context.name for context in self.do(lambda client: client.contexts())])

    def test_a_block_deletes_its_context(self):
        self.server.on.update(CreateContext=created,
                              DeleteContext=[unavailable, lambda *_: context_pb2.DeleteContextResponse()])
        with self.assertRaises(ZeroDivisionError):
            self.block(lambda client: client.create("text", "a", prefill=False), lambda context: 1 / 0)
        first, second = self.server.named("DeleteContext")
        self.assertEqual(("contexts/a", True, True), (first.name, first.force, second.allow_missing))
        self.do(lambda client: client.context("a").delete())
        self.assertFalse(self.server.named("DeleteContext")[-1].allow_missing)

    def test_a_repeated_delete_may_find_nothing(self):
        self.server.on["DeleteContext"] = [unavailable, lambda *_: context_pb2.DeleteContextResponse()]
        self.do(lambda client: client.context("a").delete())
        self.assertEqual([False, True], [request.allow_missing for request in self.server.named("DeleteContext")])

    def test_waiting_for_the_group(self):
        states = cluster_pb2.GetClusterResponse
        self.server.on["GetCluster"] = [unavailable, lambda *_: states(state=states.FORMING),
                                        lambda *_: states(state=states.SERVING)]
        self.do(lambda client: client.wait_until_serving(5))
        self.server.on["GetCluster"] = lambda *_: states(state=states.WAITING)
        with self.assertRaises(refocus.UnavailableError):
            self.do(lambda client: client.wait_until_serving(0.3))

    def test_tokens(self):
        self.server.on.update(
            Tokenize=lambda request, _: inference_pb2.TokenizeResponse(ids=request.text),
            Detokenize=lambda request, _: inference_pb2.DetokenizeResponse(text=str(list(request.ids))),
            DeleteAdapter=lambda *_: context_pb2.DeleteAdapterResponse())
        self.assertEqual([195, 169], self.do(lambda client: client.tokenize("\u00e9", add_bos=True)))
        self.assertEqual("[1, 2]", self.do(lambda client: client.detokenize([1, 2])))
        self.do(lambda client: client.context("contexts/a").delete_adapter("x"))
        self.assertTrue(self.server.named("Tokenize")[0].add_bos)
        self.assertEqual(("contexts/a", "x"), (self.server.calls[-1][1].name, self.server.calls[-1][1].adapter_id))


class ThreadsTest(Threads, Tests, unittest.TestCase):
    pass


class AsyncioTest(Asyncio, Tests, unittest.TestCase):
    def test_a_cancelled_task_cancels_its_call(self):
        began, cancelled = threading.Event(), threading.Event()

        def endless(request, context):
            context.add_callback(cancelled.set)
            began.set()
            while context.is_active():
                time.sleep(0.01)
            yield Event()
        self.server.on.update(Generate=endless, Score=endless)

        async def run(ask):
            task = asyncio.create_task(ask)
            await asyncio.to_thread(began.wait, 5)
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task
        for ask in (lambda context: context.ask("q"), lambda context: context.score(["a"] * 1000)):
            began.clear()
            cancelled.clear()
            self.loop.run_until_complete(run(ask(self.client.context("a"))))
            self.assertTrue(cancelled.wait(5))
        self.assertEqual(2, len(self.server.calls))


class Surface(unittest.TestCase):
    def public(self, kind):
        return {name: inspect.signature(member) for name, member in vars(kind).items()
                if not name.startswith("_") and callable(member)}

    def test_both_clients_offer_the_same(self):
        for ours, theirs in ((refocus.Client, refocus.aio.Client), (refocus.Context, refocus.aio.Context),
                             (refocus.AnswerStream, refocus.aio.AnswerStream)):
            self.assertEqual({name: list(s.parameters) for name, s in self.public(ours).items()},
                             {name: list(s.parameters) for name, s in self.public(theirs).items()})

    def test_every_field_of_a_request_can_be_set(self):
        """Fails when the API has a field that the package does not know: add it to the options, or to a parameter."""
        generate, adapt, create = inference_pb2.GenerateRequest, context_pb2.AdaptContextRequest, \
            context_pb2.CreateContextRequest.Header
        for options, message, parameters in (
                (GenerateOptions, generate, {"name", "adapter_id", "prompt", "chat"}),
                (AdaptOptions, adapt, {"name", "adapter_id", "on_disconnect", "uniform"}),
                (CreateOptions, create, {"context_id", "ttl"})):
            self.assertEqual({field.name for field in message.DESCRIPTOR.fields} - parameters,
                             set(options.__annotations__), message.DESCRIPTOR.full_name)
        score = {field.name for field in inference_pb2.ScoreRequest.DESCRIPTOR.fields}
        self.assertEqual({"name", "adapter_id", "prompt", "target", "token_logprobs", "target_id", "chat"}, score)
        probe = {field.name for field in inference_pb2.ProbeAttentionRequest.DESCRIPTOR.fields}
        parameters = set(self.public(refocus.Context)["probe"].parameters)
        self.assertEqual({"name", "adapter_id"}, probe - parameters)


if __name__ == "__main__":
    unittest.main()
