"""The exercise book: a copy of the project without the bodies of one technique.

Idea: who has written a thing knows it. Signatures and docstrings, with equation, shapes and source,
stay; the tests say when it is right again. Everything else works as before.

Run: python tests/exercise.py                       the techniques, and what of each is left blank
     python tests/exercise.py lora                  a copy in exercise-lora/, and the tests to pass
     python tests/exercise.py lora --hints          what may help
     python tests/exercise.py lora --out ~/lora     another folder
"""

import ast
import shutil
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pictures import table  # noqa: E402
from run import UserError, main  # noqa: E402


class Exercise(NamedTuple):
    """What is blank, by file, and the tests that say when it is right again."""

    blank: dict[str, str]  # functions, or class.method
    tests: str
    hints: tuple[str, ...]


BOOK = {
    "bpe": Exercise(
        {"merges.py": "pair_counts merge learn_obviously apply_merges"},
        "tests/test_tokenizer.py",
        ("Count pairs of neighbours over all pieces, each as often as the piece occurs.",
         "In a run of equal tokens pairs do not overlap: aaa holds one pair aa to merge.",
         "To apply, always merge the pair that was learnt first, wherever it stands."),
    ),
    "wordpiece": Exercise(
        {"wordpiece.py": "max_match build_trie match"},
        "tests/test_wordpiece.py",
        ("Longest match first; a word that cannot be cut to its end is one [UNK].",
         "A failure link of the trie says what is left, and which pieces have been found."),
    ),
    "unigram": Exercise(
        {"unigram.py": "best_path n_best_paths sampled_path"},
        "tests/test_unigram.py",
        ("The best way to a place is the best over its last piece: Viterbi.",
         "To draw, walk back from the end, each piece as probable as all ways through it."),
    ),
    "packing": Exercise(
        {"packing.py": "best_fit"},
        "tests/test_data.py",
        ("The longest first, each into the fullest row that still has room.",),
    ),
    "attention": Exercise(
        {"kernels/attention.py": "attend_with_lse_obvious block_weights merge group ungroup"},
        "tests/test_attention.py",
        ("softmax(q kᵀ · scale + mask) v, and log Σ exp beside it.",
         "Two parts of the keys are merged by their log-sum-exps.",
         "A row that sees nothing gives zeros, not NaN."),
    ),
    "positions": Exercise(
        {"positions.py": "Rope.angles alibi_slopes t5_bucket Sinusoidal.embed"},
        "tests/test_positions.py",
        ("θ_i = base^(−2i/D): what turns fast first, what turns slowly last.",
         "ALiBi's slopes are a geometric sequence; of heads that are no power of 2, two of them."),
    ),
    "norm": Exercise(
        {"kernels/norm.py": "rmsnorm_obvious layernorm_obvious RMSNormFunction.forward "
                            "RMSNormFunction.backward"},
        "tests/test_kernel_norm.py",
        ("dx = r (w dy − x r² mean(w dy x)), with r = 1/√(mean x² + ε).",
         "Sums in fp32, whatever comes in."),
    ),
    "optimizers": Exercise(
        {"optim.py": "learning_rate adamw adafactor orthogonalize"},
        "tests/test_optim.py",
        ("AdamW's decay does not go through the moments.",
         "Newton and Schulz: X ← aX + b(XXᵀ)X + c(XXᵀ)²X, on the shorter side."),
    ),
    "sampling": Exercise(
        {"generate.py": "top_k top_p distribution draw"},
        "tests/test_generate.py",
        ("The nucleus holds the token that crosses p.",
         "Equal logits at the border: say which stay."),
    ),
    "performer": Exercise(
        {"performer.py": "directions key_exponents performer_obvious"},
        "tests/test_performer.py",
        ("exp(q·k) = E[exp(w·q − |q|²/2) exp(w·k − |k|²/2)] over normal w.",
         "Orthogonal directions have the lengths of independent ones."),
    ),
    "recompute": Exercise(
        {"recompute.py": "Recompute.forward Recompute.backward"},
        "tests/test_recompute.py",
        ("Keep the inputs only; run forward again with gradients, and differentiate that.",),
    ),
    "tensor": Exercise(
        {"split.py": "Spread.forward Spread.backward Collect.forward Collect.backward "
                     "split_cross_entropy"},
        "tests/test_parallel.py",
        ("What is the identity forwards is a sum backwards, and the other way round.",
         "The largest logit and Σ exp come from all ranks; the target's from one."),
    ),
    "pipeline": Exercise(
        {"schedule.py": "gpipe one_f_one_b simulate"},
        "tests/test_schedule.py",
        ("Stage p warms up with P − 1 − p forwards, then goes one forward, one backward.",),
    ),
    "zero": Exercise(
        {"zero.py": "bounds Unit.gather Unit.scatter"},
        "tests/test_zero.py",
        ("Equal parts of one flat row; the last may be shorter.",),
    ),
    "ppo": Exercise(
        {"policy.py": "token_rewards next_beta gae whiten policy_loss clipped value_loss k3"},
        "tests/test_policy.py",
        ("A_t = δ_t + γλ A_{t+1}, with δ_t = r_t + γ V_{t+1} − V_t, from the end on.",
         "The larger of the two losses counts, for the policy and for the value."),
    ),
    "dpo": Exercise(
        {"policy.py": "log_probs of_sequence dpo_loss"},
        "tests/test_policy.py",
        ("−log σ(β (log π/π_ref of the better − that of the worse)).",),
    ),
    "reward": Exercise(
        {"reward.py": "pair_loss ranking_loss order_loss rating_loss"},
        "tests/test_reward.py",
        ("Bradley and Terry: the better one's chance is σ(r_better − r_worse).",
         "Plackett and Luce: the best first, then the best of the rest."),
    ),
    "lora": Exercise(
        {"lora.py": "LowRank.forward LowRank.delta LoraLinear.forward LoraLinear.dense changed "
                    "merge unmerge survival"},
        "tests/test_lora.py",
        ("y = W x + b + (α/r) B A x; B is zero at first.",
         "Unmerging gives back the bits of before: they are kept, not computed."),
    ),
    "prefix": Exercise(
        {"prefix.py": "Prefix.rows Prefix.before Before.seen"},
        "tests/test_prefix.py",
        ("Learnt keys and values stand before those of the text, whose positions move on.",),
    ),
    "grids": Exercise(
        {"grids.py": "Grid.codes Grid.values absmax zero_point pack unpack"},
        "tests/test_grids.py",
        ("Zero is a point of every grid.", "The lowest bits of a byte hold the first code."),
    ),
    "gptq": Exercise(
        {"gptq.py": "Hessian.add inverse_factor obq gptq"},
        "tests/test_gptq.py",
        ("After a weight is rounded, those not yet rounded move by −error · H⁻¹ row / H⁻¹ᵢᵢ.",
         "The rows of the upper Cholesky factor of H⁻¹ are these, for all steps at once."),
    ),
    "scaling": Exercise(
        {"laws.py": "Law.__call__ optimum predict huber objective descend valleys"},
        "tests/test_laws.py",
        ("log L̂ is a log-sum-exp of log E and of log A − α log x.",
         "Huber's loss has a parabola that touches it from above: its weight is min(1, δ/|r|)."),
    ),
}  # fmt: skip


