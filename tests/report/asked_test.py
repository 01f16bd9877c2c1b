"""What a report begins with, for studies of every kind: run directories as training leaves them."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from codellm_jax import cli
from codellm_jax.report.asked import groups
from codellm_jax.report.curves import read_curves
from codellm_jax.report.effects_page import titles
from codellm_jax.report.write import read_study, report

ROWS = 1000


class Arm:
    """A run to be written: the share of code of its own stage, what it stands on, and its losses on text and code."""

    def __init__(self, stage: str, share: float, parent: str | None = None, branch: int | None = None,
                 losses: tuple[float, float] = (3.0, 2.0), rows: int = ROWS, source: str = "python",
                 finished: bool = True, weights: Mapping[str, int] | None = None) -> None:
        self.weights = weights or {source: 1}
        self.stage, self.share, self.parent, self.branch = stage, share, parent, branch
        self.losses, self.rows, self.source, self.finished = losses, rows, source, finished

    @property
    def kind(self) -> str:
        return "tuning" if self.stage == "tuning" else "pretraining"


def write_study(folder: Path, arms: Mapping[str, Arm], seeds: int = 3, noise: float = 0.01) -> Path:
    """Runs with records and provenance, and study.json."""
    entries: list[dict[str, Any]] = []
    for name, arm in arms.items():
        for seed in range(seeds):
            run = folder / "runs" / f"{name}.seed{seed}"
            run.mkdir(parents=True)
            dice = np.random.default_rng([ord(letter) for letter in run.name])
            lines = [{"step": 0, "split": "eval", "loss/text": 9.0, "loss/code": 9.0}]
            for step in (50, 100):
                text, code = (loss + dice.normal(0, noise) for loss in arm.losses)
                lines += [{"step": step, "split": "train", "loss": text, "tokens": 8 * arm.rows * step // 100},
                          {"step": step, "split": "eval", "loss/text": text, "loss/code": code,
                           "bits_per_byte/text": text / 3, "bits_per_byte/code": code / 3}]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            (run / "provenance.json").write_text(json.dumps({
                "ledger": ledger_of(folder, arms, name, seed), "seed": seed, "parameters": 10**9,
                "finished": arm.finished}))
            entries.append({"run": run.name, "arm": name, "seed": seed, "stage": arm.stage, "kind": arm.kind,
                            "from": arm.parent and f"{arm.parent}.seed{seed}", "mix": "constant", "settings": {}})
    (folder / "study.json").write_text(json.dumps({"comparison": "compute-matched", "runs": entries}))
    return folder


def ledger_of(folder: Path, arms: Mapping[str, Arm], name: str, seed: int, rows: int | None = None) -> dict[str, Any]:
    arm = arms[name]
    rows = arm.rows if rows is None else rows
    code = round(arm.share * rows)
    counts = {"text.books": rows - code} | {
        f"code.{name}": code * weight // sum(arm.weights.values()) for name, weight in arm.weights.items()}
    before: list[dict[str, Any]] = []
    if arm.parent:
        upto = None if arm.branch is None else arms[arm.parent].rows * arm.branch // 100
        parent = ledger_of(folder, arms, arm.parent, seed, upto)
        before = [*parent.pop("before"), parent | {"model_dir": str(folder / "runs" / f"{arm.parent}.seed{seed}")}]
    return {"stage": arm.kind, "rows": counts, "tokens": {source: 8 * count for source, count in counts.items()},
            "phases": [{"start": 0, "rows": counts}], "vocabulary_hash": "d79", "before": before,
            "branch": None if arm.branch is None else {"step": arm.branch}}


def told(folder: Path) -> tuple[list[str], str]:
    """What the report says at its end, and the page."""
    return report(str(folder), say=lambda line: None).splitlines(), (folder / "report" / "report.md").read_text()


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "report" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


SQUARE = {
    "TEXT": Arm("pretraining", 0.0), "HALF": Arm("pretraining", 0.5, losses=(3.05, 1.5)),
    "TEXT-t": Arm("tuning", 0.0, "TEXT", losses=(2.9, 1.9)), "TEXT-c": Arm("tuning", 0.4, "TEXT", losses=(2.9, 1.6)),
    "HALF-t": Arm("tuning", 0.0, "HALF", losses=(2.9, 1.4)), "HALF-c": Arm("tuning", 0.4, "HALF", losses=(2.9, 1.3))}


def test_a_tree_begins_with_the_effects_of_its_stages(tmp_path):
    said, page = told(write_study(tmp_path, SQUARE))
    rows = {(row["after"], row["effect"], row["metric"]): row for row in table(tmp_path, "effects")}
    for effect, truth in (("code in pretraining", (1.4 + 1.3 - 1.9 - 1.6) / 2 / 3),
                          ("code in tuning", (1.6 + 1.3 - 1.9 - 1.4) / 2 / 3),
                          ("interaction of code in pretraining and tuning", (1.3 - 1.4 - 1.6 + 1.9) / 3)):
        row = rows["tuning", effect, "code"]
        assert float(row["estimate"]) == pytest.approx(truth, abs=0.01) and row["unit"] == "bits per byte"
        assert float(row["low"]) < truth < float(row["high"])
        assert row["verdict"] == ("less together" if "interaction" in effect else "helps")
        assert rows["tuning", effect, "text"]["verdict"] == "no effect shown"
    assert rows["pretraining", "code in pretraining", "text"]["verdict"] == "harms"
    # First of all after the arms, in words and as a picture; no word of the paper, whose arms these are not.
    first = page.index("## At which stage code helps")
    assert first < page.index("![effects](effects.png)") < page.index("## Held-out loss")
    assert "\n## " not in page[:first]
    assert any(line.startswith("After tuning: Code in pretraining helps held-out loss on code (-0.") for line in said)
    assert "Code in pretraining and tuning adds less together than apart to held-out loss on code" in page
    assert "paper" not in page and "CODE" not in page.split("## Mix")[0]


def test_runs_without_evaluation_are_told_with_their_losses(tmp_path):
    _, page = told(write_study(tmp_path, SQUARE))
    line = next(line for line in page.splitlines() if line.startswith("| HALF |"))
    losses = [float(row["loss"]) for row in table(tmp_path, "losses")
              if row["arm"] == "HALF" and row["pool"] == "code" and row["step"] == "100"]
    assert f"perplexity {np.exp(np.mean(losses)):.4g}" in line and f"{np.mean(losses) / 3:.4f} bits per byte" in line
    assert not any(set(line.replace("|", " ").split()) <= {"-"} for line in page.splitlines()
                   if line.startswith("|") and "---" not in line)
    assert "## Scores" not in page and "## What was asked" not in page
    assert not (tmp_path / "report" / "questions.csv").exists()


def test_of_one_seed_nothing_is_concluded(tmp_path):
    said, page = told(write_study(tmp_path, SQUARE, seeds=1))
    assert {row["verdict"] for row in table(tmp_path, "effects")} == {"cannot be told"}
    assert all(row["low"] == row["p"] == "" for row in table(tmp_path, "effects"))
    assert any("cannot be told: a single seed." in line for line in said) and " helps " not in page


def test_a_missing_arm_is_a_hole(tmp_path):
    arms = {name: arm for name, arm in SQUARE.items() if name != "HALF-c"} | {
        "HALF-c": Arm("tuning", 0.4, "HALF", finished=False)}
    _, page = told(write_study(tmp_path, arms))
    assert "no arm has code in both pretraining and tuning" in page
    assert "Not trained to the end, and excluded from effects and sweeps: `HALF-c.seed0`" in page
    assert not any("interaction" in row["effect"] for row in table(tmp_path, "effects"))


def test_arms_with_code_everywhere_or_nowhere_tell_no_stage(tmp_path):
    arms = {name: arm for name, arm in SQUARE.items() if name not in ("TEXT-c", "HALF-t")}
    said, page = told(write_study(tmp_path, arms))
    assert "After tuning: These arms cannot tell at which stage code helps." in said
    assert "no arm has code in pretraining but not in tuning" in page
    assert {row["after"] for row in table(tmp_path, "effects")} == {"pretraining"}


SHARES = {0.0: (3.0, 2.0), 0.2: (3.0, 1.7), 0.5: (3.1, 1.5)}


def test_a_sweep_begins_with_its_shares(tmp_path):
    arms = {f"SHARE-{share}": Arm("pretraining", share, losses=losses) for share, losses in SHARES.items()}
    said, page = told(write_study(tmp_path, arms))
    assert page.index("## How much code in pretraining") == page.index("\n## ") + 1
    assert "sweep_pretraining.png" in page and "At which stage" not in page and "paper" not in page
    rows = {(row["metric"], float(row["share"])): row for row in table(tmp_path, "sweeps")}
    for place, pool in enumerate(("text", "code")):
        for share, losses in SHARES.items():
            row = rows[pool, share]
            assert float(row["value"]) == pytest.approx(losses[place] / 3, abs=0.02) and row["seeds"] == "3"
            if share:
                truth = (losses[place] - SHARES[0.0][place]) / 3
                assert float(row["difference_low"]) < truth < float(row["difference_high"])
    assert rows["code", 0.0]["difference"] == "" and rows["code", 0.5]["verdict"] == "helps"
    assert rows["text", 0.5]["verdict"] == "harms" and rows["text", 0.2]["verdict"] == "no effect shown"
    # Signal over noise, counted again from the last losses.
    ends: dict[str, list[float]] = {}
    for row in table(tmp_path, "losses"):
        if row["pool"] == "code" and row["step"] == "100":
            ends.setdefault(row["arm"], []).append(float(row["loss"]) / 3)
    means = sorted(map(np.mean, ends.values()))
    noise = np.sqrt(sum(np.sum((np.array(of_arm) - np.mean(of_arm)) ** 2) for of_arm in ends.values())
                    / sum(len(of_arm) - 1 for of_arm in ends.values()))
    [signal] = [row for row in table(tmp_path, "signals") if row["measure"] == "held-out loss on code"]
    assert float(signal["ratio"]) == pytest.approx((means[-1] - means[0]) / noise, rel=1e-3)
    assert float(signal["ratio"]) > float(signal["by_chance"]) and "## Which measures tell arms apart" in page
    [line] = [line for line in said if "Against 0 of code" in line]
    assert "held-out loss on code: code helps at 0.2, 0.5, most at 0.5 (-0.1" in line


def test_a_sweep_is_found_behind_its_stage_and_kinds_of_code_are_none(tmp_path):
    arms = {f"RATE-{share}": Arm("pretraining", share) for share in SHARES}
    arms |= {f"T-{share}": Arm("tuning", 0.3, f"RATE-{share}") for share in SHARES}
    found = groups(read_study(epath.Path(write_study(tmp_path / "a", arms, seeds=1))))
    assert [(group.stages, [(sweep.stage, [label for _, label in sweep.arms]) for sweep in group.sweeps])
            for group in found] == [
        (["pretraining", "tuning"], [("pretraining", ["T-0.0", "T-0.2", "T-0.5"])]),
        (["pretraining"], [("pretraining", ["RATE-0.0", "RATE-0.2", "RATE-0.5"])])]
    # Of other code: no point of a sweep.
    arms = {"TEXT": Arm("pretraining", 0.0), "A": Arm("pretraining", 0.2),
            "B": Arm("pretraining", 0.5, source="java")}
    [group] = groups(read_study(epath.Path(write_study(tmp_path / "b", arms, seeds=1))))
    assert not group.sweeps and [effect.name for effect in group.design.effects] == [
        "code in pretraining", "10 points more of code in pretraining",
        "10 points of code.java in place of text in pretraining",
        "10 points of code.python in place of text in pretraining"]


def test_arms_that_differ_in_weights_of_sources_have_effects_of_sources(tmp_path):
    """As much code everywhere, a tree of one stage: arms are no repetitions of each other, nor points of a sweep."""
    arms = {"TEXT": Arm("pretraining", 0.0, losses=(3.0, 2.0)),
            "PY": Arm("pretraining", 0.4, losses=(3.0, 1.7), weights={"python": 3, "java": 1}),
            "JAVA": Arm("pretraining", 0.4, losses=(3.0, 1.9), weights={"python": 1, "java": 3}),
            "LESS": Arm("pretraining", 0.2, losses=(3.0, 1.95), weights={"python": 1, "java": 3})}
    said, page = told(write_study(tmp_path, arms))
    [group] = groups(read_study(epath.Path(tmp_path)))
    assert group.by_source == {0} and len({levels[0] for levels in group.levels.values()}) == 4
    assert [[label for _, label in sweep.arms] for sweep in group.sweeps] == [["TEXT", "LESS", "JAVA"]]
    rows = {row["effect"]: row for row in table(tmp_path, "effects") if row["metric"] == "code"}
    # By hand: -0.3 = 0.3 p + 0.1 j and -0.1 = 0.1 p + 0.3 j, of all shares of 1, thirds in bits per byte.
    for name, truth in (("python", -1.0 / 30), ("java", 0.0)):
        row = rows[f"10 points of code.{name} in place of text in pretraining"]
        assert float(row["estimate"]) == pytest.approx(truth, abs=0.006)
    assert rows["10 points of code.python in place of text in pretraining"]["verdict"] == "helps"
    assert any("10 points of code.python in place of text in pretraining helps" in line for line in said)


def test_branches_stand_beside_their_trunk_where_they_end_with_it(tmp_path):
    """A trunk to its end is the arm without mid-training; what goes on after that is longer, and is compared apart."""
    arms = {"TEXT": Arm("pretraining", 0.0)}
    for at in (50, 80):
        for share in (0.2, 0.6):
            arms[f"MID-{at}-{share}"] = Arm("midtraining", share, "TEXT", at, rows=ROWS * (100 - at) // 100)
    arms["AFTER"] = Arm("continue", 0.2, "TEXT", rows=300)
    study = read_study(epath.Path(write_study(tmp_path, arms, seeds=2)))
    [group] = groups(study)
    assert group.stages == ["pretraining", "midtraining"] and set(group.shares) == set(arms) - {"AFTER"}
    assert group.levels["TEXT"][1] == (0.0, "without the stage")
    assert group.levels["MID-50-0.6"][1] == (0.6, "from step 50")
    assert sorted([label for _, label in sweep.arms] for sweep in group.sweeps) == [
        ["TEXT", f"MID-{at}-0.2", f"MID-{at}-0.6"] for at in (50, 80)]
    assert {root for roots in group.roots.values() for root in roots.values()} == {"TEXT.seed0", "TEXT.seed1"}
    _, page = told(tmp_path)
    assert "Arms without code in midtraining skip that stage" in page
    assert [line for line in page.splitlines() if line.startswith("## How much")] == [
        "## How much code in midtraining (from step 50)", "## How much code in midtraining (from step 80)"]


def test_sweeps_of_one_stage_say_what_each_holds_fixed(tmp_path):
    arms = {f"RATE-{share}": Arm("pretraining", share) for share in SHARES}
    arms |= {f"T{tuned}-{share}": Arm("tuning", tuned, f"RATE-{share}") for share in SHARES for tuned in (0.0, 0.3)}
    _, page = told(write_study(tmp_path, arms, seeds=2))
    assert [line for line in page.splitlines() if line.startswith("## How much")] == [
        "## How much code in pretraining (0 in tuning), after tuning",
        "## How much code in pretraining (0.3 in tuning), after tuning", "## How much code in pretraining"]


def test_many_measures_are_named_in_part():
    assert titles(["a", "b", "a"]) == "a and b"
    assert titles(list("abcde")) == "a, b, c, d and e"
    assert titles(list("abcdefgh")) == "a, b, c, d and 4 other measures"


def test_a_tree_on_points_of_a_sweep_is_told_from_the_sweep(tmp_path):
    """Points that nothing branches from are no part of the tree; a branch of its trunk's share stands for the trunk."""
    arms = {f"RATE-{share}": Arm("pretraining", share) for share in (0.0, 0.2, 0.5)}
    arms |= {f"MID-{trunk}-{share}": Arm("midtraining", share, f"RATE-{trunk}", 50, rows=ROWS // 2)
             for trunk in (0.0, 0.5) for share in (0.0, 0.5)}
    tree, sweep = groups(read_study(epath.Path(write_study(tmp_path / "full", arms, seeds=1))))
    assert set(tree.shares) == {label for label in arms if label.startswith("MID")} and not any(tree.absent.values())
    assert [effect.name for effect in tree.design.effects] == [
        "code in pretraining", "code in midtraining", "interaction of code in pretraining and midtraining"]
    assert tree.design.effects[0].weights == pytest.approx({
        "MID-0.5-0.0": 0.5, "MID-0.5-0.5": 0.5, "MID-0.0-0.0": -0.5, "MID-0.0-0.5": -0.5})
    assert sweep.stages == ["pretraining"] and set(sweep.shares) == {"RATE-0.0", "RATE-0.2", "RATE-0.5"}
    # Where no branch goes on with half code, the trunk is that arm, with its own share in the second half.
    del arms["MID-0.5-0.5"]
    tree, sweep = groups(read_study(epath.Path(write_study(tmp_path / "trunk", arms, seeds=1))))
    assert set(tree.shares) == {"RATE-0.5", "MID-0.0-0.0", "MID-0.0-0.5", "MID-0.5-0.0"}
    assert tree.levels["RATE-0.5"] == [(0.5, ""), (0.5, "without the stage")]


def test_arms_that_are_not_the_papers_are_not_called_so(tmp_path):
    """NL and CODE by their letters, and neither by its share; then by its share."""
    for share, papers in ((0.5, None), (1 / 3, "B")):
        folder = tmp_path / str(share)
        study = read_study(epath.Path(write_study(folder, {
            "A": Arm("pretraining", 0.0), "B": Arm("pretraining", share)}, seeds=1)))
        assert study.runs[1].arm == "CODE" and study.find("NL") == "A" and study.find("CODE") == papers


def test_a_run_that_names_itself_as_its_trunk_is_drawn_alone(tmp_path):
    folder = write_study(tmp_path, {"TEXT": Arm("pretraining", 0.0),
                                    "MID": Arm("midtraining", 0.2, "TEXT", 50, rows=500)}, seeds=1)
    path = folder / "runs" / "MID.seed0" / "provenance.json"
    facts = json.loads(path.read_text())
    facts["ledger"]["before"][-1]["model_dir"] = str(path.parent)
    path.write_text(json.dumps(facts))
    assert "drawn without its trunk" in read_curves(epath.Path(path.parent)).notes[0]


def test_losses_of_a_branch_are_joined_to_its_trunk(tmp_path, capsys):
    folder = write_study(tmp_path, {"TEXT": Arm("pretraining", 0.0),
                                    "MID": Arm("midtraining", 0.2, "TEXT", 50, rows=500)}, seeds=1)
    runs = [str(folder / "runs" / name) for name in ("TEXT.seed0", "MID.seed0")]
    curves = read_curves(epath.Path(runs[1]))
    assert [point[:2] for point in curves.trunk["Held-out text"]] == [(0, 0.0), (50, 4000.0)]
    assert [point[0] for point in curves.trunk["Training"]] == [50]
    assert curves.counted == [(0.0, 0.0), (50, 4000), (50.0, 4000.0), (50, 6000.0), (100, 8000.0)]
    for suffix, first in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        output = tmp_path / f"losses{suffix}"
        assert cli.main(["plot", *runs, f"--output={output}", "--against=tokens"]) == 0
        assert output.read_bytes().startswith(first) and str(output) in capsys.readouterr().out
    assert cli.main(["plot", runs[0]]) == 0 and (folder / "runs" / "TEXT.seed0" / "losses.png").exists()
    # A study that was moved finds its trunk beside the branch; without it the branch is drawn, and that is said.
    moved = folder.rename(tmp_path.parent / f"{tmp_path.name}-moved")
    assert read_curves(epath.Path(moved / "runs" / "MID.seed0")).trunk == curves.trunk
    (moved / "runs" / "TEXT.seed0").rename(moved / "gone")
    assert cli.main(["plot", str(moved / "runs" / "MID.seed0")]) == 0
    assert "MID.seed0 is drawn without its trunk" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["RUN/nowhere"], "nowhere/metrics.jsonl"), (["RUN", "--output=losses.gif"], "must end in .png, .svg or .pdf"),
    (["EMPTY"], "no loss is recorded yet")])
def test_what_cannot_be_drawn_is_told_in_a_line(tmp_path, capsys, arguments: Sequence[str], message):
    folder = write_study(tmp_path, {"A": Arm("pretraining", 0.0)}, seeds=1)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    places = {"RUN": str(folder / "runs" / "A.seed0"), "EMPTY": str(empty)}
    given = [places.get(argument, argument.replace("RUN", places["RUN"])) for argument in arguments]
    assert cli.main(["plot", *given]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
