"""The evaluation's tasks, operations, intervals and judges, without a service.

Usage: evaluate_tasks_test.py [unittest arguments], with the installed package on PYTHONPATH.
"""
import ast
import collections
import json
import math
import os
import pathlib
import re
import tempfile
import unittest

from refocus.evaluate import flops, judges, methods, score, spans, stats, tasks
from refocus.evaluate.formats import metrics
from refocus.evaluate.item import FORMAT, EvalError, read_items, to_json, write_items
from refocus.evaluate.tasks import bank, bugs, registry, ruler, words
from refocus.results import Adaptation
from refocus.v1 import context_pb2

TOKENS = re.compile(r" ?\w+|[^\w]")


def tokenize(text):
    """A stand-in for a tokenizer: words with the blank before them; ids by spelling."""
    return [hash(piece) for piece in TOKENS.findall(text)]


def count(text):
    return len(tokenize(text))


SETTINGS = tasks.Settings(count, questions=5)
TEXT_TASKS = [name for name in registry.TASKS if not name.startswith("symbols")]


class EveryTask(unittest.TestCase):
    def test_lengths_seeds_and_ids(self):
        for name in TEXT_TASKS:
            for length in (1500, 6000):
                with self.subTest(task=name, length=length):
                    made = tasks.make(name, length, 3, SETTINGS)
                    self.assertEqual(to_json(made), to_json(tasks.make(name, length, 3, SETTINGS)), "not reproducible")
                    self.assertNotEqual(made.text, tasks.make(name, length, 4, SETTINGS).text)
                    # Of RULER the whole prompt and the answer count; of the others the context.
                    ruled = made.questions[0].judge == "ruler_all"
                    tail = count(made.questions[0].prompt) + made.questions[0].max_tokens if ruled else 0
                    self.assertLessEqual(count(made.preamble + made.text) + tail, length)
                    self.assertGreater(count(made.preamble + made.text) + tail, 0.94 * length)
                    self.assertEqual(len(made.questions), len({question.id for question in made.questions}))

    def test_evidence_holds_the_answer_and_nothing_else_does(self):
        for name in ("ledger", "noisy", "niah_single_1", "niah_single_3", "niah_multikey_2", "niah_multivalue",
                     "niah_multiquery", "vt", "hops"):
            with self.subTest(task=name):
                made = tasks.make(name, 2000, 1, SETTINGS)
                for question in made.questions:
                    said = [made.text[begin:end] for begin, end in question.evidence]
                    for answer in question.answers:
                        self.assertTrue([part for part in said if answer in part], (answer, said))
                    if name != "hops" and name != "ledger":  # there, others have the same answers
                        rest = made.text
                        for begin, end in reversed(question.evidence):
                            rest = rest[:begin] + rest[end:]
                        self.assertFalse([answer for answer in question.answers if answer in rest])

    def test_a_file_brings_back_the_same(self):
        made = [tasks.make(name, 1500, 0, SETTINGS) for name in registry.TASKS]
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "tasks.jsonl")
            write_items(made, path)
            self.assertEqual(made, list(read_items(path)))

    def test_too_short(self):
        for name in registry.TASKS:
            with self.subTest(task=name), self.assertRaisesRegex(EvalError, "allowed (at least )?[0-9]+"):
                tasks.make(name, 1, 0, SETTINGS)

    def test_ruler_s_length_counts_the_answer(self):
        with self.assertRaises(EvalError) as caught:
            tasks.make("niah_single_1", 200, 0, SETTINGS)
        least = int(re.search(r"got a length of 200 tokens, allowed at least (\d+)", str(caught.exception)).group(1))
        tasks.make("niah_single_1", least, 0, SETTINGS)
        with self.assertRaises(EvalError):
            tasks.make("niah_single_1", least - 1, 0, SETTINGS)

    def test_unknown(self):
        with self.assertRaisesRegex(EvalError, "'ledgers', allowed ledger, symbols"):
            tasks.make("ledgers", 1000, 0, SETTINGS)


