"""The pieces of bench/thinking.py and recall_model/train_chains.py on tiny random models: what is known, what is drawn, what
a thought writes, what counts and what it costs.

Usage: thinking_test.py REPOSITORY [unittest arguments]. Exit code 77, skipped: this Python has no torch or transformers.
"""
import argparse
import contextlib
import io
import sys
import tempfile
import unittest
import unittest.mock

from tiny_models import SHAPE, TOKENS, OnATinyModel, torch

import answers
import rivals
import thinking

chains = thinking.chains


def walk(account, values):
    """What a thought about the account writes: links to the end of its chain."""
    while account in values:
        account = values[account]
        yield account


class Chains(unittest.TestCase):
    def test_what_is_known_follows_from_the_records_before_it(self):
        draw, generator, kinds = chains.draws_of(3), torch.Generator().manual_seed(3), set()
        for ids, known in (draw(4, 128, generator, "cpu") for _ in range(5)):
            for text, expected in zip(ids.tolist(), known.tolist(), strict=True):
                values, row = {}, 0
                while row + 6 < len(text):  # a cut question at the end is left aside
                    mark, account = text[row:row + 2]
                    links = list(walk(account, values))
                    whole = bool(links) and links[-1] >= rivals.ledgers.ledger.FIRST_VALUE
                    self.assertIn(mark, chains.MARKS)
                    if mark == chains.RECORD:
                        stated = account in values
                        self.assertEqual(text[row + 2], values.setdefault(account, text[row + 2]))
                        answer = [int(stated)]
                    elif mark == chains.DIRECT:
                        answer = [2 + len(links) if whole else 0]
                        self.assertTrue(not whole or links[-1] == text[row + 2])
                    else:
                        end = next(i for i in range(row + 2, len(text)) if text[i] >= rivals.ledgers.ledger.FIRST_VALUE)
                        thought = text[row + 1:end + 1]
                        answer = [2 * (a in values) for a in thought[:-1]]
                        self.assertTrue(all(values.get(a, b) == b for a, b in zip(thought, thought[1:])))
                    self.assertEqual([0, 0, *answer], expected[row:row + 2 + len(answer)])
                    row += 2 + len(answer)
                    kinds.update(answer)
        self.assertEqual(set(range(3 + chains.HOPS)), kinds)

    def test_answers_count_those_that_are_wholly_right(self):
        class Knowing:
            """Predicts every token, but no number behind an account that was asked of at once."""
            embed_tokens = torch.nn.Embedding.from_pretrained(torch.eye(SHAPE["vocab_size"]))

            def __call__(self, ids, positions):
                ids = ids[0].clone()
                at_once = torch.nonzero(ids[:-2] == chains.DIRECT)[:, 0]
                ids[at_once + 2] = chains.RECORD
                return self.embed_tokens.weight[None, ids.roll(-1)]

        found = chains.answers(Knowing(), 300, 2, 5, "cpu")
        self.assertEqual({"direct": [0.0] * chains.HOPS, "thinking": [100.0] * chains.HOPS}, found)

    def test_a_trained_model_is_one_that_transformers_reads(self):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            arguments = [folder, "--steps", "2", "--batch-tokens", "256", "--layers", "3", "--lengths", "128"]
            with unittest.mock.patch.object(sys, "argv", ["train_chains.py", *arguments]):
                chains.main()
            model = rivals.load_model(folder)
            self.assertEqual(3, model.config.num_hidden_layers)
            ours = rivals.ledgers.Model(rivals.ledgers.CONFIG | {"num_hidden_layers": 3})
            ours.load_state_dict(model.model.state_dict())
            ids = torch.arange(300, 340)[None]
            torch.testing.assert_close(model.model(input_ids=ids).last_hidden_state, ours(ids, torch.arange(40)[None]),
                                       rtol=1e-3, atol=1e-3)


