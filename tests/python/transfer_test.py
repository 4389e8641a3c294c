"""Files of adapters through connections that break, with threads and with asyncio; service_test.py has what goes well.

Usage: transfer_test.py [unittest arguments], with the installed package on PYTHONPATH.
"""
import asyncio
import hashlib
import io
import pathlib
import tempfile
import threading
import time
import unittest


import refocus
from client_test import UNAVAILABLE, Asyncio, Threads
from fake_server import FakeServer, fail
from refocus.v1 import context_pb2

CONTENT = bytes(range(256)) * 5000
FILE = CONTENT + hashlib.sha256(CONTENT).digest()
Piece = context_pb2.ExportAdapterResponse


def exported(data=FILE, total=len(FILE), pieces=5):
    size = -(-len(data) // pieces)
    for at in range(0, len(data), size):
        yield Piece(data=data[at:at + size], total_bytes=total if at == 0 else 0)


def breaks_off(request, context):
    yield from list(exported())[:3]
    fail(context, UNAVAILABLE, "WORKER_LOST", retry_after=0.01)


def imported(requests, context):
    header, *pieces, finish = requests
    assert finish.HasField("finish")
    data = b"".join(piece.data for piece in pieces)
    return context_pb2.Adapter(id=header.header.adapter_id or "inside", steps=len(data))


def refused(requests, context):
    next(requests)
    fail(context, UNAVAILABLE)


class Transfers:
    def setUp(self):
        self.server = FakeServer()
        self.make(timeout=10, read_timeout=5)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = pathlib.Path(folder.name) / "a.adapter"

    def tearDown(self):
        self.close()
        self.server.stop()

    def left(self):
        return sorted(path.name for path in self.path.parent.iterdir())

    def test_an_export_begins_anew(self):
        self.server.on["ExportAdapter"] = [breaks_off, breaks_off, lambda *_: exported()]
        self.do(lambda client: client.context("a").export_adapter(self.path, "x"))
        self.assertEqual(FILE, self.path.read_bytes())
        self.assertEqual(["a.adapter"], self.left())
        self.assertEqual([("contexts/a", "x")] * 3,
                         [(request.name, request.adapter_id) for request in self.server.named("ExportAdapter")])
        self.server.calls.clear()
        self.assertEqual(FILE, self.do(lambda client: client.context("a").adapter_bytes("x")))

    def test_but_not_for_ever(self):
        self.server.on["ExportAdapter"] = breaks_off
        with self.assertRaises(refocus.UnavailableError):
            self.do(lambda client: client.context("a").export_adapter(self.path))
        self.assertEqual(4, len(self.server.calls))
        self.assertEqual([], self.left())

    def test_what_is_not_whole_gets_no_name(self):
        flipped = bytearray(FILE)
        flipped[1000] ^= 1
        for data, total in ((FILE[:-1], len(FILE)), (bytes(flipped), len(FILE)), (FILE, len(FILE) + 1), (b"", 0)):
            self.path.write_bytes(b"before")
            self.server.on["ExportAdapter"] = lambda *_: exported(data, total) if data else iter([])
            with self.assertRaises(refocus.DataLossError) as caught:
                self.do(lambda client: client.context("a").export_adapter(self.path))
            self.assertEqual("RESULTS_MISSING", caught.exception.reason)
            with self.assertRaises(refocus.DataLossError):
                self.do(lambda client: client.context("a").adapter_bytes())
            self.assertEqual((b"before", ["a.adapter"]), (self.path.read_bytes(), self.left()))

    def test_an_import_is_sent_again(self):
        self.path.write_bytes(FILE)
        for source in (FILE, self.path, str(self.path), io.BytesIO(FILE)):
            self.server.calls.clear()
            self.server.on["ImportAdapter"] = [refused, imported]
            seen = []
            adapter = self.do(lambda client: client.context("a").import_adapter(
                source, "x", allow_other_model=True, on_progress=seen.append))
            self.assertEqual(("x", len(FILE)), (adapter.id, adapter.steps))
            self.assertEqual(("import", len(FILE)), (seen[-1].phase, seen[-1].done))
            messages = self.server.named("ImportAdapter")[-1]
            self.assertEqual(("contexts/a", True), (messages[0].header.name, messages[0].header.allow_other_model))
            self.assertLessEqual(max(len(message.data) for message in messages), 512 << 10)
        self.assertEqual("inside", self.do(lambda client: client.context("a").import_adapter(FILE)).id)

    def test_unless_it_cannot_be_read_again(self):
        class Pipe(io.BytesIO):
            def seekable(self):
                return False
        self.server.on["ImportAdapter"] = [refused, imported]
        with self.assertRaises(refocus.UnavailableError):
            self.do(lambda client: client.context("a").import_adapter(Pipe(FILE)))
        self.assertEqual(1, len(self.server.calls))
        with self.assertRaisesRegex(TypeError, "binary mode"):
            self.do(lambda client: client.context("a").import_adapter(io.StringIO("text")))


class ThreadsTransfers(Threads, Transfers, unittest.TestCase):
    pass


class AsyncioTransfers(Asyncio, Transfers, unittest.TestCase):
    def test_a_cancelled_task_leaves_nothing(self):
        began, cancelled = threading.Event(), threading.Event()

        def endless(request, context):
            context.add_callback(cancelled.set)
            yield from list(exported())[:2]
            began.set()
            while context.is_active():
                time.sleep(0.01)
        self.server.on["ExportAdapter"] = endless

        async def run():
            task = asyncio.create_task(self.client.context("a").export_adapter(self.path))
            await asyncio.to_thread(began.wait, 5)
            self.assertEqual(["a.adapter.part"], self.left())
            task.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(cancelled.wait, 5)
            for _ in range(100):
                if not self.left():
                    break
                await asyncio.sleep(0.02)
        self.loop.run_until_complete(run())
        self.assertEqual([], self.left())
        self.assertTrue(cancelled.is_set())
        self.assertEqual(1, len(self.server.calls))


if __name__ == "__main__":
    unittest.main()
