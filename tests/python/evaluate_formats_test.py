"""Public benchmarks in their own file formats: prompts, cuts, predictions and official scores, on small made-up files.

Usage: evaluate_formats_test.py [unittest arguments], with the installed package on PYTHONPATH.
"""
import csv
import json
import os
import pathlib
import re
import tempfile
import unittest

from refocus.evaluate import judges
from refocus.evaluate.formats import babilong, benchmarks, files, longbench, longbench2, metrics, zeroscrolls
from refocus.evaluate.item import EvalError, read_items, write_items

WORDS = re.compile(r" ?[^\W_]+|[\W_]")


class Base(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.words, self.said = {}, []

    def settings(self, limit=10_000, rows=0):
        encode = lambda text: [self.words.setdefault(word, len(self.words)) for word in WORDS.findall(text)]
        decode = lambda ids: "".join(list(self.words)[id] for id in ids)
        return files.Settings(encode, decode, limit, rows, self.said.append)

    def file(self, name, rows, array=False):
        path = pathlib.Path(self.folder.name, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(rows) if array else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
        return str(path)

    def read(self, name, path, **settings):
        items = benchmarks.read(f"{name}:{path}", self.settings(**settings))
        copy = os.path.join(self.folder.name, "copy.task")
        write_items(items, copy)
        self.assertEqual(items, list(read_items(copy)), "they can be written as tasks")
        return items

    def predict(self, items, answers, method="in-context"):
        records = [{"kind": "answer", "item": item.id, "method": method, "answer": answer}
                   for item, answer in zip(items, answers)]
        records += [{**record, "method": "no-context", "answer": "another method's"} for record in records]
        scores = benchmarks.write(items, records, self.folder.name)
        stored = json.loads(pathlib.Path(self.folder.name, "predictions", "scores.json").read_text())
        self.assertEqual(scores, stored)
        return next(iter(scores.values()))[method]

    def written(self, *parts):
        return pathlib.Path(self.folder.name, "predictions", *parts).read_text(encoding="utf-8")

    @staticmethod
    def whole(item):
        return f"{item.preamble}{item.text}{item.questions[0].prompt}"


class LongBench(Base):
    ROW = {"input": "Who?", "context": "Ann came. Bob left.", "answers": ["Ann", "Ann B."], "length": 5000,
           "dataset": "hotpotqa", "language": "en", "all_classes": None, "_id": "x"}

    def test_prompts_letter_for_letter(self):
        item, = self.read("longbench", self.file("narrativeqa.jsonl", [self.ROW]))
        self.assertEqual(
            "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
            "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: Ann "
            "came. Bob left.\n\nNow, answer the question based on the story asconcisely as you can, using a single "
            "phrase if possible. Do not provide any explanation.\n\nQuestion: Who?\n\nAnswer:", self.whole(item))
        self.assertEqual("Ann came. Bob left.", item.text)
        self.assertEqual((128, True), (item.questions[0].max_tokens, item.chat))
        templates = files.prompts("longbench.json")
        self.assertEqual(set(longbench.ANSWER_TOKENS), set(templates))
        self.assertEqual(21, len(templates))

    def test_never_a_conversation(self):
        for name in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"):
            item, = self.read("longbench", self.file(f"{name}.jsonl", [{**self.ROW, "all_classes": ["a"]}]))
            self.assertFalse(item.chat, name)
            os.remove(os.path.join(self.folder.name, f"{name}.jsonl"))

    def test_samsum_ends_at_a_line_break_but_says_something(self):
        item, = self.read("longbench", self.file("samsum.jsonl", [self.ROW]))
        self.assertEqual({"stop_token_ids": [self.words["\n"]], "min_tokens": 1}, item.questions[0].options)

    def test_cut_in_the_middle(self):
        row = {**self.ROW, "context": " ".join(f"w{i}" for i in range(500))}
        item, = self.read("longbench", self.file("hotpotqa.jsonl", [row]), limit=32 + 201)
        ids = WORDS.findall(self.whole(item))
        self.assertEqual(200, len(ids), "int(201 / 2) from either end")
        filled = files.prompts("longbench.json")["hotpotqa"].format(context=row["context"], input="Who?")
        self.assertEqual(WORDS.findall(filled)[:100] + WORDS.findall(filled)[-100:], ids)
        self.assertTrue(item.questions[0].prompt.endswith("Question: Who?\nAnswer:"))
        self.assertTrue(item.preamble.startswith("Answer the question based on the given passages."))
        tiny, = self.read("longbench", self.file("hotpotqa.jsonl", [row]), limit=32 + 20)
        self.assertEqual("", tiny.questions[0].prompt, "the question itself was cut: all of it is text")
        self.assertEqual(20, len(WORDS.findall(self.whole(tiny))))

    def test_prediction_files_and_scores(self):
        rows = [self.ROW, {**self.ROW, "answers": ["nobody"]}]
        self.file("data/hotpotqa.jsonl", rows)
        self.file("data/hotpotqa_e.jsonl", [{**self.ROW, "length": n} for n in (3999, 4000, 8000)])
        items = self.read("longbench", os.path.join(self.folder.name, "data"))
        scores = self.predict(items, [" Ann came", "no", "Ann", "Bob", "the Ann!"])
        self.assertEqual({"hotpotqa": 33.33, "hotpotqa_e": {"0-4k": 100.0, "4-8k": 0.0, "8k+": 100.0}}, scores)
        lines = self.written("longbench", "in-context", "pred", "hotpotqa.jsonl").splitlines()
        self.assertEqual({"pred": " Ann came", "answers": ["Ann", "Ann B."], "all_classes": None, "length": 5000},
                         json.loads(lines[0]))
        self.assertEqual(3, len(self.written("longbench", "in-context", "pred_e", "hotpotqa.jsonl").splitlines()))

    def test_only_the_first_line_of_some_counts(self):
        judge = lambda dataset, answer: longbench.judge(answer, ["Ann"], {"dataset": dataset,
                                                                          "all_classes": []})["score"]
        self.assertEqual(1.0, judge("triviaqa", "\nAnn\nBob and more"))
        self.assertLess(judge("hotpotqa", "\nAnn\nBob and more"), 1.0)

    def test_chinese_needs_a_package(self):
        self.file("data/dureader.jsonl", [self.ROW])
        self.file("data/qasper.jsonl", [self.ROW])
        items = self.read("longbench", os.path.join(self.folder.name, "data"))
        if metrics.has_jieba():
            self.assertEqual(2, len(items))
        else:
            self.assertEqual(["longbench/qasper"], [item.task for item in items])
            self.assertIn("jieba", self.said[0])

    def test_metrics(self):
        """Values of the packages that the official script uses: rouge 1.0.1, fuzzywuzzy 0.18.0."""
        self.assertAlmostEqual(0.7499999953125, metrics.rouge_l("the cat sat.", "the cat sat down. the mat"), places=9)
        self.assertAlmostEqual(0.7692307642603551, metrics.rouge_l("a b c. d e a. f g", "b c a. e d f"), places=9)
        self.assertEqual(0.0, metrics.rouge_l("", "a"))
        self.assertEqual(0.88, metrics.code_similarity("# note\nreturn x + 1\nelse", "return y + 1 "))
        self.assertEqual(0.5, metrics.one_class("A person or a place", "place", ["person", "place", "thing"]))
        self.assertEqual(1.0, metrics.one_class("city", "city", ["ci", "city"]), "a part of the name does not count")
        self.assertEqual(0.5, metrics.one_class("city", "city", ["c", "ci", "city"]), "but the loop skips every other")
        self.assertEqual(0.5, metrics.paragraph("Paragraph 3 or 4", "Paragraph 3", "Paragraph "))
        self.assertAlmostEqual(2 / 3, metrics.qa_f1("The Cat, sat", "cat"))


class LongBenchV2(Base):
    ROW = {"_id": "66f", "domain": "d", "sub_domain": "s", "difficulty": "easy", "length": "short", "question": " Q? ",
           "choice_A": "one", "choice_B": "two", "choice_C": "three ", "choice_D": "four", "answer": "B",
           "context": "  The text. \n"}

    def test_prompts_letter_for_letter(self):
        item, = self.read("longbench2", self.file("data.json", [self.ROW], array=True))
        self.assertEqual(
            "Please read the following text and answer the question below.\n\n<text>\nThe text.\n</text>\n\nWhat is "
            "the correct answer to this question: Q?\nChoices:\n(A) one\n(B) two\n(C) three\n(D) four\n\nFormat your "
            'response as follows: "The correct answer is (insert answer here)".', self.whole(item))
        self.assertEqual(
            "What is the correct answer to this question: Q?\nChoices:\n(A) one\n(B) two\n(C) three\n(D) four\n\nWhat "
            'is the single, most likely answer choice? Format your response as follows: "The correct answer is (insert '
            'answer here)".', item.questions[0].floor)
        self.assertEqual(({"temperature": 0.1}, 128), (item.questions[0].options, item.questions[0].max_tokens))

    def test_cut_in_the_middle(self):
        row = {**self.ROW, "context": " ".join(f"w{i}" for i in range(500))}
        path = self.file("data.json", [row], array=True)
        for limit, first, last in ((200, 100, 100), (201, 100, 101)):
            item, = self.read("longbench2", path, limit=128 + limit)
            whole = WORDS.findall(self.whole(self.read("longbench2", path)[0]))
            self.assertEqual(whole[:first] + whole[-last:], WORDS.findall(self.whole(item)))

    def test_answers(self):
        for answer, found in (("The correct answer is (B).", "B"), ("The correct answer is **(B)**", "B"), ("The correct answer is B", "B"),
                              ("B", None), ("the correct answer is (B)", None)):
            self.assertEqual(found, longbench2.extract(answer))

    def test_prediction_file_and_scores(self):
        rows = [self.ROW, {**self.ROW, "_id": "67a", "difficulty": "hard", "length": "long", "answer": "A",
                           "context": "x" * 2000}]
        items = self.read("longbench2", self.file("data.json", rows, array=True))
        scores = self.predict(items, ["The correct answer is (B)", "I do not know"])
        self.assertEqual({"Overall": 50.0, "Easy": 100.0, "Hard": 0.0, "Short": 100.0, "Medium": None, "Long": 0.0},
                         scores)
        first, second = map(json.loads, self.written("longbench2", "in-context", "results.jsonl").splitlines())
        self.assertEqual(("B", True, "The correct answer is (B)"), (first["pred"], first["judge"], first["response"]))
        self.assertEqual(self.ROW["context"], first["context"], "as it was")
        self.assertEqual((None, False, 1000), (second["pred"], second["judge"], len(second["context"])))
        self.assertEqual(set(longbench2.FIELDS) | {"response", "pred", "judge"}, set(first))


class ZeroScrolls(Base):
    def row(self, **more):
        text = "You are given notes.\n\nNotes:\n" + " ".join(f"n{i}" for i in range(300))
        query = "\n\nQuestion:\nWho?\n\nAnswer:\n"
        return {"id": "i1", "pid": "i1_0", "input": text + query, "output": "Ann", "query_start_index": len(text),
                "query_end_index": len(text + query), "document_start_index": 0, "document_end_index": len(text),
                "truncation_seperator": "... [The rest is omitted]\n\n", **more}

    def test_whole_and_cut(self):
        path = self.file("qasper/validation.jsonl", [self.row()])
        item, = self.read("zeroscrolls", path)
        self.assertEqual(self.row()["input"], self.whole(item))
        cut, = self.read("zeroscrolls", path, limit=128 + 100)
        self.assertEqual(100, len(WORDS.findall(self.whole(cut))))
        self.assertTrue(self.whole(cut).endswith("... [The rest is omitted]\n\n\n\nQuestion:\nWho?\n\nAnswer:\n"))
        self.assertTrue(self.row()["input"].startswith(cut.text))

    def test_prediction_files_and_scores(self):
        self.file("z/qasper/validation.jsonl", [self.row(), self.row(id="i2")])
        self.file("z/gov_report/test.jsonl", [self.row(output=None)])
        items = self.read("zeroscrolls", os.path.join(self.folder.name, "z"))
        self.assertEqual(1, len(self.said), "summaries are not scored here")
        scores = self.predict(items, ["a summary", "Ann", "Bob"])
        self.assertEqual({"qasper": 50.0}, scores)
        self.assertEqual({"i1": "Ann", "i2": "Bob"}, json.loads(self.written("zeroscrolls", "in-context",
                                                                            "preds_qasper.json")))
        self.assertEqual({"i1": "a summary"}, json.loads(self.written("zeroscrolls", "in-context",
                                                                      "preds_gov_report.json")))

    def test_metrics(self):
        self.assertEqual(1.0, metrics.exponential_similarity("about 60%", "60%"))
        self.assertAlmostEqual(0.5, metrics.exponential_similarity("70", "60%"))
        self.assertEqual(0.0, metrics.exponential_similarity("many", "60%"))
        self.assertEqual(1.0, metrics.concordance("3, 1, 2", "3,1,2"))
        self.assertAlmostEqual(2 / 3, metrics.concordance("1 3 2", "3 1 2"))
        self.assertEqual(0.0, metrics.concordance("3 1", "3 1 2"))
        self.assertEqual(1.0, metrics.letter("(B) because", "B"))
        self.assertEqual(0.0, metrics.letter("Bob", "B"))
        self.assertEqual(0.0, zeroscrolls.judge("x", [""], {"task": "qasper", "scored": False})["score"])


class RulerFiles(Base):
    def test_prompt_predictions_and_scores(self):
        row = {"index": 17, "input": "A special magic number is hidden.\nnoise\nnoise\nWhat is the number?",
               "outputs": ["123", "456"], "length": 99, "answer_prefix": " The number is"}
        self.file("r/niah_multivalue/validation.jsonl", [row, row])
        self.file("r/qa_1/validation.jsonl", [{**row, "outputs": ["Ann", "Ann B."]}])
        items = self.read("ruler", os.path.join(self.folder.name, "r"))
        self.assertEqual(3, len({item.id for item in items}), "index is no key")
        self.assertEqual(row["input"] + row["answer_prefix"], self.whole(items[0]))
        self.assertEqual("\nWhat is the number? The number is", items[0].questions[0].prompt)
        self.assertEqual([128, 32], [items[0].questions[0].max_tokens, items[2].questions[0].max_tokens])
        scores = self.predict(items, ["123 and 456", "1\x0023", "ann"])
        self.assertEqual({"niah_multivalue": 50.0, "qa_1": 100.0}, scores)
        line = json.loads(self.written("ruler", "in-context", "niah_multivalue.jsonl").splitlines()[0])
        self.assertEqual({"index": 17, "pred": "123 and 456", "input": self.whole(items[0]), "outputs": ["123", "456"],
                          "others": {}, "truncation": -1, "length": 99}, line)


class BabiLong(Base):
    ROW = {"input": " Mary went to the office. ", "question": "Where is Mary? ", "target": "office"}

    def test_prompt(self):
        item, = self.read("babilong", self.file("data/qa1/4k.json", [self.ROW], array=True))
        prompt = self.whole(item)
        self.assertTrue(prompt.startswith("I will give you context with the facts about positions of different persons "
                                          "hidden in some random text and a question. "))
        self.assertTrue(prompt.endswith(
            "\n\nAlways return your answer in the following format: The most recent location of \u2019person\u2019 is "
            "\u2019location\u2019. Do not write anything else after that.\n\n<context>\nMary went to the office.\n"
            "</context>\n\nQuestion: Where is Mary?"))
        self.assertEqual("babilong/qa1_4k", item.task)
        self.assertEqual({f"qa{i}" for i in range(1, 21)}, set(files.prompts("babilong.json")))

    def test_predictions_and_scores(self):
        items = self.read("babilong", self.file("qa1_4k.jsonl", [self.ROW] * 4))
        scores = self.predict(items, ["The most recent location of Mary is office. Kitchen", "office or kitchen",
                                      "OFFICE\n", "garden"])
        self.assertEqual({"qa1_4k": 50.0}, scores)
        name = "qa1_4k_instruction_yes_examples_yes_post_prompt_yes_chat_template_no.csv"
        rows = list(csv.DictReader(self.written("babilong", "in-context", name).splitlines()))
        self.assertEqual(("office", "Where is Mary? "), (rows[1]["target"], rows[1]["question"]))
        self.assertEqual("office or kitchen", rows[1]["output"])

    def test_answers_of_several_parts(self):
        self.assertTrue(babilong.right("apple,milk", "milk, apple", "What is Mary carrying?", "qa8"))
        self.assertFalse(babilong.right("apple,milk", "milk", "What is Mary carrying?", "qa8"))
        self.assertTrue(babilong.right("kitchen", "from the office to the kitchen", "Where was it before the office?",
                                       "qa3"), "labels of the question do not count")


class Refused(Base):
    def refused(self, name, path, message):
        with self.assertRaises(EvalError) as caught:
            benchmarks.read(f"{name}:{path}", self.settings())
        self.assertIn(message, str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))

    def test_missing_data_says_where_to_get_it(self):
        for name, where in (("longbench", "huggingface.co/datasets/THUDM/LongBench"),
                            ("longbench2", "huggingface.co/datasets/THUDM/LongBench-v2"),
                            ("zeroscrolls", "huggingface.co/datasets/tau/zero_scrolls"),
                            ("ruler", "github.com/NVIDIA/RULER"),
                            ("babilong", "huggingface.co/datasets/RMT-team/babilong")):
            self.refused(name, os.path.join(self.folder.name, "none"), where)
            self.refused(name, "", "got no path")

    def test_other_files(self):
        self.refused("longbench", self.file("qasper.jsonl", [{"context": "x"}]), "item 1: got no 'answers'")
        self.refused("longbench", self.file("poems.jsonl", [{}]), "'poems', allowed a dataset of LongBench")
        self.refused("ruler", self.file("poems.jsonl", [{}]), "no task of RULER")
        self.refused("babilong", self.file("poems.json", [{}]), "qa1 to qa20")
        self.refused("zeroscrolls", self.file("poems.jsonl", [{}]), "no task of ZeroSCROLLS")
        self.refused("longbench2", self.file("data.json", [], array=True), "got no items")
        pathlib.Path(self.folder.name, "vt.jsonl").write_text("{")
        self.refused("ruler", os.path.join(self.folder.name, "vt.jsonl"), "got no JSON")

    def test_every_judge_of_a_benchmark_is_known(self):
        for name in ("longbench", "longbench2", "zeroscrolls", "ruler_all", "ruler_part", "babilong"):
            self.assertIn(name, judges.JUDGES)


class Rows(Base):
    def test_the_first_ones(self):
        path = self.file("qa1_4k.jsonl", [BabiLong.ROW] * 4)
        self.assertEqual(2, len(self.read("babilong", path, rows=2)))


if __name__ == "__main__":
    unittest.main()