class TaskFiles(unittest.TestCase):
    def broken(self, change):
        value = json.loads(to_json(tasks.make("ledger", 800, 0, SETTINGS)))
        change(value)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "t.jsonl")
            path.write_text(json.dumps({"format": FORMAT}) + "\n" + json.dumps(value) + "\n")
            with self.assertRaises(EvalError) as caught:
                list(read_items(path))
        message = str(caught.exception)
        self.assertIn("t.jsonl:2", message)
        self.assertIn("allowed", message)
        self.assertNotIn("\n", message)
        return message

    def test_malformed(self):
        question = lambda name, bad: lambda v: v["questions"][0].__setitem__(name, bad)
        self.assertIn("text: got nothing", self.broken(lambda v: v.pop("text")))
        self.assertIn("text: got dict", self.broken(lambda v: v.update(text={})))
        self.assertIn("questions: got none", self.broken(lambda v: v.update(questions=[])))
        self.assertIn("judge: got 'taste'", self.broken(question("judge", "taste")))
        self.assertIn("evidence: got [0, 99999999]", self.broken(question("evidence", [[0, 99999999]])))
        self.assertIn("max_tokens: got 0", self.broken(question("max_tokens", 0)))
        self.assertIn("answers: got []", self.broken(question("answers", [])))
        self.assertIn("prompt: got list", self.broken(question("prompt", [1])))
        self.assertIn("data.rows: got None, allowed for the judge tokens", self.broken(question("judge", "tokens")))
        self.assertIn("an id twice", self.broken(lambda v: v["questions"].append(v["questions"][0])))

    def test_no_task_file(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "t.jsonl")
            for text, message in (("", "got no task file"), ("{}\n", "got no task file"),
                                  ("{\n", "t.jsonl:1: got no JSON"),
                                  (json.dumps({"format": FORMAT}) + "\n[]\n", "t.jsonl:2: got list"),
                                  (json.dumps({"format": FORMAT}) + "\n", "got no items")):
                path.write_text(text)
                with self.assertRaisesRegex(EvalError, message):
                    list(read_items(path))
            with self.assertRaisesRegex(EvalError, "cannot read"):
                list(read_items(pathlib.Path(folder, "none.jsonl")))


class Bank(unittest.TestCase):
    def test_exactly_one_rule_is_broken_where_the_answer_says(self):
        for seed in range(24):
            made = tasks.make("bank", 2500, seed, SETTINGS)
            kind, place = made.questions[0].answers
            self.assertEqual(bank.KINDS[seed % 4], kind)
            lines = made.text.splitlines()
            opening = {name: int(amount) for name, amount in re.findall(r"(acct_\w) (-?\d+)", lines[0])}
            log = []
            for line in lines[1:]:
                found = re.fullmatch(r"(TX\d+): (\w+) -> (\w+) (\d+) \| \2: (-?\d+) -> (-?\d+) "
                                     r"\| \3: (-?\d+) -> (-?\d+)", line)
                self.assertTrue(found, line)
                log.append(bank.Transfer(*found.group(1, 2, 3), *map(int, found.group(4, 5, 6, 7, 8))))
            self.assertEqual([(kind, place)], [(k, log[i].id) for k, i in bank.broken(opening, log)])
            ids = [int(transfer.id[2:]) for transfer in log]
            self.assertEqual(set(range(1, max(ids) + 1)), set(ids), "a gap gives a duplicate away")
            self.assertEqual(kind == "DUPLICATE_TXN", len(set(ids)) < len(ids))
            evidence = [made.text[begin:end] for begin, end in made.questions[0].evidence]
            self.assertTrue(evidence[-1].startswith(place + ":"))
            self.assertEqual(2 if kind in ("LOST_UPDATE", "DUPLICATE_TXN") else 1, len(evidence))

    def test_places_are_spread(self):
        depths = []
        for seed in range(40):
            made = tasks.make("bank", 2500, seed, SETTINGS)
            depths.append(made.questions[0].evidence[-1][0] / len(made.text))
        self.assertLess(min(depths), 0.2)
        self.assertGreater(max(depths), 0.8)


