"""Paths and links that the documents name exist. Usage: docs_test.py REPOSITORY [unittest arguments]"""
import glob
import itertools
import pathlib
import re
import sys
import unittest

ROOT = pathlib.Path(sys.argv.pop(1)).resolve()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FETCHED = (".deps/", "build/")  # made by ./setup and the build, not in the repository


def expand(text):
    """worker/{link,main}.cc -> worker/link.cc, worker/main.cc"""
    parts = re.split(r"\{([^{}]*)\}", text)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def named_paths(text):
    """Words in backticks that begin with a folder of the repository, and relative link targets."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    for quoted in re.findall(r"`([^`\n]+)`", text):
        for word in quoted.split():
            word = word.rstrip(",.;:").removeprefix("./")
            if "/" in word and word.split("/")[0] in folders and re.fullmatch(r"[\w./*{},-]+", word):
                yield from expand(word)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            yield target


def listed_files(text):
    """Of the block under "One line per file": folders, and glob patterns of the names that stand within them."""
    block = text.split("## One line per file", 1)[1].split("```")[1]
    folder = ""
    for line in block.strip("\n").splitlines():
        names = re.split(r" {2,}", line.strip())[0].split()
        if line.startswith(" "):
            yield from (folder + name for name in names)
        else:
            folder = names[0]
            yield from names


def is_listed_thing(path, root):
    if path.endswith("/"):
        return (root / path).is_dir()
    return bool(glob.glob(str(root / path) + ".*"))


class Documents(unittest.TestCase):
    def test_named_paths_exist(self):
        self.assertTrue(DOCUMENTS[0].exists())
        for document in DOCUMENTS:
            for path in named_paths(document.read_text(encoding="utf-8")):
                if path.startswith(FETCHED):
                    continue
                bases = (ROOT, document.parent)
                # Twins are named by their common stem: worker/backend_cpu stands for its .h and .cc.
                hit = any(glob.glob(str(base / path)) or glob.glob(str(base / path) + ".*") for base in bases)
                self.assertTrue(hit, f"{document.relative_to(ROOT)} names {path}, which does not exist")

    def test_one_line_per_file(self):
        listed = list(listed_files((ROOT / "docs/architecture.md").read_text(encoding="utf-8")))
        self.assertGreater(len(listed), 40)
        self.assertIn("coordinator/core/session", listed)
        self.assertEqual([], [path for path in listed if not is_listed_thing(path, ROOT)])
        self.assertEqual(len(listed), len(set(listed)))

    def test_a_missing_file_is_noticed(self):
        block = ("## One line per file\n\n```\ncli/   the command\n  main no_such_verb   verbs\n"
                 "no_such_folder/   x\n```\n")
        listed = list(listed_files(block))
        self.assertEqual(["cli/", "cli/main", "cli/no_such_verb", "no_such_folder/"], listed)
        self.assertEqual(["cli/no_such_verb", "no_such_folder/"],
                         [path for path in listed if not is_listed_thing(path, ROOT)])

    def test_a_missing_path_is_noticed(self):
        self.assertEqual(["worker/no_such.h", "worker/no_such.cc"], list(named_paths("see `worker/no_such.{h,cc}`")))
        self.assertEqual(["docs/gone.md"], list(named_paths("[gone](docs/gone.md)")))
        self.assertEqual([], list(named_paths("[far](https://example.com/a/b) and `a/b` and `--x/y`")))


if __name__ == "__main__":
    unittest.main()