class Thinking(OnATinyModel):
    def setUp(self):
        super().setUp()
        self.ledger = thinking.draw_ledger(TOKENS, 3, [1, 2, 4], 5)
        self.kv = rivals.prefill(self.model, self.ledger.ids)

    def test_questions_and_their_answers(self):
        broken = 0
        for ledger in (thinking.draw_ledger(TOKENS, seed, [1, 2, 4], 5) for seed in range(5)):
            ids = ledger.ids.tolist()
            values = dict(zip(ids[1::3], ids[2::3], strict=True))
            broken += len(set(values.values()) - set(values)) > len(values) // chains.HOPS
            self.assertEqual([1, 2, 4], list(ledger.questions))
            for hops, accounts in ledger.questions.items():
                self.assertGreater(len(accounts), 1)
                for account, number in zip(accounts.tolist(), ledger.numbers[hops].tolist(), strict=True):
                    links = list(walk(account, values))
                    self.assertEqual((hops, number), (len(links), links[-1]))
                    self.assertGreaterEqual(number, rivals.ledgers.ledger.FIRST_VALUE)
            stated = [row for row in range(1, TOKENS - 1, 3) if ids[row] in ids[1:row:3]]
            self.assertEqual(stated, ledger.known.tolist())
        self.assertGreater(broken, 0)  # chains of which a record is missing

    def test_many_thoughts_are_read_as_each_behind_the_whole_text(self):
        accounts, delta = self.ledger.questions[2], rivals.QueryDelta(self.model)
        torch.manual_seed(2)
        delta.weights = [0.3 * torch.randn_like(w) for w in delta.weights]
        further = 300 + torch.arange(4 * len(accounts)).view(2, -1)
        with torch.no_grad(), delta.within():
            kv, tails = rivals.prefill(self.model, self.ledger.ids), thinking.Tails(2)
            with thinking.sharing(self.model):
                first = thinking.logits_behind(self.model, thinking.prompts(chains.THOUGHT, accounts), 0, kv, tails)
                tails.repeat(2)
                for step, tokens in enumerate(further):
                    last = thinking.logits_behind(self.model, tokens[:, None], 2 + step, kv, tails)
            behind = lambda text: torch.cat((self.ledger.ids, torch.stack(text)))
            whole = lambda *text: self.model(input_ids=behind(text)[None]).logits[0, -1]
            mark = torch.tensor(chains.THOUGHT)
            for i, account in enumerate(accounts):
                self.assert_close(whole(mark, account), first[i])
            for i in range(further.shape[1]):
                self.assert_close(whole(mark, accounts[i // 2], *further[:, i]), last[i])

    def test_thoughts_go_on_to_a_number(self):
        first = rivals.ledgers.ledger.FIRST_VALUE
        follow = {300: 301, 301: first + 7, 302: first + 9, 303: 303}  # the last thinks forever

        def scripted(model, ids, *_):
            logits = torch.zeros(len(ids), SHAPE["vocab_size"])
            logits[range(len(ids)), [follow.get(i, first) for i in ids[:, -1].tolist()]] = 50.0
            return logits

        with unittest.mock.patch.object(thinking, "logits_behind", scripted), \
                unittest.mock.patch.object(thinking.Tails, "repeat"):
            for samples, temperature, at_once in ((1, 0.0, 1), (3, 0.7, 1), (3, 0.7, 1 << 28)):
                thinking.MOST_SCORES = at_once  # all accounts, or one after the other
                ends, scores = thinking.think(self.model, self.kv, torch.tensor([300, 302, 303]), samples, temperature)
                self.assertEqual([[end] * samples for end in (first + 7, first + 9, 0)], ends.tolist())
                self.assertLess(scores.abs().max(), 1e-6)

    def test_draws_follow_the_temperature(self):
        logits = torch.tensor([0.0, 1.0, 2.0]).expand(40_000, 3)
        tokens = thinking.drawn(logits, 0.5, torch.Generator().manual_seed(1))
        shares = torch.bincount(tokens, minlength=3) / len(tokens)
        torch.testing.assert_close(shares, (logits[0] / 0.5).softmax(-1), atol=0.01, rtol=0)
        self.assertTrue((thinking.drawn(logits, 0.0, None) == 2).all())

    def test_the_most_frequent_and_the_likeliest(self):
        a, b, c = (rivals.ledgers.ledger.FIRST_VALUE + i for i in range(3))
        ends = torch.tensor([[a, b, b, 0], [a, b, c, 0], [0, 0, 0, 0], [0, 0, 0, c]])
        scores = torch.tensor([[-.1, -2., -3., -.01], [-2., -1., -3., 0.], [0.] * 4, [0., 0., 0., -9.]])
        self.assertEqual([b, b, 0, c], thinking.most_frequent(ends, scores).tolist())
        self.assertEqual([a, b, 0, c], thinking.likeliest(ends, scores).tolist())

    def test_steps_and_thoughts_keep_the_budget(self):
        prepared = answers.Prepared.__new__(answers.Prepared)
        prepared.ledger, prepared.kv = self.ledger, self.kv
        spans = rivals.uniform_spans(self.ledger, rivals.SPAN, 5)
        costs = [rivals.frozen_cost(self.shape, next(spans)) for _ in range(6)]
        delta, half = thinking.adapt(self.model, self.ledger, self.kv, "uniform", 1e-2, sum(costs))
        steps = max(n for n in range(6) if sum(costs[:n]) <= sum(costs) // 2)
        for found, count in ((delta, 6), (half, steps)):
            expected = answers.adapted(self.model, prepared, "uniform", count, rate=1e-2)
            for x, y in zip(found.weights, expected.weights):
                self.assertTrue(torch.equal(x, y), count)
        one = rivals.flops.decode(self.shape, TOKENS + 2, 3)
        self.assertEqual([1, 1, 2, 2, 3], [thinking.thoughts_for(self.shape, TOKENS, 4, budget)
                                           for budget in (0, one, 2 * one, 3 * one - 1, 3 * one)])
        self.assertEqual(2 * one, thinking.question_cost(self.shape, TOKENS, 4, 3)
                         - thinking.question_cost(self.shape, TOKENS, 4, 1))

    def test_every_method_answers_every_question(self):
        options = argparse.Namespace(hops=[1, 3], questions=4, contexts=2, kinds=["uniform", "recall"], rates=[1e-3])
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()) as printed, \
                unittest.mock.patch.object(thinking, "MOST_THOUGHTS", 8), \
                unittest.mock.patch.object(thinking, "ALONE", 2):
            results, *rest = thinking.compare(self.model, TOKENS, options)
            thinking.report(self.model, TOKENS, options, results, *rest)
        self.assertEqual(6 + 2 * 6, len(results))
        for name, found in results.items():
            self.assertEqual(dict.fromkeys((1, 3), 4 if name.endswith(", all") else 8), found.asked, name)
            self.assertTrue(name.split(":")[0] + ":" in printed.getvalue())

    def test_who_votes_has_spent_half_on_steps(self):
        active, seen = [], []

        class Named:
            def __init__(self, name):
                self.name = name

            @contextlib.contextmanager
            def within(self):
                active.append(self.name)
                yield
                active.pop()

        deltas = lambda model, ledger, kv, kind, rate, budget: (Named(f"{kind} {rate} {budget}"), Named(f"{kind} half"))
        note = lambda text, label, budget=None: seen.append((label, *active, budget))
        options = argparse.Namespace(hops=[1], questions=4, contexts=1, kinds=["recall"], rates=[1e-3])
        with unittest.mock.patch.object(thinking, "adapt", deltas), \
                unittest.mock.patch.object(thinking, "best_rate", lambda *_: 2e-3), \
                unittest.mock.patch.multiple(thinking.Text, ask=note, vote=note):
            budget = thinking.compare(self.model, TOKENS, options)[2]
        self.assertEqual([("in-context", None), ("in-context", budget), ("qTTT recall", f"recall 0.002 {budget}", None),
                          ("half qTTT recall", "recall half", budget // 2)], seen)


if __name__ == "__main__":
    unittest.main()