class Bugs(unittest.TestCase):
    def setUp(self):
        self.files = dict(bugs.sources(bugs.default_folders()))

    def test_one_line_differs_and_the_program_with_it(self):
        for seed in range(6):
            made = tasks.make("bugs", 3000, seed, SETTINGS)
            question = made.questions[0]
            (name, line), = [answer.rsplit(":L", 1) for answer in question.answers]
            begin, end = question.evidence[0]
            shown = made.text[begin:end][6:]
            original = self.files[name].splitlines()
            self.assertNotEqual(shown, original[int(line) - 1])
            changed = original.copy()
            changed[int(line) - 1] = shown
            self.assertNotEqual(ast.dump(ast.parse("\n".join(original))), ast.dump(ast.parse("\n".join(changed))))
            different, file = 0, ""
            for row in made.text.splitlines():
                if row.startswith("# ") and row[2:] in self.files:
                    file = row[2:]
                else:
                    number, code = int(row[:5]), row[6:]
                    different += self.files[file].splitlines()[number - 1] != code
            self.assertEqual(1, different)

    def test_no_leak(self):
        made = tasks.make("bugs", 3000, 1, SETTINGS)
        asked = made.preamble + made.questions[0].prompt
        for name in self.files:
            self.assertNotIn(name, asked)
        for word in sum((change for change in made.questions[0].data["changes"]), []):
            self.assertNotIn(word, asked)

    def test_the_bug_stays_while_the_text_grows(self):
        short, long = (tasks.make("bugs", length, 2, SETTINGS) for length in (3000, 20000))
        self.assertEqual(short.questions[0].answers, long.questions[0].answers)
        self.assertEqual(short.questions[0].data, long.questions[0].data)

    def test_rate(self):
        settings = tasks.Settings(count, bug_rate=1e-3)
        made = tasks.make("bugs", 5000, 0, settings)
        self.assertEqual(5, len(made.questions[0].answers))
        self.assertIn("5 lines", made.questions[0].prompt)

    def test_a_folder_without_sources(self):
        with tempfile.TemporaryDirectory() as folder, self.assertRaisesRegex(EvalError, "--code"):
            tasks.make("bugs", 5000, 0, tasks.Settings(count, code_dirs=(folder,)))


class Symbols(unittest.TestCase):
    def test_pairs(self):
        made = tasks.make("symbols", 4000, 5, SETTINGS)
        self.assertEqual(4000, len(made.text))
        held = {}
        for account, value in zip(made.text[::2], made.text[1::2]):
            self.assertTrue(257 <= account < 4353 <= value < 4609)
            self.assertEqual(value, held.setdefault(account, value), "the value of an account is fixed")
        self.assertAlmostEqual(4, 2000 / len(held), delta=0.2)
        for question in made.questions:
            self.assertEqual([held[question.prompt[0]]], question.answers)
            places = [i for i in range(0, 4000, 2) if made.text[i] == question.prompt[0]]
            self.assertEqual([(i, i + 2) for i in places], question.evidence)


    def test_later(self):
        made = tasks.make("symbols-later", 3000, 5, SETTINGS)
        question, = made.questions
        self.assertEqual((3000, 1536, "tokens"), (len(made.text), len(question.prompt), question.judge))
        both = made.text + question.prompt
        self.assertAlmostEqual(4, len(both) / 2 / len(set(both[::2])), delta=0.2)
        held = dict(zip(both[::2], both[1::2]))
        self.assertEqual([held[account] for account in both[::2]], both[1::2], "the value of an account is fixed")
        rows = question.data["rows"]
        self.assertEqual([question.prompt[row] for row in rows], question.answers)
        seen = set(made.text[::2])
        self.assertEqual([row for row in range(1, 1536, 2) if question.prompt[row - 1] in seen], rows)
        self.assertGreater(len(rows), 700)
        short = tasks.make("symbols-later", 3001, 5, tasks.Settings(count, later=200))
        self.assertEqual((3000, 200), (len(short.text), len(short.questions[0].prompt)))

    def test_later_in_a_file(self):
        value = json.loads(to_json(tasks.make("symbols-later", 512, 0, SETTINGS)))
        value["questions"][0]["data"]["rows"][-1] = 1536
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "t.jsonl")
            path.write_text(json.dumps({"format": FORMAT}) + "\n" + json.dumps(value) + "\n")
            with self.assertRaisesRegex(EvalError, r"t.jsonl:2: questions\[0\].data.rows: got .*, 0 to 1535"):
                list(read_items(path))