def bodies(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """Functions and methods of a file by name."""
    found = {}
    for node in tree.body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        start = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        found |= {start + n.name: n for n in inside if isinstance(n, ast.FunctionDef)}
    return found


def without(source: str, names: list[str]) -> str:
    """The source with only signature and docstring of some functions."""
    known, lines = bodies(ast.parse(source)), source.splitlines(keepends=True)
    for node in sorted((known[name] for name in names), key=lambda n: -n.lineno):
        first = node.body[0]
        told = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        begin = first.end_lineno if told else first.lineno - 1
        blank = f"{' ' * first.col_offset}raise NotImplementedError  # yours\n"
        lines[begin : node.end_lineno] = [blank]
    return "".join(lines)


@dataclass(frozen=True)
class Book:
    """A copy of the project without the bodies of one technique."""

    technique: tyro.conf.Positional[str] = ""
    out: str = ""  # folder of the copy; empty: exercise-<technique>
    hints: bool = False  # say what may help, and copy nothing

    def __post_init__(self):
        if self.technique and self.technique not in BOOK:
            raise UserError(f"{self.technique!r} is none of {', '.join(BOOK)}")


def copy(name: str, folder: Path) -> None:
    """The project as it is here, but for runs and hidden files, with blanks. UserError if the
    folder is there."""
    if folder.exists():
        raise UserError(f"{folder} exists already: give another --out, or remove it")
    leave = shutil.ignore_patterns(".*", "runs", "__pycache__", "exercise-*", "shared")
    shutil.copytree(ROOT, folder, ignore=leave)
    for path, names in BOOK[name].blank.items():
        file = folder / path
        file.write_text(without(file.read_text(encoding="utf-8"), names.split()), encoding="utf-8")


def script() -> None:
    config = tyro.cli(Book, description=__doc__)
    if not config.technique:
        rows = [(name, "; ".join(f"{path}: {blank}" for path, blank in it.blank.items()))
                for name, it in BOOK.items()]  # fmt: skip
        width = max(len(name) for name, _ in rows) + 2
        for name, what in rows:
            print(textwrap.fill(what, 98, initial_indent=name.ljust(width),
                                subsequent_indent=" " * width))  # fmt: skip
        return
    it = BOOK[config.technique]
    if config.hints:
        print("\n".join(f"- {hint}" for hint in it.hints))
        return
    folder = Path(config.out or f"exercise-{config.technique}").expanduser()
    copy(config.technique, folder)
    lines = [(path, name) for path, names in it.blank.items() for name in names.split()]
    print(table(("in " + str(folder), "is yours"), *lines))
    print(f"\nright again when these pass:\n  cd {folder} && pytest {it.tests}\n"
          f"hints:\n  python tests/exercise.py {config.technique} --hints")  # fmt: skip


if __name__ == "__main__":
    main(script)
