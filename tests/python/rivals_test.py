"""The pieces of bench/rivals.py and answers.py on tiny random models: what gets a gradient, what stays as it is, what is
counted, which text follows from which.

Usage: rivals_test.py REPOSITORY [unittest arguments]. Exit code 77, skipped: this Python has no torch or transformers.
"""
import argparse
import contextlib
import io
import unittest
import unittest.mock

from tiny_models import SHAPE, TOKENS, OnATinyModel, copied, tiny, torch

import answers
import rivals


class Reading(OnATinyModel):
    def test_losses_are_those_of_a_whole_forward_pass(self):
        span, scattered = torch.arange(70, 102), torch.tensor([150, 3, 80, 81])
        for family in ("Qwen3", "Llama"):
            model = tiny(family)
            kv = rivals.prefill(model, self.ledger.ids[:TOKENS])
            with torch.no_grad():
                logits = model(input_ids=self.ledger.ids[None, :TOKENS]).logits[0]
                expected = lambda rows: torch.nn.functional.cross_entropy(logits[rows], self.ledger.ids[rows + 1])
                for loss in (rivals.frozen_loss, rivals.own_loss, rivals.whole_loss):
                    self.assert_close(loss(model, self.ledger, kv, span), expected(span))
                self.assert_close(rivals.frozen_loss(model, self.ledger, kv, scattered), expected(scattered))
                self.assertGreater(abs(rivals.alone_loss(model, self.ledger, kv, span) - expected(span)), 1e-3)

    def test_later_tokens_are_read_behind_the_context(self):
        with torch.no_grad():
            whole = self.model(input_ids=self.ledger.ids[None]).logits[0]
        rows = TOKENS + self.ledger.rows
        self.assert_close(rivals.later_logits(self.model, self.ledger, self.kv), whole[rows])

    def test_found_is_the_value_behind_the_account(self):
        answers_right = torch.arange(len(self.ledger.rows)) % 3 == 0
        logits = torch.zeros(len(answers_right), SHAPE["vocab_size"])
        right = self.ledger.ids[TOKENS + self.ledger.rows + 1]
        logits[torch.arange(len(right)), torch.where(answers_right, right, right - 1)] = 1
        with unittest.mock.patch.object(rivals, "later_logits", lambda *_: logits):
            found, alone = rivals.recall(self.model, self.ledger, self.kv)
        self.assertAlmostEqual(100 * answers_right.float().mean().item(), found, 4)
        self.assertAlmostEqual(100 * answers_right[self.ledger.alone].float().mean().item(), alone, 4)

    def test_a_window_is_so_many_tokens(self):
        ids = self.ledger.ids[:TOKENS]
        self.assert_close(rivals.prefill(self.model, ids, TOKENS)[1][0], self.kv[1][0])
        for window in (1, 8):  # the second layer's values depend on nothing before the window, and not on positions
            values = rivals.prefill(self.model, ids, window)[1][1]
            self.assert_close(values[:, :, 50], rivals.prefill(self.model, ids[51 - window:51])[1][1][:, :, -1])
            self.assertGreater((values - self.kv[1][1])[:, :, window:].abs().max(), 1e-2)