class Hops(unittest.TestCase):
    def test_the_chain_leads_to_the_answer(self):
        made = tasks.make("hops", 3000, 7, SETTINGS)
        boss = dict(line.rstrip(".").split(" reports to ") for line in made.text.splitlines())
        for question in made.questions:
            at = re.search(r"of (\w+)\?", question.prompt).group(1)
            for _ in range(question.prompt.count("the manager")):
                at = boss[at]
            self.assertEqual([at], question.answers)
            self.assertEqual(question.data["hops"], len(question.evidence))


class Ruler(unittest.TestCase):
    def test_prompts_letter_for_letter(self):
        made = tasks.make("niah_single_1", 1000, 0, SETTINGS)
        key = re.search(r"numbers for (\S+) is: (\d{7})\.", made.text).group(1)
        self.assertEqual(
            "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you "
            "about the number afterwards.\n", made.preamble)
        self.assertEqual(f"\nWhat is the special magic number for {key} mentioned in the provided text? The special "
                         f"magic number for {key} mentioned in the provided text is", made.questions[0].prompt)
        made = tasks.make("niah_multivalue", 1000, 0, SETTINGS)
        self.assertIn("\nWhat are all the special magic numbers for ", made.questions[0].prompt)
        self.assertTrue(made.preamble.startswith("Some special magic numbers are hidden"))
        made = tasks.make("vt", 1000, 0, SETTINGS)
        self.assertEqual(2, made.preamble.count("Memorize and track the chain(s) of variable assignment hidden in the "
                                                "following text.\n\n"))
        self.assertRegex(made.questions[0].prompt, r"^\nQuestion: Find all variables that are assigned the value \d{5} "
                         r"in the text above\. Answer: According to the chain\(s\) of variable assignment in the text "
                         r"above, 5 variables are assigned the value \d{5}, they are: $")

    def test_counts(self):
        made = tasks.make("cwe", 6000, 0, SETTINGS)
        counted = collections.Counter(re.findall(r"\d+\. (\S+)", made.text))
        self.assertEqual([30] * 10 + [3], [n for _, n in counted.most_common(11)])
        self.assertEqual(set(made.questions[0].answers), {word for word, _ in counted.most_common(10)})
        made = tasks.make("fwe", 6000, 0, SETTINGS)
        counted = collections.Counter(made.text.split())
        self.assertEqual(["...", *made.questions[0].answers], [word for word, _ in counted.most_common(4)])

    def test_needles_in_running_text(self):
        novel = "It was late. \u201cWho is there?\u201d asked Anne. Nobody answered! The door stood open. " * 60
        made = tasks.make("niah_multikey_1", 1500, 0, tasks.Settings(count, haystack=novel))
        self.assertEqual(4, made.text.count("One of the special magic numbers for"))
        rest = re.sub(r" ?One of the special magic numbers for \S+ is: \d+\.", "", made.text).strip()
        self.assertIn(rest[:200], " ".join(novel.split()))
        self.assertEqual(["It was late.", "\u201cWho is there?\u201d asked Anne.", "Nobody answered!"],
                         words.sentences(novel)[:3])

    def test_every_task_of_the_configuration(self):
        self.assertEqual(8, len(ruler.NIAH_TASKS))


