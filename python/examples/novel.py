# %% [markdown]
# # Questions about a novel, before and after adapting
#
# A notebook as a script: every `# %%` begins a cell (VS Code, Jupytext, Spyder); `python novel.py FILE` runs them all.
# It needs a service (`refocus serve --model ...`) at REFOCUS_ADDRESS, by default 127.0.0.1:7070.

# %%
import os
import pathlib
import sys

import refocus

SETTINGS = {"NOVEL": ".deps/data/novels/persuasion.txt", "BYTES": "4000", "STEPS": "8", "LEARNING_RATE": "1e-4"}
SETTINGS |= {name: os.environ[f"REFOCUS_{name}"] for name in SETTINGS if f"REFOCUS_{name}" in os.environ}
if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):  # a notebook's kernel has arguments of its own
    SETTINGS["NOVEL"] = sys.argv[1]

client = refocus.Client(os.environ.get("REFOCUS_ADDRESS", "127.0.0.1:7070"))
client.wait_until_serving()
print(f"{client.model().name}, {client.cluster().size} ranks")

# %% [markdown]
# ## Open the text
#
# Its first pages are read once; keys and values stay on the server. What follows them is kept aside to measure with.

# %%
pages = pathlib.Path(SETTINGS["NOVEL"]).read_bytes()
cut = pages.rindex(b"\n", 0, int(SETTINGS["BYTES"])) + 1
unseen = pages[cut:pages.rindex(b"\n", cut, cut + 800) + 1]


def show(progress: refocus.Progress) -> None:
    loss = "" if progress.loss is None else f", loss {progress.loss:.4f} nats per token"
    print(f"  {progress.phase}: {progress.done:,} of {progress.total:,}{loss}")


context = client.create(pages[:cut], on_progress=show)
print(f"{context.name}: {context.info().token_count:,} tokens")

# %% [markdown]
# ## Ask with the model's own queries
#
# Tokens come as they are made; leaving the loop cancels the rest.

# %%
QUESTIONS = ["Who is Sir Walter Elliot?", "What book does he like to read?"]


def ask_all(adapter: str) -> float:
    for question in QUESTIONS:
        print(f"  {question}\n    ", end="")
        prompt = f"\n\nQuestion: {question}\nAnswer:"
        with context.generate(prompt, adapter=adapter, max_tokens=24, stop=["\n"]) as answer:
            for piece in answer.text():
                print(piece, end="", flush=True)
        print()
    score, = context.score([unseen], adapter=adapter)
    return -score.sum_logprob / score.token_count


before = ask_all(adapter="")
print(f"the next lines, unseen: {before:.4f} nats per token")

# %% [markdown]
# ## Adapt the queries to the text
#
# A few gradient steps on W_Q alone, on spans of the text itself; keys, values and weights stay as they are.

# %%
adaptation = context.adapt(steps=int(SETTINGS["STEPS"]), span_tokens=64, seed=1,
                           learning_rate=float(SETTINGS["LEARNING_RATE"]), on_progress=show)
print(f"held-out spans: {adaptation.probe_loss_before:.4f} before, {adaptation.probe_loss_after:.4f} after")

# %% [markdown]
# ## Ask again

# %%
after = ask_all(adapter="default")
print(f"the next lines, unseen: {after:.4f} nats per token (before: {before:.4f})")

# %% [markdown]
# ## Where does the attention of a question go?
#
# The share that its tokens give to each quarter of the text, mean over layers and heads. What is missing to 1 they gave
# to the question itself.

# %%
tokens = context.info().token_count
quarters = [(tokens * i // 4, tokens * (i + 1) // 4) for i in range(4)]
for adapter in ("", "default"):
    mass = context.probe(quarters, QUESTIONS[0], adapter=adapter, mean_over_heads=True, mean_over_rows=True)
    shares = [sum(mass.at(layer, 0, part) for layer in range(len(mass.layers))) / len(mass.layers) for part in range(4)]
    print(f"  {adapter or 'base queries':12}", *(f"{share:.3f}" for share in shares))

# %%
context.delete()
client.close()
