"""Spans that the model quotes for each question: how they are found in the text, and what is made of them.

Usage: evaluate_quotes_test.py [unittest arguments], with the installed package on PYTHONPATH.
"""
import pathlib
import re
import unittest

import grpc

from evaluate_run_test import Base
from refocus.evaluate import flops, methods, quotes
from refocus.evaluate.item import EvalError

TEXT = ("It was a dark night.  The Duke, who had not slept,\nwrote three letters to his brother in Ghent. "
        "The first letter was lost; the second letter was burnt. The third was read by everybody but him.\n")
SHAPE = flops.Shape(2, 8, 2, 1, 4, 16, 100)


class Quotes(unittest.TestCase):
    def found(self, quote):
        place = quotes.Places(TEXT).find(quote)
        return None if place is None else TEXT[place[0]:place[1]]

    def test_where_they_stand(self):
        self.assertEqual("It was a dark night", self.found("It was a dark night."))
        self.assertEqual("The Duke, who had not slept,\nwrote", self.found('"the duke who had not slept wrote'))
        self.assertEqual("The third was read by everybody but him",
                         self.found("The third one was read by everyone but him"))
        self.assertEqual("the second letter was", self.found("the second letter was burned"))
        self.assertEqual("wrote three letters to his brother",
                         self.found("A soldier wrote three letters to his brother from the eastern front"))
        for absent in ("The Duchess wrote no letters at all to Paris", "There is no such sentence", "", "...",
                       "was was was"):
            self.assertIsNone(self.found(absent), absent)
        self.assertIsNone(quotes.Places("").find("Something that was said"))
        self.assertEqual((4, 21), quotes.Places("Und \u0130stanbul war gro\u00df.").find("\u0130STANBUL WAR GROSS"))

    def test_lines_of_a_reply(self):
        reply = ' 1. The first letter was lost.\n- "The first letter was lost."\n\nYes.\n(2) It was a dark night.\n'
        self.assertEqual(["The first letter was lost.", '"The first letter was lost."', "It was a dark night."],
                         quotes.lines(reply))
        self.assertEqual(8, len(quotes.lines("\n".join(f"This is sentence {i}." for i in range(50)))))

    def test_the_prompt_asks_the_question_alone(self):
        asked = quotes.prompt("\n\nQuestion: Who wrote?\nAnswer: The Duke")
        self.assertTrue(asked.endswith("Do not answer the question.\nQuestion: Who wrote?\nSentences:\n"), asked)
        self.assertIn("Question: Who?\n", quotes.prompt("\nWho?"))

    def test_spans_cover_their_places_and_uniform_ones_follow(self):
        places = [(100, 110), (400, 700), (0, 3), (995, 1000), (101, 109)]
        spans = quotes.spans(places, 1000, 128, 9, 1)
        self.assertEqual(9, len(spans))
        self.assertEqual(9, len(set(spans)))
        for first, last in ((100, 110), (400, 700), (1, 3), (995, 1000)):
            for token in range(first, last):
                self.assertTrue(any(start < token <= start + rows for start, rows in spans[:6]), token)
        self.assertTrue(all(rows == 128 and 0 <= start and start + rows < 1000 for start, rows in spans))
        self.assertEqual(spans, quotes.spans(places, 1000, 128, 9, 1))
        self.assertEqual(6, len(quotes.spans(places, 1000, 128, 1, 1)), "no fewer")
        self.assertEqual([(0, 1)] * 2, quotes.spans([], 2, 128, 2, 1))
        self.assertNotEqual(quotes.spans([], 1000, 10, 8, 1), quotes.spans([], 1000, 10, 8, 2))

    def test_settings(self):
        made = methods.parse("qttt+thinking:rows=quoted,quote=64,cycle=3,steps=4,budget=9")
        self.assertEqual((True, 64, 3, 9), (made.quoted, made.quote_tokens, made.cycle, made.budget))
        self.assertNotIn("quote_tokens", made.adapt_options(1))
        self.assertNotIn("cycle", made.adapt_options(1))
        plain = methods.parse("qttt:rows=quoted")
        self.assertEqual((256, 8), (plain.quote_tokens, plain.cycle))
        self.assertEqual("qttt:lr=1e-4", methods.reference(methods.parse_all("qttt:rows=quoted,qttt:lr=1e-4")).label)
        for text, message in (("qttt:quote=9", "quote and cycle to quoted"),
                              ("qttt:rows=quoted,skip=0.5", "several rows"),
                              ("qttt:rows=recall,cycle=2", "several rows"), ("qttt:rows=quoted,cycle=0", "1 to 64"),
                              ("qttt:rows=quoted,thinking:match=flops", "no adaptation to match"),
                              ("in-context:rows=quoted", "'rows'")):
            with self.assertRaises(EvalError) as caught:
                methods.parse_all(text)
            self.assertIn(message, str(caught.exception))