class Flops(unittest.TestCase):
    QWEN3_4B = flops.Shape(36, 2560, 32, 8, 128, 9728, 151936)

    def test_by_hand(self):
        tiny = flops.Shape(layers=1, hidden=2, query_heads=2, kv_heads=1, head_dim=3, mlp=5, vocabulary=7)
        # W_Q 2x6, W_K and W_V 2x3, W_O 6x2, three of 2x5: 12 + 6 + 6 + 12 + 30 = 66 products
        self.assertEqual(132, flops.linear(tiny))
        self.assertEqual(108, flops.linear(tiny, keys=False))
        self.assertEqual(28, flops.head(tiny))
        # two tokens: rows attend to 1 and 2 keys, 4 x 6 each
        self.assertEqual(2 * 132 + 24 * 3 + 28, flops.prefill(tiny, 2))
        self.assertEqual(132 + 28 + 24 * 3, flops.decode(tiny, 2, 1))
        # one row on average behind half of 3 tokens (2 keys): forward and back through 108 + 28, the delta's three
        # products of 2 x 12, attention 2 1/2 times
        self.assertEqual(2 * 136 + 72 + 120, flops.adapt_step(tiny, 3, 1))
        self.assertEqual(2 * 136 + 3 * 2 * 8 + 120, flops.adapt_step(tiny, 3, 1, lora_rank=1))
        self.assertEqual(2 * 136 + 72 + 300, flops.adapt_step(tiny, 3, 1, keys=5), "24 x 5 keys, 2 1/2 times")
        # three rows of two keys each, forward
        self.assertEqual(3 * (136 + 24 + 48), flops.probe(tiny, 3, 3))
        self.assertEqual(3 * (136 + 16 + 48), flops.probe(tiny, 3, 3, lora_rank=1))

    def test_parameters_of_a_real_model(self):
        """Twice the parameters a token: 4.02 billion less the embedding's lookup, which is tied to the head."""
        self.assertAlmostEqual(2 * 4.02e9, flops.linear(self.QWEN3_4B) + flops.head(self.QWEN3_4B), delta=2e7)

    def test_matched(self):
        budget = flops.adapt(self.QWEN3_4B, 32768, 32, 128)
        tokens = flops.matched_tokens(self.QWEN3_4B, 32768, budget)
        self.assertLessEqual(flops.decode(self.QWEN3_4B, 32768, tokens), budget)
        self.assertGreater(flops.decode(self.QWEN3_4B, 32768, tokens + 1), budget)
        self.assertTrue(2000 < tokens < 9000, tokens)
        self.assertEqual(1, flops.matched_tokens(self.QWEN3_4B, 32768, 0))

    def test_the_paper_s_own_example(self):
        """L=32, d=4096, r=4, T=1e5: 8,000 tokens of thinking cost about 10 steps of 400."""
        thinking = flops.paper_thinking(32, 4096, 4, 100_000, 8000)
        self.assertAlmostEqual(1, thinking / flops.paper_steps(32, 4096, 4, 100_000, 10, 400), delta=0.1)


class Intervals(unittest.TestCase):
    def test_wilson(self):
        """Known values: Brown, Cai, DasGupta 2001 use the same formula; 0 of 10 is (0, 0.278)."""
        low, high = stats.wilson(0, 10)
        self.assertEqual((0.0, 0.278), (low, round(high, 3)))
        low, high = stats.wilson(81, 263)
        self.assertEqual((0.255, 0.366), (round(low, 3), round(high, 3)))
        self.assertEqual((0.0, 1.0), stats.wilson(0, 0))

    def test_bootstrap_draws_whole_texts(self):
        apart = [[1.0] * 20, [0.0] * 20] * 4
        together = [[1.0, 0.0] * 10] * 8
        self.assertGreater(stats.bootstrap(apart)[1] - stats.bootstrap(apart)[0], 0.5)
        self.assertEqual((0.5, 0.5), stats.bootstrap(together))
        mean, low, high = stats.interval(apart)
        self.assertEqual(0.5, mean)
        self.assertLess(low, stats.wilson(80, 160)[0])


    def test_paired(self):
        self.assertEqual((0.0, -1.0, 1.0), stats.paired([]))
        mean, low, high = stats.paired([[0.0, 0.0]])
        self.assertEqual(0, mean)
        self.assertLess(low, -0.5, "two equal pairs say little")
        mean, low, high = stats.paired([[1.0] * 16 + [0.0] * 4])
        # Wilson of 16 in 20: 0.584 to 0.919; of none: 0 to 0.161.
        self.assertAlmostEqual(0.8 - math.hypot(0.8 - 0.584, 0.161), low, places=3)
        self.assertAlmostEqual(0.8 + (0.919 - 0.8), high, places=3)
        self.assertAlmostEqual(-high, stats.paired([[-1.0] * 16 + [0.0] * 4])[1])
        apart = stats.paired([[1.0] * 40, [-1.0] * 40] * 4)
        self.assertGreater(apart[2] - apart[1], 1.0, "whole texts are drawn")