class Training(OnATinyModel):
    def gradients(self, loss, rows):
        delta = rivals.QueryDelta(self.model)
        with delta.within():
            return torch.autograd.grad(loss(self.model, self.ledger, self.kv, rows), delta.parameters())

    def test_a_delta_has_the_gradient_of_w_q(self):
        rows = torch.arange(40, 72)
        queries = [layer.self_attn.q_proj.weight.requires_grad_(True) for layer in self.model.model.layers]
        loss = rivals.frozen_loss(self.model, self.ledger, self.kv, rows)
        for a, b in zip(self.gradients(rivals.frozen_loss, rows), torch.autograd.grad(loss, queries)):
            self.assert_close(a, b)

    def test_gradients_flow_through_the_k_and_v_that_are_not_frozen_and_no_others(self):
        rows = torch.arange(40, 72)
        frozen, own, whole = (self.gradients(loss, rows) for loss in (rivals.frozen_loss, rivals.own_loss,
                                                                      rivals.whole_loss))
        self.assert_close(frozen[1], own[1])  # the last layer's queries reach no K or V
        self.assertGreater((frozen[0] - own[0]).norm() / frozen[0].norm(), 1e-2)
        self.assertGreater((whole[0] - own[0]).norm() / own[0].norm(), 1e-2)
        first = torch.arange(0, 32)           # nothing stands before it
        for a, b in zip(self.gradients(rivals.own_loss, first), self.gradients(rivals.whole_loss, first)):
            self.assert_close(a, b)

    def test_adapting_changes_the_delta_alone(self):
        prepared = answers.Prepared(self.model, TOKENS, 3)
        kv = copied(prepared.kv)
        weights = {name: w.clone() for name, w in self.model.named_parameters()}
        for kind in ("uniform", "recall"):
            before = rivals.later_logits(self.model, prepared.ledger, prepared.kv)
            delta = answers.adapted(self.model, prepared, kind, steps=3, rows=16, rate=1e-2, layers=[1])
            self.assertEqual(0, delta.weights[0].abs().max())
            self.assertGreater(delta.weights[1].abs().max(), 1e-2)
            self.assert_same_bits(kv, prepared.kv)
            after = rivals.later_logits(self.model, prepared.ledger, prepared.kv)
            self.assertTrue(torch.equal(before, after), "the delta is still added")
            with delta.within():
                self.assertFalse(torch.equal(before, rivals.later_logits(self.model, prepared.ledger, prepared.kv)))
        for name, w in self.model.named_parameters():
            self.assertTrue(torch.equal(w, weights[name]), name)
            self.assertIsNone(w.grad, name)

    def test_training_everything_leaves_the_model_as_it_is(self):
        weights = {name: w.clone() for name, w in self.model.named_parameters()}
        kv = copied(self.kv)
        result = rivals.train_everything(self.model, self.ledger, self.kv, rivals.own_loss, rivals.own_cost, 1e-3,
                                         span=16, steps=2)
        self.assertEqual(2, result.steps)
        self.assertTrue(all(torch.equal(w, weights[name]) for name, w in self.model.named_parameters()))
        self.assert_same_bits(kv, self.kv)