class Runs(Base):
    """The made-up model quotes the line of the account that is asked about, and one that is not there."""

    def setUp(self):
        super().setUp()
        self.quote, answer = True, self.model.answer

        def said(name, adapter, asked, sample):
            if not asked.endswith("Sentences:\n"):
                return answer(name, adapter, asked, sample)
            account = re.search(r"account ([\w-]+)", asked).group(1)
            line = next(line for line in self.model.texts[name][0].splitlines() if f"Account {account} holds" in line)
            return f"- {line}\n- Nobody else owns anything here" if self.quote else "Account nobody-here owns a boat."

        self.model.answer = said

    def one(self, *arguments, method="qttt:rows=quoted,steps=3,span=16,quote=50", **options):
        return self.run_eval("--questions", "3", "--seeds", "0", *arguments, methods=method, lengths="2000", **options)

    def test_each_question_has_its_own_queries(self):
        code, output, error = self.one()
        self.assertEqual(0, code, error)
        answers, requests = self.records(), self.model.server.named("AdaptContext")
        self.assertEqual([], self.records("adapt"))
        self.assertEqual(3, len(requests))
        name, = {request.name for request in requests}
        text = next(m.chunk.text.decode() for m in self.model.server.named("CreateContext")[0] if m.HasField("chunk"))
        asked = [(request.adapter_id, request.max_tokens, prompt.endswith("Sentences:\n"))
                 for request, prompt in self.model.asked]
        self.assertEqual([("", 50, True), ("eval", 16, False)] * 3, asked, "the base queries quote, the others answer")
        for record, request in zip(answers, requests):
            adapt = record["adapt"]
            self.assertEqual((2, 1, 8, 3, 16), tuple(adapt[k] for k in ("quotes", "found", "cycle", "steps",
                                                                       "span_tokens")))
            self.assertEqual(8, len(request.explicit_spans.spans))
            self.assertEqual({16}, {span.length for span in request.explicit_spans.spans})
            account = re.search(r"- Account ([\w-]+) holds", adapt["said"]).group(1)
            begin = text.index(f"Account {account} holds")
            first = len(self.model.ids(text[:begin])) + 1  # and a BOS
            last = first + len(self.model.ids(text[begin:text.index(".", begin)]))
            span = request.explicit_spans.spans[0]
            self.assertLess(span.start, first)
            self.assertGreaterEqual(span.start + span.length, last - 1)
            self.assertEqual(4.75, adapt["seconds"], "of the steps, and of the quotes")
            tokens = adapt["quote_tokens"] + len(self.model.ids(self.model.asked[0][1]))
            self.assertEqual(flops.adapt(SHAPE, adapt["context_tokens"], 3, 16)
                             + flops.decode(SHAPE, adapt["context_tokens"], tokens), adapt["flops"])
        self.assertEqual(3, len({request.explicit_spans.spans[1].start for request in requests}), "drawn for each")
        self.assertRegex(output, r"qttt:rows=quoted\S+ +3  100.0 .* 4\.75 ")
        asked, self.model.asked = len(self.model.asked), []
        self.assertEqual(0, self.one()[0])
        self.assertEqual([], self.model.asked, "nothing is done twice")

    def test_nothing_found(self):
        self.quote = False
        self.assertEqual(0, self.one()[0])
        for record in self.records():
            self.assertEqual((1, 0, 8), tuple(record["adapt"][name] for name in ("quotes", "found", "cycle")))

    def test_what_is_refused_to_one_question_stops_no_other(self):
        calls = []

        def diverged(request):
            calls.append(request)
            return (grpc.StatusCode.ABORTED, "LOSS_DIVERGED", "probe loss rose") if len(calls) == 2 else None

        self.model.broken["AdaptContext"] = diverged
        code, _, error = self.one()
        self.assertEqual((1, 1), (code, error.count("probe loss rose")), error)
        self.assertEqual(2, len(self.records()))
        self.assertIn("probe loss rose", pathlib.Path(self.out, "report.html").read_text())
        code, _, error = self.one()
        self.assertEqual((0, 3, 4), (code, len(self.records()), len(calls)), "the missing one alone is asked again")

    def test_a_conversation(self):
        self.model.chat_format = "chatml"
        self.assertEqual(0, self.one()[0])
        self.assertTrue(self.model.asked[0][0].HasField("chat"))
        self.assertTrue(self.model.asked[0][0].chat.question.startswith(b"\n\nCopy, word for word"))
        self.assertEqual([1] * 3, [record["adapt"]["found"] for record in self.records()])

    def test_token_ids_have_no_words(self):
        for tasks in ("symbols", "ledger,symbols-later"):
            code, _, error = self.one(tasks=tasks)
            self.assertEqual((2, 1), (code, len(error.splitlines())), error)
            self.assertIn("rows=quoted,steps=3,span=16,quote=50: got token ids (symbols", error)
        self.assertEqual([], self.model.asked)
        path = str(pathlib.Path(self.folder.name, "ids.jsonl"))
        self.assertEqual(0, self.command("make", "--address", self.model.server.address, "--tasks", "symbols",
                                         "--lengths", "600", "--out", path)[0])
        code, _, error = self.one(tasks=path)
        self.assertEqual(2, code)
        self.assertIn("a model quotes words", error)


if __name__ == "__main__":
    unittest.main()