class Judges(unittest.TestCase):
    def score(self, judge, answer, references, data=None):
        return judges.JUDGES[judge](answer, references, data or {})

    def test_words(self):
        data = {"choices": ["otter", "badger", "candle"]}
        for answer, right in (("otter", 1), (" Otter.\nbadger", 1), ("\n The otter", 1), ("badger, or otter", 0),
                              ("candle", 0), ("otters", 0), ("", 0), ("no\notter", 0)):
            self.assertEqual(right, self.score("word", answer, ["otter"], data)["score"], answer)
        self.assertEqual(1, self.score("word", "It is VK-1234.", ["VK-1234"])["score"])

    def test_bank(self):
        references = ["LOST_UPDATE", "TX0042"]
        right = self.score("bank", '{"bug_type": "LOST_UPDATE", "bug_location": "TX0042"', references)
        self.assertEqual({"score": 1, "type": 1, "location": 1}, right)
        self.assertEqual({"score": 0, "type": 1, "location": 0},
                         self.score("bank", "LOST_UPDATE at TX0420", references))
        self.assertEqual({"score": 0, "type": 0, "location": 1}, self.score("bank", "CALC_ERROR tx42", references))
        self.assertEqual({"score": 0, "type": 0, "location": 0},
                         self.score("bank", "CALC_ERROR LOST_UPDATE TX1 TX42", references), "the first ones count")

    def test_places(self):
        self.assertEqual({"score": 1, "file": 1}, self.score("places", "It is os/path.py:L12.", ["os/path.py:L12"]))
        self.assertEqual(1, self.score("places", "path.py: line 12", ["path.py:L12"])["score"])
        self.assertEqual({"score": 0, "file": 1}, self.score("places", "a.py:L13", ["a.py:L12"]))
        self.assertEqual(0.5, self.score("places", "a.py:L12", ["a.py:L12", "a.py:L40"])["score"])
        self.assertEqual(0.25, self.score("places", "a.py:L1 a.py:L2 a.py:L3 a.py:L4", ["a.py:L2"])["score"],
                         "naming many places does not pay")

    def test_tokens_and_ruler(self):
        self.assertEqual(1, self.score("token", "4100 7", ["4100"])["score"])
        self.assertEqual(0, self.score("token", "", ["4100"])["score"])
        self.assertEqual(0.5, self.score("tokens", "7 4 9", [7, 8, 9, 10])["score"])
        row, = score.rows([{"kind": "answer", "judge": "tokens", "score": 0.5, "answer": "7 4 9",
                            "references": [7, 8, 9, 10], "parts": {}, "item": "a", "task": "t", "length": 1, "method": "in-context", "question": "q",
                            "tokens": dict.fromkeys(("context", "generated", "budget"), 1), "flops": 1,
                            "seconds": dict.fromkeys(("prefill", "queue", "prompt", "decode", "wall"), 1.0)}])
        self.assertEqual((4, 0.5, stats.wilson(2, 4)), (row["questions"], row["score"], (row["low"], row["high"])))
        self.assertEqual(0.5, metrics.string_match_all("ABC and more", ["abc", "xyz"]))
        self.assertEqual(1, metrics.string_match_part("ABC and more", ["abc", "xyz"]))