class Counting(OnATinyModel):
    def products(self, work):
        """Operations of matrix products that PyTorch counts; its attention kernel on CPUs is none of them."""
        from torch.utils.flop_counter import FlopCounterMode
        with FlopCounterMode(display=False) as counter:
            work()
        return sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))

    def test_formulas_are_what_pytorch_counts(self):
        rows, n = torch.arange(40, 72), 32
        s, hidden, q, kv = self.shape, self.shape.hidden, self.shape.query_size, self.shape.kv_size
        delta = rivals.QueryDelta(self.model)

        def step(loss):
            with delta.within():
                loss(self.model, self.ledger, self.kv, rows).backward()

        linear = rivals.trained(s, n, True, False) + rivals.head_cost(s, n, False)
        first = 2 * n * hidden * (2 * q + 2 * kv)  # nobody asks for the gradient of the embeddings
        self.assertEqual(linear - first, self.products(lambda: step(rivals.own_loss)))
        self.assertEqual(linear, rivals.own_cost(s, rows) - rivals.flops.attention(s, 0) - self.attention_of(n, 40))
        copy = tiny().requires_grad_(True)
        everything = rivals.trained(s, n, True, True) + rivals.head_cost(s, n, True)
        self.assertEqual(everything,
                         self.products(lambda: rivals.alone_loss(copy, self.ledger, self.kv, rows).backward()))

    def attention_of(self, n, start):
        """Of a span behind `start` frozen keys: seven products of its own keys, five of frozen ones."""
        product = 2 * self.shape.layers * self.shape.query_size
        return product * (7 * n * (n + 1) // 2 + 5 * n * start)

    def test_a_frozen_step_is_the_service_s(self):
        rows = torch.arange(40, 72)
        self.assertEqual(rivals.flops.adapt_step(self.shape, 0, 32, keys=40 + 33 / 2),
                         rivals.frozen_cost(self.shape, rows))
        self.assertLess(rivals.frozen_cost(self.shape, rows), rivals.own_cost(self.shape, rows))
        self.assertLess(rivals.own_cost(self.shape, rows), rivals.whole_cost(self.shape, rows))
        self.assertLess(rivals.own_cost(self.shape, rows), rivals.own_cost(self.shape, rows, everything=True))

    def test_budgets_are_kept_and_encoding_again_is_paid(self):
        train = lambda **settings: rivals.train(
            [w := torch.zeros(1, requires_grad=True)], lambda rows: (w - 1).square().sum(), iter([7, 7, 7, 7]),
            lambda rows: rows, 0.1, **settings)
        self.assertEqual((3, 21), train(budget=27))
        self.assertEqual((3, 21), train(steps=3))
        self.assertEqual((0, 0), train(budget=6))
        again = rivals.flops.prefill(self.shape, TOKENS)
        work = lambda **settings: rivals.adapt_queries(self.model, self.ledger, self.kv, rivals.frozen_loss,
                                                       rivals.frozen_cost, 1e-3, **settings)
        plain, encoded = work(steps=2), work(steps=2, encode=True)
        self.assertEqual(again, encoded.flops - plain.flops)
        self.assertEqual(1, work(budget=again + plain.flops - 1, encode=True).steps)

    def test_every_rival_keeps_the_budget(self):
        options = argparse.Namespace(rates=[1e-3], weight_rates=[1e-4], contexts=1)
        with contextlib.redirect_stderr(io.StringIO()):  # progress
            best, results = rivals.compare(self.model, 1024, options, rivals.RIVALS)
        budget = results[rivals.BASELINE][0].flops
        self.assertEqual(rivals.STEPS, results[rivals.BASELINE][0].steps)
        self.assertEqual(set(rivals.RIVALS), set(best))
        for name, (result,) in results.items():
            self.assertLessEqual(result.flops, budget, name)
            self.assertTrue(0 <= result.recall <= 100, name)
            if name in best:
                self.assertGreater(result.flops, 0, name)
        self.assertEqual(len(results) + 4, len(rivals.table(1024, self.shape, best, results).splitlines()))


class Ledgers(unittest.TestCase):
    def test_what_counts_stood_in_the_context(self):
        ledger = rivals.draw_ledger(TOKENS, 5)
        pairs = list(zip(ledger.ids[0::2].tolist(), ledger.ids[1::2].tolist(), strict=True))
        context, later = pairs[:TOKENS // 2], pairs[TOKENS // 2:]
        self.assertEqual([2 * i for i, (account, _) in enumerate(later) if account in dict(context)],
                         ledger.rows.tolist())
        for row, alone in zip(ledger.rows.tolist(), ledger.alone.tolist(), strict=True):
            account, value = later[row // 2]
            self.assertEqual(dict(context)[account], value)
            self.assertEqual(alone, account not in dict(later[:row // 2]))
        self.assertTrue(0 < ledger.alone.sum() < len(ledger.rows))

    def test_rows_to_recall(self):
        ledger = rivals.draw_ledger(TOKENS, 5)
        ids = ledger.ids.tolist()
        allowed = [row for row in range(TOKENS // 2, TOKENS - 1, 2) if ids[row] in ids[:row:2]]
        draws = rivals.recall_rows(ledger, 7, 1)
        drawn = torch.cat([next(draws) for _ in range(len(allowed))]).tolist()
        for i in range(7):
            self.assertEqual(allowed, sorted(drawn[i * len(allowed):(i + 1) * len(allowed)]), "once before any twice")

    def test_uniform_spans_and_their_targets_stay_within_the_context(self):
        ledger = rivals.draw_ledger(TOKENS, 5)
        draws = rivals.uniform_spans(ledger, 32, 1)
        spans = [next(draws) for _ in range(3000)]
        self.assertEqual((0, TOKENS - 2), (min(int(s[0]) for s in spans), max(int(s[-1]) for s in spans)))

    def test_controls(self):
        torch.manual_seed(1)
        kv = [(torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)) for _ in range(2)]
        for (keys, values), (same, shuffled) in zip(kv, rivals.shuffled_values(kv, 3)):
            self.assertTrue(torch.equal(keys, same))
            self.assertFalse(torch.equal(values, shuffled))
            self.assertTrue(torch.equal(values.sort(2).values, shuffled.sort(2).values))
        for pair, made in zip(kv, rivals.random_kv(kv, 3)):
            for x, y in zip(pair, made):
                torch.testing.assert_close(x.norm(dim=-1), y.norm(dim=-1))
                self.assertLess(torch.cosine_similarity(x.flatten(), y.flatten(), 0).abs(), 0.6)

    def test_bad_options_get_one_line(self):
        with self.assertRaisesRegex(SystemExit, "--model: got /nowhere, .* no config.json"):
            rivals.load_model("/nowhere")
        for tokens in (512, 1025, 1 << 20):
            with self.assertRaisesRegex(SystemExit, "--tokens: got .*, allowed"):
                rivals.check_tokens([tokens])


class Masses(OnATinyModel):
    def test_masses_are_those_of_plain_attention(self):
        rows, ids = self.ledger.known[[40, 3, 20]], self.ledger.ids
        self.model.set_attn_implementation("eager")
        with torch.no_grad():
            whole = self.model(input_ids=ids[None, :TOKENS], output_attentions=True).attentions
        self.model.set_attn_implementation("sdpa")
        noted = answers.log_masses(self.model, self.ledger, self.kv, rows, [0, 1])
        for layer, attention in enumerate(whole):
            for i, row in enumerate(rows.tolist()):
                behind = [j for j in range(1, row) if ids[j - 1] == ids[row]]
                self.assertGreater(len(behind), 0)
                self.assert_close(attention[0, :, row, behind].sum(-1).log(), noted[layer][:, i])
        self.assertEqual("sdpa", self.model.config._attn_implementation)

    def test_the_objective_reaches_the_layers_up_to_its_own_and_raises_the_mass(self):
        prepared = answers.Prepared(self.model, TOKENS, 3)
        look = lambda: answers.log_masses(self.model, prepared.ledger, prepared.kv, prepared.ledger.known, [0, 1])
        before = look()
        for layers in ([0], [1], [0, 1]):
            for pooled in (False, True):
                delta = answers.adapted(self.model, prepared, "recall", 10, 16, 1e-2,
                                        loss=answers.mass_loss(layers, pooled))
                self.assertEqual([True, layers != [0]], [bool(w.abs().max() > 1e-2) for w in delta.weights])
                with torch.no_grad(), delta.within():
                    after = look()
                for layer in layers:
                    self.assertGreater((after[layer] - before[layer]).mean(), 0.02, (layers, pooled))

    def test_it_costs_what_is_left_out_less(self):
        rows, shape, n = torch.tensor([150, 3, 80, 81]), self.shape, 4
        mlp_and_output = 3 * shape.hidden * shape.mlp + shape.hidden * shape.query_size
        products = 2 * shape.query_size * int((rows + 1).sum())  # P V and dP, of the five
        left_out = 2 * n * rivals.flops.head(shape) + 2 * n * 2 * mlp_and_output + 2 * products
        for layers in ([1], [0, 1]):
            self.assertEqual(rivals.frozen_cost(shape, rows) - left_out, answers.mass_cost(layers)(shape, rows))
        one = rivals.dataclasses.replace(shape, layers=1)
        self.assertEqual(answers.mass_cost([0])(one, rows), answers.mass_cost([0])(shape, rows))

    def test_all_methods_spend_one_budget(self):
        with contextlib.redirect_stdout(io.StringIO()) as printed, unittest.mock.patch.object(rivals, "STEPS", 4):
            answers.mass(self.model, TOKENS, 2, [1e-3])
        steps = {line.split(" | ")[0][2:]: line.split(" | ")[3] for line in printed.getvalue().splitlines()
                 if "64 rows | " in line or "128 rows | " in line if line.count("|") == 7}
        self.assertEqual(set(answers.mass_methods(2)), set(steps))
        self.assertEqual(4, float(steps["next token, uniform, 128 rows"]))
        self.assertGreater(float(steps["mass at the last layer, 64 rows"]), float(steps["next token, recall, 64 rows"]))


class Refining(OnATinyModel):
    def setUp(self):
        super().setUp()
        self.prepared = answers.Prepared(self.model, TOKENS, 3)

    def test_rows_of_a_question(self):
        ledger = self.prepared.ledger
        account = ledger.ids[ledger.known[5]]
        own = [row for row in range(0, TOKENS - 1, 2) if ledger.ids[row] == account]
        rows = answers.question_rows(ledger, account, 12).tolist()
        self.assertEqual(own, rows[:len(own)])
        others = set(ledger.known.tolist()) - set(own)
        self.assertEqual(12, len(set(rows)))
        far = lambda row: min(abs(row - x) for x in own)
        self.assertLessEqual(set(rows[len(own):]), others)
        self.assertLessEqual(max(map(far, rows[len(own):])), min(map(far, others - set(rows))))
        self.assertEqual(own[:2], answers.question_rows(ledger, account, 2).tolist())

    def test_each_question_is_asked_behind_the_context_alone(self):
        accounts = self.prepared.ledger.ids[[0, 2, 4, 6]]
        context = self.prepared.ledger.ids[:TOKENS]
        with torch.no_grad():
            expected = [self.model(input_ids=torch.cat((context, a[None]))[None]).logits[0, -1].argmax().item()
                        for a in accounts]
        self.assertEqual(expected, answers.asked(self.model, self.prepared, accounts).tolist())

    def test_steps_for_a_question_find_its_value_and_leave_the_shared_delta(self):
        ledger = self.prepared.ledger
        shared = [0.3 * torch.randn_like(w) for w in rivals.QueryDelta(self.model).weights]
        before, account = copied([shared])[0], ledger.ids[ledger.known[5]]
        rows = answers.question_rows(ledger, account, answers.REFINED_ROWS)
        for own_alone, count in ((False, len(rows)), (True, int((ledger.ids[rows] == account).sum()))):
            found, spent = answers.refined(self.model, self.prepared, shared, account, 0.0, own_alone)
            delta = rivals.QueryDelta(self.model)
            delta.weights = shared
            with delta.within():
                self.assertEqual(answers.asked(self.model, self.prepared, account[None])[0], found)
            self.assertNotEqual(answers.asked(self.model, self.prepared, account[None])[0], found)
            self.assertEqual(4 * rivals.frozen_cost(self.shape, rows[:count]), spent)
        losses = []
        track = lambda *_: losses.append(rivals.frozen_loss(self.model, ledger, self.prepared.kv, rows[:count]).item())
        with unittest.mock.patch.object(answers, "asked", lambda *_: [track()]):
            for rate in (0.0, 3e-2):
                answers.refined(self.model, self.prepared, shared, account, rate, own_alone=True)
        self.assertLess(losses[1], losses[0] - 0.1)
        self.assertTrue(all(torch.equal(a, b) for a, b in zip(before, shared)))

    def test_every_question_starts_from_the_shared_delta_of_the_first_mark(self):
        marks, seen = (2, 3, 4), []
        questions = answers.Questions(self.model, self.prepared, "recall", marks)
        self.assertEqual([0, *marks], list(questions.found))
        expected = answers.adapted(self.model, self.prepared, "recall", 2)
        note = lambda model, prepared, shared, *_: (seen.append(shared), (torch.tensor(0), 7))[1]
        with unittest.mock.patch.object(answers, "refined", note):
            self.assertEqual((0.0, 7), questions.refine(1e-3, False))
        self.assertEqual(len(questions.accounts), len(seen))
        for shared in seen:
            self.assertTrue(all(torch.equal(a, b) for a, b in zip(shared, expected.weights)))

    def test_the_table_has_both_kinds(self):
        with contextlib.redirect_stdout(io.StringIO()) as printed, \
                unittest.mock.patch.object(answers, "QUESTIONS_ASKED", 3):
            answers.refine(self.model, TOKENS, 1, [1e-3])
        for kind in ("uniform", "recall"):
            self.assertEqual(6, printed.getvalue().count(f"| {kind}, "))


if __name__ == "__main__":
    unittest.main()