class Methods(unittest.TestCase):
    def test_settings(self):
        made = methods.parse_all("in-context,qttt:steps=8,lr=1e-4,qttt-lora+thinking:rank=4,budget=64,"
                                 "thinking:match=flops")
        self.assertEqual(["in-context", "qttt:steps=8,lr=1e-4", "qttt-lora+thinking:rank=4,budget=64",
                          "thinking:match=flops"], [method.label for method in made])
        self.assertEqual({"steps": 8, "span_tokens": 128, "spans_per_step": 1, "learning_rate": 1e-4, "seed": 1,
                          "kind": context_pb2.FULL}, made[1].adapt_options(1))
        self.assertEqual((True, 4, "thinking", 64), (made[2].adapt, made[2].lora_rank, made[2].way, made[2].budget))
        self.assertNotIn("learning_rate", made[2].adapt_options(1))
        self.assertEqual(4, made[2].adapt_options(1)["lora_rank"])
        self.assertNotIn("lora_rank", made[1].adapt_options(1))
        self.assertEqual({"seed": 3, "temperature": 0.6, "top_p": 0.95, "top_k": 20}, made[2].sampling(3))
        self.assertEqual({}, made[0].sampling(3))

    def test_policies(self):
        made = methods.parse("qttt:rows=recall,schedule=cosine,keep=best,probe_every=3,patience=2,warmup=1,clip=2,"
                             "optimizer=sgd,momentum=0.5,probe_spans=4,max_rise=1")
        request = context_pb2.AdaptContextRequest(**made.adapt_options(7))
        self.assertEqual("recall_rows", request.WhichOneof("span_policy"))
        self.assertEqual((context_pb2.COSINE, True, 3, 2, 1, 2, context_pb2.SGD, 0.5, 4, 1), (
            request.schedule, request.keep_best, request.probe_every, request.patience, request.warmup_steps,
            request.clip_norm, request.optimizer, request.momentum, request.probe_spans, request.max_probe_rise))
        plain = context_pb2.AdaptContextRequest(**methods.parse("qttt:rows=uniform,keep=last").adapt_options(7))
        self.assertEqual(context_pb2.AdaptContextRequest(**methods.parse("qttt").adapt_options(7)), plain)
        self.assertIsNone(plain.WhichOneof("span_policy"))

    def test_surprisal(self):
        made = methods.parse("qttt:skip=0.25,rows=surprisal,share=0.5,candidates=9")
        request = context_pb2.AdaptContextRequest(**made.adapt_options(7))
        self.assertEqual(context_pb2.AdaptContextRequest.SurprisalSpans(candidates=9, share=0.5, skip=0.25),
                         request.surprisal_spans)
        plain = methods.parse("qttt:rows=surprisal").adapt_options(7)["surprisal_spans"]
        self.assertEqual(context_pb2.AdaptContextRequest.SurprisalSpans(), plain, "settings do not leak")
        shape = flops.Shape(2, 8, 2, 1, 4, 16, 100)
        for label, tokens, candidates in (("qttt:rows=surprisal", 50000, 4 * 32), ("qttt:candidates=9", 50000, 9),
                                          ("qttt:rows=surprisal", 6144, 6144 // 129),
                                          ("qttt:rows=surprisal,steps=9999", 10**6, 4096)):
            made = methods.parse(label)
            steps = methods.parse(f"qttt:steps={made.request['steps']}")
            self.assertEqual(flops.probe(shape, tokens, candidates * 128),
                             made.cost(shape, tokens) - steps.cost(shape, tokens), label)
        event = context_pb2.AdaptEvent
        done = Adaptation(event.Effective(candidates=40), [event.Step(step=1)], 2.0, 1.0, context_pb2.Adapter(),
                          context_pb2.PhaseUsage(), [], event.Candidates(starts=range(0, 700, 100)))
        self.assertEqual(flops.adapt_step(shape, 5000, 128) + flops.probe(shape, 5000, 7 * 128)
                         + 2 * flops.probe(shape, 5000, 256),
                         methods.parse("qttt:rows=surprisal").cost(shape, 5000, done), "of those that were measured")

    def test_probes_cost(self):
        shape = flops.Shape(2, 8, 2, 1, 4, 16, 100)
        step, probe = flops.adapt_step(shape, 5000, 128), flops.probe(shape, 5000, 256)
        for label, probes in (("qttt", 2), ("qttt:keep=best", 2 + 7), ("qttt:probe_every=5", 2 + 6),
                              ("qttt:keep=best,probe_every=0", 2), ("qttt:keep=best,probe_every=31", 3),
                              ("qttt:probe_spans=0", 0)):
            self.assertEqual(32 * step + probes * probe, methods.parse(label).cost(shape, 5000), label)
        self.assertEqual(32 * flops.adapt_step(shape, 21, 20) + 2 * flops.probe(shape, 21, 40),
                         methods.parse("qttt").cost(shape, 21), "a span shrinks to the text")

    def test_the_cost_of_what_was_done(self):
        """Ended after three steps and one probe between; rows that recall stand where their starts say."""
        shape, event = flops.Shape(2, 8, 2, 1, 4, 16, 100), context_pb2.AdaptEvent
        steps = [event.Step(step=i, span_starts=[1000, 2001, 3002]) for i in (1, 2, 3)]
        done = Adaptation(event.Effective(recall_rows=700), steps, 2.0, 1.0, context_pb2.Adapter(),
                          context_pb2.PhaseUsage(), [event.Probe(step=2)])
        self.assertEqual(3 * flops.adapt_step(shape, 5000, 128, keys=2001 + (128 / 3 + 1) / 2) +
                         3 * flops.probe(shape, 5000, 100), methods.parse("qttt:rows=recall").cost(shape, 5000, done))

    def test_the_first_quarter_behind_the_text_is_near(self):
        shape, event = flops.Shape(2, 8, 2, 1, 4, 16, 100), context_pb2.AdaptEvent
        near, far = flops.adapt_step(shape, 5000, 128), flops.adapt_step(shape, 5000, 128, keys=5000, behind=True)
        self.assertEqual(8 * near + 24 * far + 2 * flops.probe(shape, 5000, 256, behind=True),
                         methods.parse("qttt:behind=200").cost(shape, 5000))
        probes = [event.Probe(step=step, trial=step < 4) for step in (0, 1, 2, 3, 7)]
        def cost(**effective):
            done = Adaptation(event.Effective(**effective), [event.Step(step=i + 1) for i in range(20)], 2.0, 1.0,
                              context_pb2.Adapter(), context_pb2.PhaseUsage(), probes)
            return methods.parse("qttt:rows=auto,behind=200").cost(shape, 5000, done)
        self.assertEqual((3 + 7) * near + 10 * far + 4 * flops.probe(shape, 5000, 128)
                         + 3 * flops.probe(shape, 5000, 128, behind=True), cost(behind=200, probe_spans=1))
        self.assertEqual(20 * near + 7 * flops.probe(shape, 5000, 4 * 128), cost(probe_spans=4), "uniform spans")

    def test_refused(self):
        for text, message in (("qttt:rows=some", "rows='some', allowed uniform or recall"),
                              ("qttt:keep=all", "keep='all', allowed last or best"),
                              ("qttt:schedule=step", "allowed constant or linear or cosine"),
                              ("qttt:rows=recall,skip=0.5", "settings of several rows"),
                              ("qttt:rows=surprisal,after=0.5", "settings of several rows"),
                              ("qttt:candidates=5000", "candidates='5000', allowed 1 to 4096"),
                              ("qttt:share=2", "share='2', allowed 0 to 1"),
                              ("in-context:rows=recall", "'rows'"),
                              ("qtt", "the method 'qtt', allowed in-context"), ("in-context:n=3", "'n', allowed none"),
                              ("qttt:steps=0", "steps='0', allowed 1 to 10000"), ("qttt:rank=3", "'rank'"),
                              ("thinking:match=money", "allowed flops or time"), ("qttt,qttt", "each once"),
                              ("in-context,thinking:match=flops", "no adaptation to match"), ("", "one or more")):
            with self.assertRaises(EvalError) as caught:
                methods.parse_all(text)
            self.assertIn(message, str(caught.exception))


class Spans(unittest.TestCase):
    def test_positions(self):
        text = "\n".join(f"Account {i} holds gold number {i * 7}." for i in range(6000))
        self.assertGreater(len(spans.pieces(text)), 4)
        found = spans.Tokens(text, tokenize)
        self.assertEqual(count(text), found.count)
        pieces = TOKENS.findall(text)
        for line in (0, 17, 2999, 5999):
            begin = text.index(f"Account {line} ")
            end = text.find("\n", begin) if line < 5999 else len(text)
            first, last = found.span(begin, end)
            self.assertEqual(text[begin:end], "".join(pieces[first:last]).strip("\n"))
            inner = text.index("gold", begin)
            first, last = found.span(inner, inner + 2)  # inside of a token: the whole token
            self.assertEqual([" gold"], pieces[first:last])

    def test_a_tokenizer_that_looks_ahead(self):
        """Line breaks at the end of a text are one token, before a word each is one, as in many tokenizers."""
        cut = re.compile(r"\n+$| ?\w+|[^\w]")
        found = spans.Tokens("Read.\n\nAnna sings.", lambda text: [hash(piece) for piece in cut.findall(text)])
        self.assertEqual(7, found.count)  # Read . \n \n Anna sings .
        self.assertEqual((4, 7), found.span(7, 18))
        self.assertEqual((4, 5), found.span(8, 10), "inside of a token")
        self.assertEqual((0, 2), found.span(0, 5))

    def test_pieces_of_a_text_without_lines(self):
        text = "x" * (3 * spans.PIECE)
        self.assertEqual([0, spans.PIECE, 2 * spans.PIECE], spans.pieces(text))


if __name__ == "__main__":
    unittest.main()
